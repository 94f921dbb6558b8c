"""CSV files that a split can be made from: given labels of the samples, and which class is mistaken for which.

Classes are named as in the manifest, never numbered: the number of a class depends on who sorted the names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from autodo_dist.data.manifest import Manifest
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Labels, Split
from autodo_dist.errors import AutodoError


def read_labels(path: Path, manifest: Manifest, train: Ids) -> Labels:
    """Given labels by id, from a CSV with the columns key,label or id,label: the file's for train, the true ones else.

    The file may have labels of other samples too. AutodoError for an unknown sample or class, a sample twice, or a
    train sample without a label.
    """
    table = _read(path, ("key", "label"), ("id", "label"))
    place = table.column_names[0]
    known = manifest.keys if place == "key" else _numbers(len(manifest))
    id_n = _places(path, table.column(place), known, f"sample of {manifest.place}")
    label_n = _places(path, table.column("label"), pa.array(manifest.classes), _classes(manifest.classes))
    if len(twice := _repeated(id_n)):
        raise AutodoError(
            f"labels {path}: {place} {known[int(twice[0])].as_py()!r} is there twice{_more(len(twice))}; keep one"
        )
    given_N = np.full(len(manifest), -1, np.int32)
    given_N[id_n] = label_n
    if len(missing := train[given_N[train] < 0]):
        raise AutodoError(
            f"labels {path}: none for train sample {manifest.keys[int(missing[0])].as_py()!r} (id {missing[0]})"
            f"{_more(len(missing))}; add it, or leave the sample out of the train part"
        )
    noisy_N = manifest.label_N.copy()
    noisy_N[train] = given_N[train]
    return noisy_N


def read_mapping(path: Path, classes: Sequence[str]) -> tuple[int, ...]:
    """Which class each class is mistaken for, from a CSV with the columns from,to; those not in it for themselves.

    AutodoError for an unknown class, or one that is mapped twice.
    """
    table = _read(path, ("from", "to"))
    names = pa.array(classes)
    source_n, target_n = (_places(path, table.column(name), names, _classes(classes)) for name in ("from", "to"))
    if len(twice := _repeated(source_n)):
        raise AutodoError(f"mapping {path}: class {classes[twice[0]]!r} is mapped twice{_more(len(twice))}; keep one")
    mapping = np.arange(len(classes))
    mapping[source_n] = target_n
    return tuple(mapping.tolist())


def read_corrections(path: Path, manifest: Manifest, split: Split) -> Split:
    """The split with the labels that a CSV gives to some of its train samples; one with none is left out.

    The CSV has the column new_label and id, key or both; where it has given_label too, those must be the split's.
    AutodoError for a sample that is unknown, not in the train part or there twice, for an unknown class, or for another
    given label.
    """
    table = _table(path, ("id", "key", "given_label", "new_label"))
    names = table.column_names
    if "new_label" not in names or not {"id", "key"} & set(names):
        raise AutodoError(f"file {path}: begins with {','.join(names)[:80]!r}; it must have new_label, and id or key")
    id_n = _samples(path, table, manifest)
    given_n = [manifest.classes[label] for label in split.label_N[id_n].tolist()]

    def refuse(bad_n: npt.NDArray[np.bool_], why: Callable[[int], str]) -> None:
        if len(at := np.flatnonzero(bad_n)):
            name = f"{manifest.keys[int(id_n[at[0]])].as_py()!r} (id {id_n[at[0]]})"
            raise AutodoError(f"file {path}: sample {name} {why(int(at[0]))}{_more(len(at))}; mend or remove that line")

    refuse(np.isin(id_n, _repeated(id_n)), lambda _: "is there twice")
    refuse(~np.isin(id_n, split.train), lambda _: "is not in the train part, whose labels alone are given")
    if "given_label" in names:
        said = table.column("given_label").to_pylist()
        other_n = np.array([it != own for it, own in zip(said, given_n, strict=True)], bool)
        refuse(other_n, lambda at: f"has the given label {given_n[at]!r} in this run, not {said[at]!r}")
    new = table.column("new_label")
    out_n = pa.compute.equal(new, "").to_numpy()
    label_N = split.label_N.copy()
    label_N[id_n[out_n]] = manifest.label_N[id_n[out_n]]  # as of all samples that are left out
    label_N[id_n[~out_n]] = _places(
        path, new.filter(pa.array(~out_n)), pa.array(manifest.classes), _classes(manifest.classes)
    )
    return replace(split, train=np.setdiff1d(split.train, id_n[out_n], assume_unique=True), label_N=label_N)


def _samples(path: Path, table: Any, manifest: Manifest) -> npt.NDArray[np.int64]:
    """The ids of a table's lines, by its columns id, key or both."""
    what = f"sample of {manifest.place}"
    known = {"id": _numbers(len(manifest)), "key": manifest.keys}
    found = [_places(path, table.column(name), known[name], what) for name in known if name in table.column_names]
    if len(differ := np.flatnonzero(found[0] != found[-1])):
        id_, key = (table.column(name)[int(differ[0])].as_py() for name in ("id", "key"))
        raise AutodoError(f"file {path}: id {id_} is not the sample {key!r}{_more(len(differ))}; mend that line")
    return found[0]


def _numbers(count: int) -> Any:
    return pa.array(np.arange(count)).cast(pa.string())


def _read(path: Path, *headers: tuple[str, str]) -> Any:
    """A CSV's table of strings. AutodoError if it cannot be read or has none of the headers."""
    table = _table(path, [name for header in headers for name in header])
    if tuple(table.column_names) not in headers:
        wanted = " or ".join(",".join(header) for header in headers)
        raise AutodoError(
            f"file {path}: begins with {','.join(table.column_names)[:80]!r}; its first line must be {wanted}"
        )
    return table


def _table(path: Path, names: Sequence[str]) -> Any:
    """A CSV's table, with strings in the columns of these names. AutodoError if it cannot be read."""
    text = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names})
    try:
        return pa.csv.read_csv(path, convert_options=text)
    except (OSError, pa.ArrowException) as error:
        raise AutodoError(f"file {path}: cannot be read as CSV ({' '.join(str(error).split())}); mend it") from error


def _places(path: Path, values: Any, known: Any, what: str) -> npt.NDArray[np.int64]:
    """Where each value is in `known`. AutodoError names the first that is not there."""
    found = pa.compute.fill_null(pa.compute.index_in(values, value_set=known), -1).to_numpy()
    if len(unknown := np.flatnonzero(found < 0)):
        value = values[int(unknown[0])].as_py()
        raise AutodoError(f"file {path}: {value!r} is no {what}{_more(len(unknown))}; mend or remove that line")
    places: npt.NDArray[np.int64] = found.astype(np.int64)
    return places


def _repeated(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    values, counts = np.unique(places, return_counts=True)
    return values[counts > 1]


def _classes(classes: Sequence[str]) -> str:
    more = ", …" if len(classes) > 5 else ""
    return f"class ({', '.join(classes[:5])}{more})"


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""

"""Pictures -> webdataset shards, DALI indexes and a manifest (whose on-disk format manifest.py describes).

Every picture is read twice: once to decode it in full, as training will, so that a broken one gets no id, and once to
write it. What is kept in memory is a row a picture, never its bytes.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from autodo_dist.data.decode import Decoder
from autodo_dist.data.manifest import PARTS, Shard, write_manifest
from autodo_dist.data.split import split_off
from autodo_dist.errors import AutodoError
from autodo_dist.files import sha256

TRAIN, VALIDATION, TEST = range(len(PARTS))
EXTENSIONS = ("jpg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pnm", "jp2")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")  # PIL's names
REFUSED = {("TIFF", "LA"), ("TIFF", "PA")}  # (format, PIL's mode) that DALI 2.4 decodes to wrong colours, silently
FOLDERS = {"train": TRAIN, "val": VALIDATION, "test": TEST}
SHARD_SAMPLES = 1000
DIGITS_SHARD_SAMPLES = 256  # a few hundred kB, but several shards a part
_OURS = re.compile(
    rf"(({'|'.join(PARTS)})-\d+\.(tar|idx)|samples\.parquet|(stamps|manifest)\.json|unreadable\.txt)(\.partial)?"
)
_SPLIT, _SHUFFLE = 0, 1  # what a random stream of the pack's seed is for

Report = Callable[[str, int, int], None]  # (stage, pictures done, pictures in all)


@dataclass(frozen=True)
class Source:
    """One picture to pack: `key` names it to the reader, `label` indexes the classes, `part` indexes PARTS.

    `read` returns the encoded bytes; `extension` is that of the tar's member, without the dot.
    """

    key: str
    extension: str
    label: int
    part: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Sample:
    """A source that decodes; height and width are pixels after EXIF orientation."""

    source: Source
    height: int
    width: int


# ---------------------------------------------------------------------------------------------------------- sources


def digits_sources(seed: int, validation_fraction: float, test_fraction: float) -> tuple[list[str], list[Source]]:
    """Class names and pictures of scikit-learn's 1,797 handwritten digits, as grey PNGs of 32 × 32 pixels.

    The fractions are those of `draw_part`: test is drawn first, validation from what is left.
    """
    from sklearn.datasets import load_digits  # only this source needs scikit-learn

    scans_NHW, labels_N = load_digits(return_X_y=True)
    scans_NHW = np.round(scans_NHW.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    sources = [
        Source(f"digit-{index:05d}", "png", int(label), TRAIN, partial(_enlarged_png, scan_HW))
        for index, (scan_HW, label) in enumerate(zip(scans_NHW, labels_N, strict=True))
    ]
    generator = _generator(seed, _SPLIT)
    for part, fraction in ((TEST, test_fraction), (VALIDATION, validation_fraction)):
        sources = draw_part(sources, part, 10, fraction, generator)
    return [str(digit) for digit in range(10)], sources


def _enlarged_png(scan_HW: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scan_HW).resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def folder_sources(
    src: Path, seed: int, validation_fraction: float, test_fraction: float
) -> tuple[list[str], list[Source]]:
    """Class names and pictures of SRC/train/<class>/*, SRC/val/<class>/* and SRC/test/<class>/*.

    Classes are the sorted names of SRC/train's folders; hidden files are passed over. Where val or test is missing,
    its fraction of train becomes that part, as in `draw_part`: test is drawn first, validation from what is left.
    AutodoError names the folder that is missing, empty, nested or of an unknown class.
    """
    if not src.is_dir():
        raise AutodoError(f"pack {src}: no such folder; give one that holds train/<class>/<pictures>")
    if not (src / "train").is_dir():
        raise AutodoError(f"pack {src}: holds no folder train; put the pictures into {src / 'train'}/<class>/")
    classes = _class_names(src / "train")
    sources = []
    for folder, part in FOLDERS.items():
        if (src / folder).is_dir():
            sources += _folder_part(src, folder, part, classes)
    generator = _generator(seed, _SPLIT)
    for folder, fraction in (("test", test_fraction), ("val", validation_fraction)):
        if not (src / folder).is_dir():
            sources = draw_part(sources, FOLDERS[folder], len(classes), fraction, generator)
    return classes, sources


def _folder_part(src: Path, folder: str, part: int, classes: list[str]) -> list[Source]:
    """Sources of one of SRC's folders, in the order of their keys within a class."""
    label_of = {name: label for label, name in enumerate(classes)}
    sources = []
    for name in _class_names(src / folder):
        if name not in label_of:
            raise AutodoError(f"pack {src / folder / name}: train knows no class {name!r}; rename or delete the folder")
        for entry in _entries(src / folder / name):
            if entry.is_dir():
                raise AutodoError(f"pack {entry.path}: a folder inside a class; move its pictures up or delete it")
            path = Path(entry.path)
            extension = path.suffix[1:].lower()
            key = os.fsencode(path.relative_to(src)).decode(errors="backslashreplace")
            sources.append(
                Source(key, "jpg" if extension == "jpeg" else extension, label_of[name], part, path.read_bytes)
            )
    if not sources:
        raise AutodoError(f"pack {src / folder}: holds no picture; put pictures into <class>/ there or delete it")
    return sources


def _class_names(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name: folders, files, and links that lead nowhere (unreadable later on)."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if entry.is_dir() or entry.is_file() or entry.is_symlink()]
    except OSError as error:
        raise AutodoError(f"pack {folder}: cannot be read ({error.strerror}); mend its permissions") from error
    return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def draw_part(
    sources: list[Source], part: int, classes: int, fraction: float, generator: np.random.Generator
) -> list[Source]:
    """Move round(fraction·n) of each class's n train sources to another part."""
    label_N = np.array([source.label for source in sources], dtype=np.int32)
    train = np.flatnonzero(np.array([source.part for source in sources]) == TRAIN)
    _, moved = split_off(train, label_N, classes, fraction, generator)
    sources = list(sources)
    for index in moved.tolist():
        sources[index] = replace(sources[index], part=part)
    return sources


# ------------------------------------------------------------------------------------------------------------- pack


def pack(
    out: Path,
    name: str,
    classes: list[str],
    sources: Sequence[Source],
    *,
    seed: int,
    shard_samples: int,
    skip_unreadable: bool,
    origin: dict[str, Any],
    report: Report,
) -> dict[str, str]:
    """Pack the sources into folder `out`; return the pictures that were left out: key -> what is wrong with it.

    Each part is shuffled once by `seed`; ids run 0..N-1 over train, validation, test, without gaps. `shard_samples` is
    the most pictures in a shard; `origin` says in the manifest how it was packed. The same sources and seed give the
    same bytes. AutodoError if `out` holds something else, a class has no train picture, a picture does not decode and
    skip_unreadable is not set, or a file cannot be read or written. An interrupted pack leaves no manifest, and the
    next one into the same folder starts anew.
    """
    try:
        prepare_folder(out)
        _require_every_class(name, classes, sources)
        samples, unreadable = probe_all(sources, report)
        if unreadable:
            listing = "".join(f"{key}: {why}\n" for key, why in unreadable.items())
            (out / "unreadable.txt").write_text(listing, encoding="utf-8")
        if unreadable and not skip_unreadable:
            raise AutodoError(_explain_unreadable(name, unreadable, out / "unreadable.txt"))
        _require_every_class(name, classes, [sample.source for sample in samples])
        _write(out, name, classes, plan_shards(samples, seed, shard_samples), origin, len(unreadable), report)
    except OSError as error:
        raise AutodoError(f"pack {out}: {error}; mend that and run the same command again") from error
    return unreadable


def prepare_folder(out: Path) -> None:
    """Make `out` an empty folder; what an interrupted pack left there is deleted, anything else an AutodoError."""
    if (out / "manifest.json").exists():
        raise AutodoError(f"pack {out}: already holds a packed data set; choose another folder or delete it")
    if out.exists() and not out.is_dir():
        raise AutodoError(f"pack {out}: not a folder; choose another name")
    out.mkdir(parents=True, exist_ok=True)
    found = sorted(out.iterdir())
    foreign = [path.name for path in found if not _OURS.fullmatch(path.name)]
    if foreign:
        raise AutodoError(f"pack {out}: holds other things ({foreign[0]!r}); choose an empty or a new folder")
    for path in found:
        path.unlink()


def probe_all(sources: Sequence[Source], report: Report) -> tuple[list[Sample], dict[str, str]]:
    """Decode every picture: (those that can be read, key -> what is wrong with the others)."""
    samples, unreadable, decoder = [], {}, Decoder()
    for done, source in enumerate(sources, 1):
        try:
            height, width = probe(source, decoder)
        except AutodoError as error:
            unreadable[source.key] = str(error)
        else:
            samples.append(Sample(source, height, width))
        report("reading", done, len(sources))
    return samples, unreadable


def probe(source: Source, decoder: Decoder) -> tuple[int, int]:
    """Decode a picture in full, twice, and return its (height, width) after EXIF orientation.

    PIL finds what is cut off, which DALI fills silently; DALI is what training reads with. AutodoError says what is
    wrong with it.
    """
    if source.extension not in EXTENSIONS:
        raise AutodoError(f"not a known picture extension ({', '.join(EXTENSIONS)})")
    try:
        raw = source.read()
    except OSError as error:
        raise AutodoError(f"cannot be read ({error.strerror})") from error
    if not raw:
        raise AutodoError("zero bytes")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            image.load()
            kind = image.format, image.mode
    except UnidentifiedImageError as error:
        raise AutodoError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture") from error
    except Exception as error:  # PIL's decoders answer broken bytes with many kinds: SyntaxError, struct.error, ...
        raise AutodoError(" ".join(f"{error or type(error).__name__}".split())) from error
    if kind in REFUSED:
        raise AutodoError(f"DALI decodes {kind[0]} of mode {kind[1]} to wrong colours")
    return decoder.shape(raw)


def plan_shards(samples: Sequence[Sample], seed: int, shard_samples: int) -> list[tuple[str, list[Sample]]]:
    """Shuffle each part and cut it into the fewest shards of at most `shard_samples`, as equal as can be.

    Returns (name of the tar, its samples) in the order of ids.
    """
    generator = _generator(seed, _SHUFFLE)
    plan = []
    for part, name in enumerate(PARTS):
        members = [sample for sample in samples if sample.source.part == part]
        order = generator.permutation(len(members))
        shards = np.array_split(order, -(-len(members) // shard_samples)) if members else []
        plan += [
            (f"{name}-{number:05d}.tar", [members[index] for index in shard.tolist()])
            for number, shard in enumerate(shards)
        ]
    return plan


def _write(
    out: Path,
    name: str,
    classes: list[str],
    plan: list[tuple[str, list[Sample]]],
    origin: dict[str, Any],
    left_out: int,
    report: Report,
) -> None:
    """Write the planned shards, and the manifest last."""
    shards: list[Shard] = []
    tables: list[pa.Table] = []
    total, first_id = sum(len(members) for _, members in plan), 0
    for number, (tar_name, members) in enumerate(plan):
        shard, places = write_shard(out / tar_name, first_id, members)
        shards.append(shard)
        tables.append(_rows(number, first_id, members, places))
        first_id += len(members)
        report("writing", first_id, total)
    rows = pa.concat_tables(tables).combine_chunks()
    write_manifest(out, name, classes, shards, rows, origin | {"unreadable": left_out})


def write_shard(path: Path, first_id: int, members: Sequence[Sample]) -> tuple[Shard, list[tuple[int, int]]]:
    """Write one tar and its index, atomically; ids of its members count up from `first_id`.

    Returns the shard, and (offset, size) in bytes of each encoded picture inside the tar.
    """
    import webdataset  # brings torch along: seconds, which `autodo --help` need not wait

    partial_tar, index = path.with_suffix(".tar.partial"), path.with_suffix(".idx")
    with (
        partial_tar.open("wb") as file,
        # Fixed time and owner: the same pictures give the same bytes.
        webdataset.TarWriter(file, encoder=False, mtime=0, user="autodo", group="autodo") as tar,
    ):
        for id_, sample in enumerate(members, first_id):
            picture = {sample.source.extension: sample.source.read()}
            tar.write({"__key__": f"{id_:08d}", "id": id_.to_bytes(8, "little", signed=True)} | picture)
    lines, places = read_places(partial_tar)
    partial_index = path.with_suffix(".idx.partial")
    partial_index.write_text(f"v1.2 {len(lines)}\n" + "".join(line + "\n" for line in lines))
    os.replace(partial_tar, path)
    os.replace(partial_index, index)
    return Shard(path.name, path.stat().st_size, len(members), sha256(path), sha256(index)), places


def read_places(tar: Path) -> tuple[list[str], list[tuple[int, int]]]:
    """Where the members of a tar lie: (DALI's index line, offset and size in bytes of the picture) a sample.

    A line of index format v1.2 holds `extension offset size name` for each member of the sample.
    """
    lines: dict[str, str] = {}
    places = []
    with tarfile.open(tar, "r:") as file:
        for member in file:
            key, _, extension = member.name.partition(".")
            line = f"{extension} {member.offset_data} {member.size} {member.name}"
            lines[key] = f"{lines[key]} {line}" if key in lines else line
            if extension != "id":
                places.append((member.offset_data, member.size))
    return list(lines.values()), places


def _rows(number: int, first_id: int, members: Sequence[Sample], places: Sequence[tuple[int, int]]) -> pa.Table:
    """The rows of samples.parquet for shard `number`."""
    return pa.table(
        {
            "id": pa.array(range(first_id, first_id + len(members)), pa.int64()),
            "key": pa.array([sample.source.key for sample in members], pa.string()),
            "shard": pa.array([number] * len(members), pa.int32()),
            "offset": pa.array([offset for offset, _ in places], pa.int64()),
            "size": pa.array([size for _, size in places], pa.int64()),
            "height": pa.array([sample.height for sample in members], pa.int32()),
            "width": pa.array([sample.width for sample in members], pa.int32()),
            "label": pa.array([sample.source.label for sample in members], pa.int32()),
            "part": pa.array([sample.source.part for sample in members], pa.int8()),
        }
    )


def _require_every_class(name: str, classes: list[str], sources: Sequence[Source]) -> None:
    counts = Counter(source.label for source in sources if source.part == TRAIN)
    for label, class_name in enumerate(classes):
        if not counts[label]:
            raise AutodoError(
                f"pack {name}: class {class_name!r} has no picture in train; "
                "add pictures, lower the fractions, or delete its folder"
            )


def _explain_unreadable(name: str, unreadable: dict[str, str], listing: Path) -> str:
    few = "; ".join(f"{key} ({why})" for key, why in list(unreadable.items())[:3])
    more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
    return (
        f"pack {name}: {len(unreadable)} unreadable: {few}{more}; "
        f"mend or delete them (all are listed in {listing}), or leave them out with --skip-unreadable"
    )


def _generator(seed: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox([seed, purpose]))

"""Pictures -> webdataset shards, DALI indexes and a manifest (whose on-disk format manifest.py describes).

    sources -> probe, chunk by chunk -> plan of shards -> shards -> manifest

Every picture is read twice: once to decode it in full, as training will, so that a broken one gets no id, and once to
write it. What is kept in memory is a row a picture, never its bytes. Chunks and shards are shared out to workers, and
each leaves a note when it is done (unfinished.py), so that a pack that was stopped goes on. The bytes depend on the
sources, the seed and the options alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from autodo_dist.data import unfinished
from autodo_dist.data.encode import Shrink
from autodo_dist.data.manifest import Shard, write_manifest
from autodo_dist.data.probe import Found, probe_chunk
from autodo_dist.data.sources import TRAIN, Source
from autodo_dist.data.workers import Workers
from autodo_dist.data.write_shards import Place, Planned, plan_shards, write_shard
from autodo_dist.errors import AutodoError
from autodo_dist.files import write_text

SHARD_SAMPLES = 1000
CHUNK = 256  # pictures that a worker probes before it notes them: about 2 s of ImageNet's

Report = Callable[[str, int, int], None]  # (stage, done, in all): pictures, or bytes where the stage says so


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
    inputs: Sequence[Path] = (),
    about: dict[str, Any] | None = None,
    shrink: Shrink | None = None,
    workers: int = 1,
) -> dict[str, str]:
    """Pack the sources into folder `out`; return the pictures that were left out: key -> what is wrong with it.

    Each part is shuffled once by `seed`; ids run 0..N-1 over train, validation, test, without gaps. `shard_samples` is
    the most pictures in a shard. `origin` holds the options that decide the bytes, and goes into the manifest with
    `about`, which holds what else is known; `inputs` are the files and folders that the sources come from.

    A pack that was stopped, however, goes on when it is started again with the same origin and inputs: what is done is
    kept where its files have not changed since. The same sources and options give the same bytes, on any number of
    workers, stopped or not. AutodoError if `out` holds something else, two keys are equal, a class has no train
    picture, a picture does not decode and skip_unreadable is not set, or a file cannot be read or written.
    """
    _require_every_class(name, classes, sources)
    _require_unique_keys(name, sources)
    workers = min(workers, -(-len(sources) // CHUNK))  # a few pictures are packed before another process has started
    try:
        with unfinished.begun(out, command(origin, inputs)) as notes, Workers(workers) as pool:
            found_N4, unreadable = _probe_all(notes, sources, pool, report)
            _settle_unreadable(out, name, unreadable, skip_unreadable)
            readable_N = found_N4[:, Found._fields.index("height")] > 0
            _require_every_class(name, classes, [sources[k] for k in np.flatnonzero(readable_N).tolist()])
            part_N = np.array([source.part for source in sources], np.int8)
            plan = plan_shards(part_N, readable_N, seed, shard_samples)
            shards, rows = _write_all(out, notes, plan, sources, found_N4, shrink, pool, report)
            write_manifest(out, name, classes, shards, rows, origin | (about or {}) | {"unreadable": len(unreadable)})
            unfinished.finish(out)
    except OSError as error:
        raise AutodoError(f"pack {out}: {error}; mend that and run the same command again") from error
    return unreadable


def command(origin: dict[str, Any], inputs: Sequence[Path]) -> dict[str, Any]:
    """What makes two packs the same, so that one may go on where the other was stopped."""
    return origin | {"inputs": [str(path.resolve()) for path in inputs]}


def _probe_all(
    notes: Path, sources: Sequence[Source], pool: Workers, report: Report
) -> tuple[npt.NDArray[np.int64], dict[str, str]]:
    """Decode every picture: (a `Found` a row, zeros for those that cannot be read; key -> what is wrong with these)."""
    found_N4 = np.zeros((len(sources), len(Found._fields)), np.int64)
    wrong: dict[int, str] = {}
    done = 0
    jobs = (
        (notes / f"probed-{number:05d}.json", start, sources[start : start + CHUNK])
        for number, start in enumerate(range(0, len(sources), CHUNK))
    )
    for start, answers in pool.run(_probe_at, jobs):
        for index, answer in enumerate(answers, start):
            if isinstance(answer, str):
                wrong[index] = answer
            else:
                found_N4[index] = answer
        done += len(answers)
        report("reading", done, len(sources))
    return found_N4, {sources[index].key: wrong[index] for index in sorted(wrong)}


def _probe_at(note: Path, start: int, sources: Sequence[Source]) -> tuple[int, list[Found | str]]:
    return start, probe_chunk(note, sources)


def _settle_unreadable(out: Path, name: str, unreadable: dict[str, str], skip: bool) -> None:
    """List the unreadable pictures in out/unreadable.txt. AutodoError if there are any that must not be skipped."""
    listing = out / "unreadable.txt"
    if not unreadable:
        listing.unlink(missing_ok=True)  # mended since it was written
        return
    write_text(listing, "".join(f"{key}: {why}\n" for key, why in unreadable.items()))
    if not skip:
        raise AutodoError(_explain_unreadable(name, unreadable, listing))


def _write_all(
    out: Path,
    notes: Path,
    plan: list[Planned],
    sources: Sequence[Source],
    found_N4: npt.NDArray[np.int64],
    shrink: Shrink | None,
    pool: Workers,
    report: Report,
) -> tuple[list[Shard], pa.Table]:
    """Write the planned shards, and nothing else of the kind stays; return them and the rows of samples.parquet."""
    names = {shard.name for shard in plan}
    for path in (*out.glob("*.tar"), *out.glob("*.idx")):
        if path.stem not in names:
            path.unlink()
    written: dict[int, tuple[Shard, pa.Table]] = {}
    total, done = sum(len(shard.members) for shard in plan), 0
    jobs = ((out, notes, shard, [sources[k] for k in shard.members], found_N4[shard.members], shrink) for shard in plan)
    for planned, shard, places in pool.run(write_shard, jobs):
        written[planned.number] = shard, _rows(planned, [sources[k] for k in planned.members], places)
        done += len(places)
        report("writing", done, total)
    in_order = [written[number] for number in range(len(plan))]
    return [shard for shard, _ in in_order], pa.concat_tables([rows for _, rows in in_order]).combine_chunks()


def _rows(planned: Planned, members: Sequence[Source], places: Sequence[Place]) -> pa.Table:
    """The rows of samples.parquet for one shard."""
    ids = range(planned.first_id, planned.first_id + len(members))
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "key": pa.array([source.key for source in members], pa.string()),
            "shard": pa.array([planned.number] * len(members), pa.int32()),
            "offset": pa.array([place.offset for place in places], pa.int64()),
            "size": pa.array([place.size for place in places], pa.int64()),
            "height": pa.array([place.height for place in places], pa.int32()),
            "width": pa.array([place.width for place in places], pa.int32()),
            "label": pa.array([source.label for source in members], pa.int32()),
            "part": pa.array([source.part for source in members], pa.int8()),
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


def _require_unique_keys(name: str, sources: Sequence[Source]) -> None:
    seen: set[str] = set()
    for source in sources:
        if source.key in seen:
            raise AutodoError(f"pack {name}: {source.key} is there twice; leave one of the two")
        seen.add(source.key)


def _explain_unreadable(name: str, unreadable: dict[str, str], listing: Path) -> str:
    few = "; ".join(f"{key} ({why})" for key, why in list(unreadable.items())[:3])
    more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
    return (
        f"pack {name}: {len(unreadable)} unreadable: {few}{more}; "
        f"mend or delete them (all are listed in {listing}), or leave them out with --skip-unreadable"
    )

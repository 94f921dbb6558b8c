"""Two finished runs compared: to the bit, but for times; or their losses, where other ranks made them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from autodo_dist.files import read_json
from autodo_dist.parallel.checkpoint_diff import differences, digest, progress_differences
from autodo_dist.parallel.checkpoint_rows import RowReader, find_checkpoint

# Of a line of metrics.jsonl and of summary.json: what is measured, and so differs between any two runs.
MEASURED = ("seconds", "seconds_total", "images_per_second", "data_wait_share", "peak_memory_bytes")
LISTS = ("labels.csv", "dropped.csv", "history.jsonl")


@dataclass(frozen=True)
class Compared:
    """Two runs, the first and the second, and what differs, the earliest in the runs first; nothing: they are equal.

    digests: of all tensors of each one's last checkpoint; tensors, lines: how many of them the first has.
    """

    digests: tuple[str, str]
    differences: tuple[str, ...]
    step: int
    tensors: int
    lines: int
    files: tuple[str, ...]


def compare(a: Path, b: Path) -> Compared:
    """Lines of metrics, every tensor and the progress of the last checkpoint, LISTS, summary.json of two runs."""
    left, right = last_checkpoint(a), last_checkpoint(b)
    found = [
        *lines_that_differ(a, b),
        *map(str, differences(left, right)),
        *progress_differences(left, right),
        *(f"{name}: other contents" for name in LISTS if contents(a / name) != contents(b / name)),
        *keys_that_differ("summary.json", *(unmeasured(read_json(folder / "summary.json")) for folder in (a, b))),
    ]
    files = (*(name for name in LISTS if (a / name).is_file()), "summary.json")
    digests = digest(left), digest(right)
    return Compared(digests, tuple(found), left.header.step, len(left.names), len(metrics(a)), files)


def last_checkpoint(folder: Path) -> RowReader:
    """The newest checkpoint of a run, every byte of which is as it was written. AutodoError if it has none."""
    return RowReader(find_checkpoint(folder / "checkpoints", None), contents_of=None)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what is measured."""
    return [unmeasured(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def unmeasured(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row is computed."""
    return {key: value for key, value in row.items() if key not in MEASURED}


def contents(file: Path) -> bytes | None:
    """All of a file; None if there is none."""
    return file.read_bytes() if file.is_file() else None


def lines_that_differ(a: Path, b: Path) -> Iterator[str]:
    """What the lines of metrics of two runs say otherwise."""
    for number, (left, right) in enumerate(zip_longest(metrics(a), metrics(b)), start=1):
        if left is None or right is None:
            yield f"metrics.jsonl: line {number} is missing in {a if left is None else b}"
            return
        yield from keys_that_differ(f"metrics.jsonl, line {number}, step {left.get('step')}", left, right)


def keys_that_differ(what: str, left: dict[str, Any], right: dict[str, Any]) -> Iterator[str]:
    """The keys of two rows that have other values."""
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            yield f"{what}: {key} {left.get(key)!r} against {right.get(key)!r}"


@dataclass(frozen=True)
class Losses:
    """Losses of two runs over the same lines of metrics: the largest |a - b|, and the step at which it is.

    other: the first line that is of another step, pass or learning rate; then not the same batches were trained on.
    """

    largest: float
    step: int
    lines: int
    other: str | None


def losses(a: Path, b: Path) -> Losses:
    """The training and evaluation losses of two runs compared."""
    missing: dict[str, Any] = {}
    rows = list(zip_longest(metrics(a), metrics(b), fillvalue=missing))
    same = ("kind", "step", "epoch", "lr", "hyper_lr", "validation_pictures", "test_pictures")
    other = (
        line
        for number, pair in enumerate(rows, start=1)
        for line in keys_that_differ(f"metrics.jsonl, line {number}", *({k: row.get(k) for k in same} for row in pair))
    )
    gaps = [
        (abs(left[key] - right[key]), left["step"])
        for left, right in rows
        for key in ("loss", "validation_loss", "test_loss")
        if left.get(key) is not None and right.get(key) is not None
    ]
    largest, step = max(gaps)
    return Losses(largest, step, len(rows), next(other, None))

"""labels.csv: what a run knows of each train sample's label, and how suspect that is; docs/labels.md says what is what.

A run writes it at its end, `autodo labels` at any time.
"""

from __future__ import annotations

import csv
from pathlib import Path

from autodo_dist.data.manifest import Manifest
from autodo_dist.data.split import Labels
from autodo_dist.files import whole
from autodo_dist.learnt import Columns, Numbers

LINES = 1 << 14  # that are written together
HEADER = (
    *("id", "key", "given_label", "weight", "learnt_label", "learnt_probability"),
    *("suggested_label", "suggested_probability", "score"),
)


def write_labels(path: Path, columns: Columns, score_N: Numbers, manifest: Manifest) -> None:
    """Write labels.csv, a line for each train sample in the order of ids; empty where the run does not know."""
    names = [*manifest.classes, ""]  # the last one is that of -1
    labels = [columns.given_N, columns.learnt_N, columns.suggested_N]
    numbers = [columns.weight_N, columns.learnt_probability_N, columns.suggested_probability_N, score_N]
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for start in range(0, len(score_N), LINES):
            part = slice(start, start + LINES)
            ids = columns.id_N[part]
            keys = manifest.keys.take(ids).to_pylist()
            given, learnt, suggested = (named(it, part, len(ids), names) for it in labels)
            weight, share, probability, score = (figures(it, part, len(ids)) for it in numbers)
            writer.writerows(
                zip(ids.tolist(), keys, given, weight, learnt, share, suggested, probability, score, strict=True)
            )


def named(label_N: Labels | None, part: slice, count: int, names: list[str]) -> list[str]:
    """The classes' names of a part of the samples."""
    return [""] * count if label_N is None else [names[label] for label in label_N[part].tolist()]


def figures(value_N: Numbers | None, part: slice, count: int) -> list[str]:
    """Numbers of a part of the samples, as they are written."""
    return [""] * count if value_N is None else ["" if it != it else f"{it:.6g}" for it in value_N[part].tolist()]

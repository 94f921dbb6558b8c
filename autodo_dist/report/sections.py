"""One run's part of the page: from what it says of itself and has learnt to tables, charts and pictures.

With many classes the most telling ones are in charts, heat maps and on the contact sheet; all are in tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from autodo_dist.data.order import Ids
from autodo_dist.data.shards import Shards
from autodo_dist.errors import AutodoError
from autodo_dist.label_errors import suggestions
from autodo_dist.method import warp
from autodo_dist.report import charts, learnings, pictures
from autodo_dist.report.facts import RunFacts
from autodo_dist.report.learnings import ClassRow, Learnt, Suspect

MOST_ROWS = 20  # classes in a chart or heat map
MOST_PAIRS = 200
SAMPLES = 8  # on the contact sheet


@dataclass
class Section:
    """One run's part of the page."""

    run: RunFacts
    id: str
    learnt: Learnt | None = None
    class_rows: list[dict[str, Any]] = field(default_factory=list)
    charts: defaultdict[str, str] = field(default_factory=lambda: defaultdict(str))
    suspects: list[dict[str, Any]] = field(default_factory=list)
    suspects_wrong: float | None = None
    changed: list[tuple[str, str, int]] = field(default_factory=list)
    matrix: dict[str, Any] | None = None
    gates: dict[str, Any] | None = None
    samples: list[pictures.Sample] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def store(self) -> str:
        """Under which name a browser keeps the ticks of this run's checkpoint."""
        place = f"{self.run.folder.resolve()}@{self.learnt.step if self.learnt else 0}"
        return f"autodo-report {place}"


def section(run: RunFacts, id_: str, step: int | None, data: Sequence[str], most_suspects: int) -> Section:
    """All about one run, as far as it is there."""
    part = Section(run, id_, missing=list(run.missing))
    rows: list[ClassRow] = []
    if run.start_epoch is None and run.settings:
        part.missing.append(
            "This run learns nothing of its samples: there are no weights, labels or augmentations to show."
        )
    else:
        try:
            part.learnt = learnings.read_learnt(run.folder, step, data)
        except (AutodoError, OSError, ValueError) as error:
            part.missing.append(f"What was learnt of the samples is not shown. {error}")
    if part.learnt is not None:
        rows = learnings.by_class(part.learnt)
        add_labels(part, part.learnt, most_suspects)
        add_augmentation(part, part.learnt)
        add_weights(part, part.learnt, rows)
    part.class_rows = class_table(run, part.learnt, rows)
    add_errors(part)
    return part


def add_errors(part: Section) -> None:
    """Error per class before and at the end, of the classes where that changed most."""
    known = [row for row in part.class_rows if row["end"] is not None]
    most = sorted(
        known, key=lambda row: (-abs(row["end"] - row["before"]) if row["before"] is not None else 0.0, -row["end"])
    )
    shown = sorted(most[:MOST_ROWS], key=known.index)
    if shown:
        rows = [
            (row["name"], None if row["before"] is None else 100 * row["before"], 100 * row["end"]) for row in shown
        ]
        part.charts["errors"] = charts.dumbbells(f"{part.id}-errors", f"{part.run.part} error, %", rows)


def add_labels(part: Section, learnt: Learnt, most_suspects: int) -> None:
    """The gallery, and given against suggested labels."""
    found, part.suspects_wrong = learnings.suspects(learnt, most_suspects)
    if not found:
        part.missing.append("Neither weights nor soft labels are learnt: no label is suspected.")
    part.suspects = with_pictures(part, learnt, found)
    pairs = learnings.changed_pairs(learnt.columns, learnt.classes)
    part.changed = pairs[:MOST_PAIRS]
    if suggestions(learnt.columns) is not None:
        part.matrix = confusion(learnt, pairs)


def with_pictures(part: Section, learnt: Learnt, found: Sequence[Suspect]) -> list[dict[str, Any]]:
    """The suspects as the page's script reads them."""
    try:
        images = pictures.thumbnails(Shards(learnt.source.manifest), [each.id for each in found])
    except AutodoError as error:
        part.missing.append(f"Pictures are not shown. {error}")
        images = [None] * len(found)
    return [asdict(each) | {"picture": image} for each, image in zip(found, images, strict=True)]


def confusion(learnt: Learnt, pairs: Sequence[tuple[str, str, int]]) -> dict[str, Any]:
    """Given (rows) against suggested labels (columns) of the classes of the most frequent changes."""
    place = {name: at for at, name in enumerate(learnt.classes)}
    of_pairs = [name for given, suggested, _ in pairs for name in (given, suggested)]
    names = sorted(list(dict.fromkeys([*of_pairs, *place]))[:MOST_ROWS], key=place.__getitem__)
    totals = np.bincount(learnt.columns.given_N, minlength=len(place))
    away = np.zeros(len(place), np.int64)
    counts = {(given, suggested): count for given, suggested, count in pairs}
    for given, _, count in pairs:
        away[place[given]] += count
    cells = [
        [counts.get((a, b), 0) if a != b else int(totals[place[a]] - away[place[a]]) for b in names] for a in names
    ]
    return {"names": names, "cells": cells, "totals": [int(totals[place[name]]) for name in names]}


def add_augmentation(part: Section, learnt: Learnt) -> None:
    """Gate probabilities and magnitudes by class, or the one row that all share; and the contact sheet."""
    columns, operations = learnt.columns, learnt.source.layout.operations
    shared = learnt.source.shared()
    if shared is not None:
        rows = [
            ("all samples", [it["probability"] for it in shared.values()], [it["magnitude"] for it in shared.values()])
        ]
    elif columns.gate_CK is not None and columns.magnitude_CK is not None:
        have = np.flatnonzero(np.isfinite(columns.gate_CK).all(1))
        rows = [(learnt.classes[at], columns.gate_CK[at].tolist(), columns.magnitude_CK[at].tolist()) for at in have]
    else:
        return
    both_R2K = np.array([[row[1], row[2]] for row in rows])
    change = np.abs(both_R2K - both_R2K.mean(0)).sum((1, 2)) if len(rows) else np.zeros(0)
    telling = sorted(np.argsort(-change, kind="stable")[:MOST_ROWS].tolist())
    start = {"probability": warp.START_PROBABILITY, "magnitude": warp.START_MAGNITUDE}
    away_2 = np.abs(both_R2K - np.array(list(start.values()))[:, None]).max((0, 2), initial=1e-9)
    part.gates = {
        "operations": operations,
        "rows": rows,
        "shown": [rows[at] for at in telling],
        "start": start,
        "reach": dict(zip(start, away_2.tolist(), strict=True)),  # farthest from there, which has the full colour
    }
    try:
        part.samples = pictures.sheet(learnt.source, sheet_ids(learnt, telling if shared is None else None))
    except (AutodoError, OSError) as error:
        if not any(what.startswith("Pictures are not shown") for what in part.missing):
            part.missing.append(f"Pictures are not shown. {error}")


def sheet_ids(learnt: Learnt, telling: Sequence[int] | None) -> Ids:
    """Sorted ids of a few samples, of as many classes as may be: the first ones with an update."""
    columns = learnt.columns
    touched_N = columns.last_update_N if columns.last_update_N is not None else np.ones(len(columns.id_N))
    order_N = np.lexsort((np.arange(len(columns.id_N)), touched_N == 0))
    _, first = np.unique(columns.given_N[order_N], return_index=True)
    if telling is not None and len(first) > SAMPLES:
        first = first[np.isin(columns.given_N[order_N][first], telling)]
    return np.sort(columns.id_N[order_N[first[:: max(1, len(first) // SAMPLES)][:SAMPLES]]])


def add_weights(part: Section, learnt: Learnt, rows: Sequence[ClassRow]) -> None:
    """How weights are spread, over all and by class: the classes with the lightest and the heaviest medians."""
    if learnt.columns.weight_N is None:
        return
    edges, groups = learnings.weight_shares(learnt)
    part.charts["weights"] = charts.shares(f"{part.id}-weights", "weight of a sample", edges, groups)
    have = [(name, row) for name, row in zip(learnt.classes, rows, strict=True) if row.weights is not None]
    by_median = sorted(range(len(have)), key=lambda at: (have[at][1].weights or [0.0] * 5)[2])
    ends = by_median if len(have) <= MOST_ROWS else by_median[: MOST_ROWS // 2] + by_median[-MOST_ROWS // 2 :]
    shown = [have[at] for at in sorted(ends)]
    part.charts["weights_by_class"] = charts.boxes(
        f"{part.id}-boxes", "weight of a sample", [(name, groups_of(row)) for name, row in shown]
    )


def groups_of(row: ClassRow) -> list[charts.Box]:
    """The boxes of a class: clean and mislabelled samples where that is known, else all."""
    apart = [("label as packed", 0, row.clean_weights), ("label is wrong", 1, row.wrong_weights)]
    known = row.clean_weights is not None or row.wrong_weights is not None
    groups = apart if known else [("all samples", 0, row.weights)]
    return [charts.Box(group, colour, values) for group, colour, values in groups if values is not None]


def class_table(run: RunFacts, learnt: Learnt | None, rows: Sequence[ClassRow]) -> list[dict[str, Any]]:
    """All classes, with what is known of each."""
    before, end = run.class_errors()
    names = learnt.classes if learnt is not None else tuple(end or before)
    learnt_rows = [asdict(row) for row in rows] or [{} for _ in names]
    return [
        {"name": name, "before": before.get(name), "end": end.get(name)} | row
        for name, row in zip(names, learnt_rows, strict=True)
    ]

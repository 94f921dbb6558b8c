"""What a run has learnt of its samples, as the few numbers that are shown: by class, by pair of labels, by suspicion.

Shapes: N train samples, C classes, K learnt operations. Truth is looked at to tell clean samples from mislabelled ones
in what is shown, never to rank them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodo_dist import label_errors
from autodo_dist.errors import AutodoError
from autodo_dist.learnt import Columns, Source, open_source, read_columns

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Numbers = npt.NDArray[Any]  # float32 or float64
Truth = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Learnt:
    """What a checkpoint holds."""

    source: Source
    columns: Columns

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self.source.step

    @property
    def wrong_N(self) -> Truth | None:
        """The given label is not the packed one; None where none differs (not known)."""
        return self.source.wrong_N

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.source.manifest.classes


@dataclass(frozen=True)
class Suspect:
    """A sample whose given label may be wrong; None for what is not learnt or not known."""

    id: int
    key: str
    given: str
    score: float
    suggested: str | None
    probability: float | None  # of the suggestion
    given_probability: float | None
    weight: float | None


@dataclass(frozen=True)
class ClassRow:
    """The samples of one given class. weights: quantiles of all; clean_weights, wrong_weights: where truth is known.

    changed, wrong: shares whose likeliest label, and whose packed label, is another one.
    """

    samples: int
    weights: Sequence[float] | None
    clean_weights: Sequence[float] | None
    wrong_weights: Sequence[float] | None
    changed: float | None
    wrong: float | None


def read_learnt(run: Path, step: int | None, places: Sequence[str]) -> Learnt:
    """What the run's checkpoint of that step (None: the newest) holds; `places`: where its data set may lie by now.

    AutodoError if that cannot be told: nothing is learnt, no checkpoint, no data set.
    """
    faults: list[AutodoError] = []
    for place in [*places, None]:
        try:
            source = open_source(run, step, place)
            return Learnt(source, read_columns(source))
        except AutodoError as error:
            faults.append(error)
    raise faults[-1]


def suspects(learnt: Learnt, count: int) -> tuple[list[Suspect], float | None]:
    """The `count` most suspected labels, most suspected first; and the share of them that is wrong, where known."""
    columns, classes = learnt.columns, learnt.classes
    if columns.weight_N is None and columns.given_probability_N is None:
        return [], None
    score_N = label_errors.scores(columns)
    order_n = np.argsort(-score_N, kind="stable")[: min(count, int(np.isfinite(score_N).sum()))]  # NaN comes last
    keys = learnt.source.manifest.keys.take(columns.id_N[order_n]).to_pylist() if len(order_n) else []

    def number(values_N: Numbers | None, at: int) -> float | None:
        return None if values_N is None else float(values_N[at])

    label_N, share_N = label_errors.suggestions(columns) or (None, None)
    found = [
        Suspect(
            id=int(columns.id_N[at]),
            key=str(key),
            given=classes[columns.given_N[at]],
            score=float(score_N[at]),
            suggested=None if label_N is None else classes[label_N[at]],
            probability=number(share_N, at),
            given_probability=number(columns.given_probability_N, at),
            weight=number(columns.weight_N, at),
        )
        for at, key in zip(order_n.tolist(), keys, strict=True)
    ]
    return found, _share(None if learnt.wrong_N is None else learnt.wrong_N[order_n])


def by_class(learnt: Learnt) -> list[ClassRow]:
    """A row for each class, in their order."""
    columns, wrong_N = learnt.columns, learnt.wrong_N
    order_N = np.argsort(columns.given_N, kind="stable")
    ends = np.cumsum(np.bincount(columns.given_N, minlength=len(learnt.classes)))
    suggested = label_errors.suggestions(columns)
    changed_N = None if suggested is None else suggested[0] != columns.given_N
    rows = []
    for of_class in np.split(order_N, ends[:-1]):
        weights = None if columns.weight_N is None else columns.weight_N[of_class]
        wrong = None if wrong_N is None else wrong_N[of_class]
        apart = None if weights is None or wrong is None else (weights[~wrong], weights[wrong])
        rows.append(
            ClassRow(
                samples=len(of_class),
                weights=quantiles(weights),
                clean_weights=quantiles(apart[0]) if apart else None,
                wrong_weights=quantiles(apart[1]) if apart else None,
                changed=_share(None if changed_N is None else changed_N[of_class]),
                wrong=_share(wrong),
            )
        )
    return rows


def quantiles(values: Numbers | None) -> list[float] | None:
    """Those of QUANTILES, linear between samples; None of no values."""
    if values is None or not len(values):
        return None
    return [float(value) for value in np.quantile(values.astype(np.float64), QUANTILES)]


def changed_pairs(columns: Columns, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """(given, suggested, samples) for each pair of different labels, the most frequent first."""
    suggested = label_errors.suggestions(columns)
    if suggested is None:
        return []
    code_N = columns.given_N.astype(np.int64) * len(classes) + suggested[0]
    codes, counts = np.unique(code_N[columns.given_N != suggested[0]], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    pairs = zip(codes[order].tolist(), counts[order].tolist(), strict=True)
    return [(classes[code // len(classes)], classes[code % len(classes)], count) for code, count in pairs]


def weight_shares(learnt: Learnt, bins: int = 40) -> tuple[Numbers, list[tuple[str, Numbers]]]:
    """Edges of equal bins over all weights, and shares per bin of all samples, or of clean and mislabelled ones."""
    weight_N = learnt.columns.weight_N
    assert weight_N is not None
    edges = np.linspace(0.0, max(float(weight_N.max(initial=0.0)), 1e-6), bins + 1)
    groups = [("all samples", np.ones(len(weight_N), np.bool_))]
    if learnt.wrong_N is not None:
        groups = [("label as packed", ~learnt.wrong_N), ("label is wrong", learnt.wrong_N)]
    counts = [(name, np.histogram(weight_N[those], edges)[0] / max(1, int(those.sum()))) for name, those in groups]
    return edges, counts


def _share(those: Truth | None) -> float | None:
    return None if those is None or not len(those) else float(those.mean())

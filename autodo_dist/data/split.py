"""Which samples are in which part of a run, and which label the training sees: pure functions of a seed.

A split draws the clean validation part; a distortion then makes the train part imbalanced and its labels noisy, as in
the AutoDO paper (section 4.1). Validation and test stay clean. Nothing is written: the tars stay as packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autodo_dist.data.manifest import PARTS
from autodo_dist.data.order import Ids


@dataclass(frozen=True)
class Split:
    """Sorted ids of the three parts, and the given label of every sample (by id; the true one where undistorted)."""

    train: Ids
    validation: Ids
    test: Ids
    label_N: npt.NDArray[np.int32]


def make_split(
    label_N: npt.NDArray[np.int32],
    part_N: npt.NDArray[np.int8],
    classes: int,
    *,
    validation_fraction: float | None,
    imbalance_ratio: float,
    label_noise: float,
    seed: int,
) -> Split:
    """Split and distort N samples of `classes` classes.

    validation_fraction: None keeps the packed parts; a number f redraws validation as round(f·n) of each class's n
    packed train and validation samples. imbalance_ratio: classes of the upper half, C//2..C-1, keep max(1, round(n/IR))
    train samples. label_noise: round(NR·n) of the n train samples that are left get a label drawn uniformly from all
    classes, which may be the true one.
    """
    train, validation, test = (np.flatnonzero(part_N == part) for part in range(len(PARTS)))
    generator = np.random.Generator(np.random.Philox(seed))
    if validation_fraction is not None:
        train, validation = split_off(
            np.sort(np.concatenate([train, validation])), label_N, classes, validation_fraction, generator
        )
    train = imbalance(train, label_N, classes, imbalance_ratio, generator)
    noisy_N = label_N.copy()
    redrawn = generator.permutation(train)[: round(label_noise * len(train))]
    noisy_N[redrawn] = generator.integers(classes, size=len(redrawn), dtype=np.int32)
    return Split(train, validation, test, noisy_N)


def split_off(
    ids: Ids, label_N: npt.NDArray[np.int32], classes: int, fraction: float, generator: np.random.Generator
) -> tuple[Ids, Ids]:
    """Split ids into (kept, split off), the latter round(fraction·n) of each class's n; both sorted."""
    off = [
        generator.permutation(members)[: round(fraction * len(members))] for members in by_class(ids, label_N, classes)
    ]
    split = np.sort(np.concatenate(off))
    return np.setdiff1d(ids, split, assume_unique=True), split


def imbalance(
    ids: Ids, label_N: npt.NDArray[np.int32], classes: int, ratio: float, generator: np.random.Generator
) -> Ids:
    """Keep max(1, round(n / ratio)) of the n ids of every class of the upper half; sorted."""
    kept = []
    for label, members in enumerate(by_class(ids, label_N, classes)):
        count = len(members) if label < classes // 2 else min(len(members), max(1, round(len(members) / ratio)))
        kept.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(kept))


def by_class(ids: Ids, label_N: npt.NDArray[np.int32], classes: int) -> list[Ids]:
    """The ids of each class, each in the order in which they came."""
    grouped = ids[np.argsort(label_N[ids], kind="stable")]
    return np.split(grouped, np.searchsorted(label_N[grouped], np.arange(1, classes)))

"""Which samples are in which part of a run, and which label the training sees: pure functions of a recipe.

A split draws the clean validation part; a distortion then makes the train part imbalanced and its labels noisy, as in
the AutoDO paper (section 4.1) or in other ways of the field. Validation and test stay clean, and the tars as packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from autodo_dist.data.manifest import PARTS
from autodo_dist.data.order import Ids
from autodo_dist.errors import AutodoError

Labels = npt.NDArray[np.int32]
Imbalance = Literal["step", "exponential"]
Noise = Literal["uniform", "asymmetric"]


@dataclass(frozen=True)
class Split:
    """Sorted ids of the three parts, and the given label of every sample (by id; the true one where undistorted).

    Ids in none of the parts are train samples that are left out.
    """

    train: Ids
    validation: Ids
    test: Ids
    label_N: Labels


@dataclass(frozen=True)
class Recipe:
    """How a packed data set is split and distorted; the defaults change nothing. AutodoError for impossible values.

    validation_fraction: None keeps the packed parts; a number f redraws validation as round(f·n) of each class's n
    packed train and validation samples. imbalance, imbalance_ratio: what is left of the train samples, see
    `count_left`. noise, noise_rate: which labels of those become wrong, see `uniform` and `asymmetric`. mapping, for
    asymmetric noise alone: the label that class c is mistaken for, at place c; None: c + 1, and 0 for the last.
    """

    validation_fraction: float | None = None
    imbalance: Imbalance = "step"
    imbalance_ratio: float = 1.0
    noise: Noise = "uniform"
    noise_rate: float = 0.0
    mapping: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.validation_fraction is not None and not 0 <= self.validation_fraction < 1:
            raise AutodoError(
                f"validation fraction {self.validation_fraction:g}: not a share of at least 0 and below 1"
            )
        if not 1 <= self.imbalance_ratio < float("inf"):
            raise AutodoError(f"imbalance ratio {self.imbalance_ratio:g}: not a finite number of at least 1")
        if not 0 <= self.noise_rate <= 1:
            raise AutodoError(f"noise rate {self.noise_rate:g}: not a share between 0 and 1")
        if not 0 <= self.seed < 2**63:
            raise AutodoError(f"seed {self.seed}: not a whole number of at least 0 and below 2**63")
        if self.mapping is not None and self.noise != "asymmetric":
            raise AutodoError(f"{self.noise} noise takes no mapping; choose asymmetric noise, or leave the mapping out")


def make_split(label_N: Labels, part_N: npt.NDArray[np.int8], classes: int, recipe: Recipe) -> Split:
    """Split and distort N samples of `classes` classes; label_N is true, part_N indexes manifest.PARTS.

    One generator draws validation, imbalance and noise, in this order.
    """
    train, validation, test = (np.flatnonzero(part_N == part) for part in range(len(PARTS)))
    generator = np.random.Generator(np.random.Philox(recipe.seed))
    if recipe.validation_fraction is not None:
        both = np.sort(np.concatenate([train, validation]))
        train, validation = split_off(both, label_N, classes, recipe.validation_fraction, generator)
    train = thin_out(train, label_N, classes, recipe.imbalance, recipe.imbalance_ratio, generator)
    if recipe.noise == "uniform":
        noisy_N = uniform(train, label_N, classes, recipe.noise_rate, generator)
    else:
        mapping = recipe.mapping or tuple(np.roll(np.arange(classes), -1).tolist())
        noisy_N = asymmetric(train, label_N, mapping, recipe.noise_rate, generator)
    return Split(train, validation, test, noisy_N)


def split_off(
    ids: Ids, label_N: Labels, classes: int, fraction: float, generator: np.random.Generator
) -> tuple[Ids, Ids]:
    """Split ids into (kept, split off), the latter round(fraction·n) of each class's n; both sorted."""
    off = [
        generator.permutation(members)[: round(fraction * len(members))] for members in by_class(ids, label_N, classes)
    ]
    split = np.sort(np.concatenate(off))
    return np.setdiff1d(ids, split, assume_unique=True), split


def folds(ids: Ids, label_N: Labels, classes: int, count: int, seed: int) -> tuple[Ids, ...]:
    """The ids dealt into `count` folds, each sorted: the members of each class in random order, one fold after another,
    so that sizes differ by at most one, in all and in each class.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    dealt = np.concatenate([generator.permutation(members) for members in by_class(ids, label_N, classes)])
    return tuple(np.sort(dealt[fold::count]) for fold in range(count))


def thin_out(
    ids: Ids, label_N: Labels, classes: int, imbalance: Imbalance, ratio: float, generator: np.random.Generator
) -> Ids:
    """Keep `count_left` of the ids of every class; sorted."""
    kept = []
    for label, members in enumerate(by_class(ids, label_N, classes)):
        count = count_left(len(members), label, classes, imbalance, ratio)
        kept.append(generator.permutation(members)[:count])
    return np.sort(np.concatenate(kept))


def count_left(samples: int, label: int, classes: int, imbalance: Imbalance, ratio: float) -> int:
    """How many of a class's n train samples an imbalance of ratio IR leaves: at least one, where there is any.

    step (the AutoDO paper): round(n / IR) of the upper half of the classes, C//2..C-1, and all of the others.
    exponential (Cui et al., Class-Balanced Loss, CVPR 2019): round(n·μ^c) of class c with μ = IR^(-1/(C - 1)), so that
    the first class keeps all and the last n / IR.
    """
    if imbalance == "step":
        left = samples / ratio if label >= classes // 2 else samples
    else:
        # To 9 decimals first: the last bit of a machine's power must not decide a tie.
        left = round(samples / ratio ** (label / max(1, classes - 1)), 9)
    return min(samples, max(1, round(left)))


def uniform(train: Ids, label_N: Labels, classes: int, rate: float, generator: np.random.Generator) -> Labels:
    """Labels of which round(rate·n) of the n train samples' are drawn anew from all classes (the AutoDO paper).

    The true label may be drawn again, so a share of rate·(1 - 1/C) is wrong in the mean.
    """
    noisy_N = label_N.copy()
    redrawn = generator.permutation(train)[: round(rate * len(train))]
    noisy_N[redrawn] = generator.integers(classes, size=len(redrawn), dtype=np.int32)
    return noisy_N


def asymmetric(
    train: Ids, label_N: Labels, mapping: tuple[int, ...], rate: float, generator: np.random.Generator
) -> Labels:
    """Labels of which round(rate·n) of each class c's n train samples' become mapping[c] (Patrini et al., CVPR 2017).

    All of these are wrong, but for a class that is mapped to itself.
    """
    noisy_N = label_N.copy()
    for label, members in enumerate(by_class(train, label_N, len(mapping))):
        noisy_N[generator.permutation(members)[: round(rate * len(members))]] = mapping[label]
    return noisy_N


def by_class(ids: Ids, label_N: Labels, classes: int) -> list[Ids]:
    """The ids of each class, each in the order in which they came."""
    grouped = ids[np.argsort(label_N[ids], kind="stable")]
    return np.split(grouped, np.searchsorted(label_N[grouped], np.arange(1, classes)))

"""Fixed augmentation policies: which operations, at which strengths, a training picture gets after its window.

A policy draws; it never touches a pixel. What it draws for a picture is a pure function of the picture's random stream
(`order.stream`): K operations, done one after another, each with a strength in physical units, and maybe a rectangle
that is erased. `dali_operations` and `torchvision_operations` do what was drawn.

Strengths: shears are slopes, translations whole pixels, rotations degrees; of brightness, color, contrast and sharpness
the factor less 1; posterize keeps so many bits; solarize inverts from this value on. The others have none.

Shapes: B pictures, K operations each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from autodo_dist.errors import AutodoError
from autodo_dist.operations import OPERATIONS

PAPERS = {"autoaugment_imagenet": "imagenet", "autoaugment_cifar10": "cifar10", "autoaugment_svhn": "svhn"}
LEVELS = 9  # AutoAugment's strengths are the levels 0 to 9 of an operation's range
BINS = 30  # those of RandAugment and TrivialAugment are 0 to 30

Step = tuple[str, float, float | None]  # an operation, its probability and its level
SubPolicies = Sequence[Sequence[Step]]
Rectangle = tuple[int, int, int, int]  # top, left, height and width, pixels


@dataclass(frozen=True)
class Range:
    """An operation's strength at no level and at full level; one that is `signed` goes either way, at random."""

    low: float
    high: float
    signed: bool = False
    whole: Callable[[float], int] | None = None

    def at(self, share: float) -> float:
        """The strength at this share of the way from `low` to `high`."""
        strength = self.low + share * (self.high - self.low)
        return strength if self.whole is None else self.whole(strength)


Ranges = Mapping[str, Range]
NONE = Range(0.0, 0.0)


@dataclass(frozen=True)
class Drawn:
    """What is done to B pictures: indices into OPERATIONS with their strengths, and the rectangles that are erased, as
    top, left, height and width in pixels; one of height 0 is none.
    """

    operation_BK: npt.NDArray[np.int32]
    strength_BK: npt.NDArray[np.float32]
    erased_B4: npt.NDArray[np.int32]

    def only(self, keep_B: npt.NDArray[np.bool_]) -> Drawn:
        """Those for which `keep_B` is true."""
        return Drawn(self.operation_BK[keep_B], self.strength_BK[keep_B], self.erased_B4[keep_B])


class Choice(Protocol):
    """Chooses the operations of a picture: at most `operations`, as pairs of operation and strength."""

    @property
    def operations(self) -> int: ...

    def draw(self, stream: np.random.Generator) -> list[tuple[str, float]]: ...


@dataclass(frozen=True)
class Independent:
    """So many operations, each any of those in `ranges` alike, whichever the others are; `share` draws how strong."""

    operations: int
    ranges: Ranges
    share: Callable[[np.random.Generator], float]

    def draw(self, stream: np.random.Generator) -> list[tuple[str, float]]:
        """See Choice."""
        names = tuple(self.ranges)
        chosen = [names[index] for index in stream.integers(len(names), size=self.operations)]
        return [(name, _signed(self.ranges[name], self.share(stream), stream)) for name in chosen]


@dataclass(frozen=True)
class OneOf:
    """One of the sub-policies, all alike; each of its steps is done with its probability."""

    sub_policies: SubPolicies
    ranges: Ranges

    @property
    def operations(self) -> int:
        """Steps of the longest sub-policy."""
        return max(len(steps) for steps in self.sub_policies)

    def draw(self, stream: np.random.Generator) -> list[tuple[str, float]]:
        """See Choice."""
        steps = self.sub_policies[int(stream.integers(len(self.sub_policies)))]
        return [
            (name, _signed(self.ranges[name], (level or 0) / LEVELS, stream))
            for name, probability, level in steps
            if stream.random() < probability
        ]


@dataclass(frozen=True)
class Erase:
    """A rectangle of a picture of so many pixels a side, with this probability.

    cutout: a square of `area`, a share of the picture's, whose centre is any pixel; it is cut off at the border
    (DeVries and Taylor 2017). random: an area from 0.02 to `area`, sides in a ratio log-uniform in [0.3, 1/0.3], wholly
    inside; ten tries, then none (Zhong et al. 2017).
    """

    kind: Literal["cutout", "random"]
    area: float
    probability: float
    image_size: int

    def draw(self, stream: np.random.Generator) -> Rectangle:
        """The rectangle of a picture."""
        if stream.random() >= self.probability:
            return 0, 0, 0, 0
        return self._square(stream) if self.kind == "cutout" else self._inside(stream)

    def _square(self, stream: np.random.Generator) -> Rectangle:
        size, side = self.image_size, round(math.sqrt(self.area) * self.image_size)
        corner = stream.integers(size, size=2) - side // 2
        (top, left), (bottom, right) = corner.clip(0).tolist(), (corner + side).clip(max=size).tolist()
        return top, left, bottom - top, right - left

    def _inside(self, stream: np.random.Generator) -> Rectangle:
        size, smallest = self.image_size, min(0.02, self.area)
        for _ in range(10):
            area, ratio = stream.uniform(smallest, self.area), math.exp(stream.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(size * math.sqrt(area * ratio)), round(size * math.sqrt(area / ratio))
            if 0 < height <= size and 0 < width <= size:
                return int(stream.integers(size - height + 1)), int(stream.integers(size - width + 1)), height, width
        return 0, 0, 0, 0


@dataclass(frozen=True)
class Policy:
    """What training pictures get after their window: operations, then an erased rectangle; None: not that."""

    choice: Choice | None
    erase: Erase | None

    @property
    def operations(self) -> int:
        """K, the most operations that a picture gets."""
        return 0 if self.choice is None else self.choice.operations

    def draw(self, streams: Sequence[np.random.Generator]) -> Drawn:
        """Draw for as many pictures as there are streams, each from its own."""
        operation_BK = np.zeros((len(streams), self.operations), np.int32)  # 0: identity
        strength_BK = np.zeros((len(streams), self.operations), np.float32)
        erased_B4 = np.zeros((len(streams), 4), np.int32)
        for picture, stream in enumerate(streams):
            for at, (name, strength) in enumerate(self.choice.draw(stream) if self.choice else ()):
                operation_BK[picture, at], strength_BK[picture, at] = OPERATIONS.index(name), strength
            if self.erase:
                erased_B4[picture] = self.erase.draw(stream)
        return Drawn(operation_BK, strength_BK, erased_B4)


def make_choice(name: str, operations: int, strength: int, sub_policies: SubPolicies, image_size: int) -> Choice | None:
    """The choice that `data.policy` names; the other arguments are the settings beside it (config.Data).

    AutodoError if a sub-policy has no level where its operation needs one.
    """
    ranges = autoaugment_ranges(image_size)
    if name == "none":
        return None
    if name == "randaugment":
        all_but_invert = {name: each for name, each in ranges.items() if name != "invert"}
        return Independent(operations, all_but_invert, lambda stream: strength / BINS)
    if name == "trivialaugment":
        return Independent(1, trivialaugment_ranges(image_size), lambda stream: stream.integers(BINS + 1) / BINS)
    if name == "random_subset":
        return Independent(operations, SUBSET, lambda stream: stream.random() * strength / BINS)
    if name == "custom":
        check_levels(sub_policies, ranges)
        return OneOf(sub_policies, ranges)
    return OneOf(published(PAPERS[name]), ranges)


def make_erase(
    kind: Literal["none", "cutout", "random"], area: float | None, probability: float | None, image_size: int
) -> Erase | None:
    """The erasing that `data.erase` names. None for area or probability: Cutout's on CIFAR-10 (a quarter, always), and
    torchvision's for random erasing (to 0.33, half of the pictures).
    """
    if kind == "none":
        return None
    usual = (0.25, 1.0) if kind == "cutout" else (0.33, 0.5)
    area, probability = (
        given if given is not None else own for given, own in zip((area, probability), usual, strict=True)
    )
    return Erase(kind, area, probability, image_size)


def autoaugment_ranges(image_size: int) -> Ranges:
    """Strengths of AutoAugment (Cubuk et al. 2019, table 6) and RandAugment, for all operations.

    The paper's translations are up to 150 of 331 pixels; the same share is taken here.
    """
    return _ranges(shear=0.3, shift=150 / 331 * image_size, angle=30.0, factor=0.9, bits=4)


def trivialaugment_ranges(image_size: int) -> Ranges:
    """Strengths of TrivialAugment (Müller and Hutter 2021, the wide space), without invert.

    Translations are up to 32 pixels whatever the picture's size, as in the paper, but never more than its side.
    """
    wide = _ranges(shear=0.99, shift=min(32.0, image_size), angle=135.0, factor=0.99, bits=2)
    return {name: each for name, each in wide.items() if name != "invert"}


# AutoDO's own code: the part of its RandAugment that the learnt warp does not do, with factors from 0.1 up to 1.9.
SUBSET: Ranges = {
    "identity": NONE,
    "auto_contrast": NONE,
    "equalize": NONE,
    "invert": NONE,
    "color": Range(-0.9, 0.9),
    "sharpness": Range(-0.9, 0.9),
}


def published(data: str) -> SubPolicies:
    """The 25 sub-policies that AutoAugment's paper found on a data set, from torchvision's tables."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    return [
        [(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), probability, level) for name, probability, level in steps]
        for steps in AutoAugment(AutoAugmentPolicy(data)).policies
    ]


def check_levels(sub_policies: SubPolicies, ranges: Ranges) -> None:
    """AutodoError if a step has no level and its operation needs one."""
    for number, steps in enumerate(sub_policies):
        for at, (name, _, level) in enumerate(steps):
            if level is None and ranges[name] != NONE:
                raise AutodoError(
                    f"data.sub_policies.{number}.{at}: {name} has no level; give it one from 0 to {LEVELS}"
                )


def _ranges(shear: float, shift: float, angle: float, factor: float, bits: int) -> Ranges:
    slope, pixels = Range(0.0, shear, signed=True), Range(0.0, shift, signed=True, whole=math.trunc)
    enhance = Range(0.0, factor, signed=True)
    strengths = (
        NONE,
        *(slope, slope, pixels, pixels, Range(0.0, angle, signed=True)),
        *(enhance, enhance, enhance, enhance),
        *(Range(8, bits, whole=round), Range(255.0, 0.0)),
        *(NONE, NONE, NONE),
    )
    return dict(zip(OPERATIONS, strengths, strict=True))


def _signed(each: Range, share: float, stream: np.random.Generator) -> float:
    strength = each.at(share)
    return -strength if each.signed and stream.random() < 0.5 else strength

"""Which ids make a global batch and how each picture is cropped: pure functions, the same on any number of ranks.

Randomness is counter-based (Philox, Salmon et al. 2011): the key is (seed, epoch and pass), the counter is the id. A
sample thus looks the same on whichever rank it lands, and a loader can start anywhere without replaying what came
before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Pass = Literal["task", "hyper", "validation", "evaluation"]
PASSES: tuple[Pass, ...] = ("task", "hyper", "validation", "evaluation")
_ORDER = 2**64 - 1  # the counter that no id uses: it draws the order itself


@dataclass(frozen=True)
class Window:
    """The part of a picture that becomes the model's input, in shares of its height and width; may reach outside."""

    top: float
    left: float
    height: float
    width: float
    flip: bool


@dataclass(frozen=True)
class Crop:
    """How windows are drawn; the fields are those of `config.Data`."""

    kind: Literal["resized", "padded", "whole"]
    area: tuple[float, float]
    padding: int
    image_size: int
    evaluation: float
    flip: bool


def stream(seed: int, epoch: int, pass_: Pass, counter: int) -> np.random.Generator:
    """The random stream of one sample (counter = id) in one pass of one epoch."""
    key = np.array([seed, epoch << 8 | PASSES.index(pass_)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64)))


def shuffled(ids: Ids, seed: int, epoch: int, pass_: Pass) -> Ids:
    """The ids in the order of this pass: a uniform permutation."""
    return stream(seed, epoch, pass_, _ORDER).permutation(ids)


def present(ids: Ids, absent: Sequence[Ids], epoch: int) -> Ids:
    """The ids of an epoch, sorted: without those of `absent` whose turn it is, one after another."""
    return np.setdiff1d(ids, left_out(absent, epoch), assume_unique=True) if absent else ids


def left_out(absent: Sequence[Ids], epoch: int) -> Ids:
    """The ids whose turn it is to be absent from an epoch."""
    return absent[epoch % len(absent)]


def fewest(ids: Ids, absent: Sequence[Ids]) -> int:
    """How many ids every epoch has at least."""
    return len(ids) - max((len(some) for some in absent), default=0)


def steps_per_pass(samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Global batches in a pass; the same on every rank."""
    return samples // batch_size if drop_last else math.ceil(samples / batch_size)


def local_ids(ids: Ids, batch_size: int, step: int, rank: int, ranks: int) -> Ids:
    """This rank's part of global batch `step` of the ordered ids.

    The batch is cut into `ranks` consecutive pieces whose lengths differ by at most one, the longer ones first; a
    piece may be empty. Joined in the order of ranks they are the global batch, whatever `ranks` is.
    """
    batch = ids[step * batch_size : (step + 1) * batch_size]
    piece, longer = divmod(len(batch), ranks)
    start = rank * piece + min(rank, longer)
    return batch[start : start + piece + (rank < longer)]


def training_window(generator: np.random.Generator, height: int, width: int, crop: Crop) -> Window:
    """Draw the window of a picture of height × width pixels.

    resized: an area share from crop.area and an aspect ratio log-uniform in [3/4, 4/3], ten tries, then the largest
    centred window within those ratios (Inception's crop, Szegedy et al. 2015). padded: a shift by up to crop.padding
    pixels of the input over a zero border, rounded to whole pixels of the picture.
    """
    flip = bool(generator.random() < 0.5) and crop.flip
    if crop.kind == "padded":
        down, right = generator.integers(-crop.padding, crop.padding + 1, size=2).tolist()
        # Whole pixels of the picture: DALI rounds both ends of a window, and half a pixel would make it one larger.
        top, left = round(down * height / crop.image_size) / height, round(right * width / crop.image_size) / width
        return Window(top, left, 1.0, 1.0, flip)
    if crop.kind == "whole":
        return Window(0.0, 0.0, 1.0, 1.0, flip)
    for _ in range(10):
        area = height * width * generator.uniform(*crop.area)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = generator.integers(height - h + 1), generator.integers(width - w + 1)
            return Window(top / height, left / width, h / height, w / width, flip)
    return _centred(height, width, min(height, width / (3 / 4)), min(width, height * (4 / 3)), flip)


def evaluation_window(height: int, width: int, crop: Crop) -> Window:
    """The fixed window of evaluation: a centred square for crop.kind resized, else the whole picture."""
    if crop.kind != "resized":
        return Window(0.0, 0.0, 1.0, 1.0, False)
    side = crop.evaluation * min(height, width)
    return _centred(height, width, side, side, False)


def _centred(height: int, width: int, h: float, w: float, flip: bool) -> Window:
    h, w = h / height, w / width
    return Window((1 - h) / 2, (1 - w) / 2, h, w, flip)

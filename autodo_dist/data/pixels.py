"""From encoded pictures to the model's input: the words that both ways of doing it (DALI, torchvision) share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from autodo_dist.data.order import Crop
from autodo_dist.data.policies import Drawn
from autodo_dist.data.shards import Encoded


@dataclass(frozen=True)
class Pictures:
    """B encoded pictures and what was drawn for each: its window (top and left, height and width, in shares of the
    picture's), whether it is mirrored, and what a policy does to it (None: there is no policy).
    """

    encoded: list[Encoded]
    origin_B2: npt.NDArray[np.float32]
    size_B2: npt.NDArray[np.float32]
    flip_B: npt.NDArray[np.int32]
    drawn: Drawn | None = None

    def __len__(self) -> int:
        return len(self.encoded)

    def only(self, keep_B: npt.NDArray[np.bool_]) -> Pictures:
        """Those for which `keep_B` is true."""
        encoded = [picture for picture, keep in zip(self.encoded, keep_B, strict=True) if keep]
        drawn = None if self.drawn is None else self.drawn.only(keep_B)
        return Pictures(encoded, self.origin_B2[keep_B], self.size_B2[keep_B], self.flip_B[keep_B], drawn)


@dataclass(frozen=True)
class Finish:
    """Crop's kind and the side of the square input, and the mean and standard deviation of RGB in 0..1 that become 0
    and 1; with a policy, the number of its operations and whether it erases.

    What is erased becomes 0, the mean.
    """

    crop: Crop
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    operations: int = 0
    erases: bool = False


class Pixels(Protocol):
    """Decodes, cuts windows out, resizes, mirrors, does a policy's operations, normalises and erases. May fail as a
    whole, and is then asked for each picture's fault.
    """

    def decode(self, pictures: Pictures) -> torch.Tensor:
        """The model's input, B × 3 × S × S float32. DecodeError if a picture does not decode."""

    def fault(self, encoded: Encoded) -> str | None:
        """Why this picture does not decode; None: it does."""

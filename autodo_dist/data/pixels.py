"""From encoded pictures to the model's input: the words that both ways of doing it (DALI, torchvision) share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from autodo_dist.data.order import Crop
from autodo_dist.data.shards import Encoded


@dataclass(frozen=True)
class Pictures:
    """B encoded pictures and what was drawn for each: its window (top and left, height and width, in shares of the
    picture's) and whether it is mirrored.
    """

    encoded: list[Encoded]
    origin_B2: npt.NDArray[np.float32]
    size_B2: npt.NDArray[np.float32]
    flip_B: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.encoded)

    def only(self, keep_B: npt.NDArray[np.bool_]) -> Pictures:
        """Those for which `keep_B` is true."""
        encoded = [picture for picture, keep in zip(self.encoded, keep_B, strict=True) if keep]
        return Pictures(encoded, self.origin_B2[keep_B], self.size_B2[keep_B], self.flip_B[keep_B])


@dataclass(frozen=True)
class Finish:
    """Crop's kind and the side of the square input, and the mean and standard deviation of RGB in 0..1 that become 0
    and 1.
    """

    crop: Crop
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Pixels(Protocol):
    """Decodes, cuts windows out, resizes, mirrors and normalises. May fail as a whole, and is then asked for each
    picture's fault.
    """

    def decode(self, pictures: Pictures) -> torch.Tensor:
        """The model's input, B × 3 × S × S float32. DecodeError if a picture does not decode."""

    def fault(self, encoded: Encoded) -> str | None:
        """Why this picture does not decode; None: it does."""

"""A policy's operations in torchvision: geometry takes the nearest pixel, and outside of the picture is black."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import functional as F

from autodo_dist.operations import OPERATIONS


def apply(image: torch.Tensor, operation_K: npt.NDArray[np.int32], strength_K: npt.NDArray[np.float32]) -> torch.Tensor:
    """A picture (3 × H × W, uint8) under the operations with these indices in OPERATIONS, one after another."""
    for index, strength in zip(operation_K.tolist(), strength_K.tolist(), strict=True):
        image = _DO[OPERATIONS[index]](image, strength)
    return image


def _affine(image: torch.Tensor, shift: list[float], slope: list[float]) -> torch.Tensor:
    """Shears have their origin in the picture's upper left corner, as in PIL."""
    shear = [math.degrees(math.atan(each)) for each in slope]
    done: torch.Tensor = F.affine(image, 0.0, shift, 1.0, shear, center=[0.0, 0.0])
    return done


_DO: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "identity": lambda image, _: image,
    "shear_x": lambda image, strength: _affine(image, [0.0, 0.0], [strength, 0.0]),
    "shear_y": lambda image, strength: _affine(image, [0.0, 0.0], [0.0, strength]),
    "translate_x": lambda image, strength: _affine(image, [strength, 0.0], [0.0, 0.0]),
    "translate_y": lambda image, strength: _affine(image, [0.0, strength], [0.0, 0.0]),
    "rotate": lambda image, strength: F.rotate(image, strength),
    "brightness": lambda image, strength: F.adjust_brightness(image, 1 + strength),
    "color": lambda image, strength: F.adjust_saturation(image, 1 + strength),
    "contrast": lambda image, strength: F.adjust_contrast(image, 1 + strength),
    "sharpness": lambda image, strength: F.adjust_sharpness(image, 1 + strength),
    "posterize": lambda image, strength: F.posterize(image, int(strength)),
    "solarize": lambda image, strength: F.solarize(image, strength),
    "auto_contrast": lambda image, _: F.autocontrast(image),
    "equalize": lambda image, _: F.equalize(image),
    "invert": lambda image, _: F.invert(image),
}

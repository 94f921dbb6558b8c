"""A policy's operations in DALI: each picture of a batch gets its own, by conditional execution.

The arithmetic is DALI's (`fn`, and where it takes more than one step `nvidia.dali.auto_aug.augmentations`); strengths
come from outside. Geometry takes the nearest pixel, and outside of the picture is black.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug import augmentations, core

from autodo_dist.operations import OPERATIONS

GEOMETRY = {"interp_type": types.INTERP_NN, "fill_value": 0}
SAME = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH


def apply(images: Any, operation: Any, strength: Any) -> Any:
    """Pictures (H × W × C, uint8) under the operation with this index in OPERATIONS, each at its strength.

    For pipelines with `enable_conditionals`. Operation and strength are batches of scalars on the CPU.
    """
    return core.select([_DO[name] for name in OPERATIONS], operation, images, strength)


def _identity(images: Any, strength: Any) -> Any:
    return images


def _shear_x(images: Any, strength: Any) -> Any:
    return fn.warp_affine(images, matrix=fn.transforms.shear(shear=fn.stack(strength, 0.0 * strength)), **GEOMETRY)


def _shear_y(images: Any, strength: Any) -> Any:
    return fn.warp_affine(images, matrix=fn.transforms.shear(shear=fn.stack(0.0 * strength, strength)), **GEOMETRY)


def _translate_x(images: Any, strength: Any) -> Any:
    shift = fn.transforms.translation(offset=fn.stack(-strength, 0.0 * strength))
    return fn.warp_affine(images, matrix=shift, **GEOMETRY)


def _translate_y(images: Any, strength: Any) -> Any:
    shift = fn.transforms.translation(offset=fn.stack(0.0 * strength, -strength))
    return fn.warp_affine(images, matrix=shift, **GEOMETRY)


def _rotate(images: Any, strength: Any) -> Any:
    return fn.rotate(images, angle=strength, keep_size=True, **GEOMETRY)


def _brightness(images: Any, strength: Any) -> Any:
    return fn.brightness(images, brightness=1.0 + strength)


def _color(images: Any, strength: Any) -> Any:
    return fn.saturation(images, saturation=1.0 + strength)


def _contrast(images: Any, strength: Any) -> Any:
    return augmentations.contrast.op(images, 1.0 + _beside(images, strength))


def _sharpness(images: Any, strength: Any) -> Any:
    return fn.filter(images, _beside(images, types.Constant(SAME) + strength * types.Constant(SAME - SMOOTH)))


def _posterize(images: Any, strength: Any) -> Any:
    return images & _beside(images, fn.cast(256.0 - math.pow(2.0, 8.0 - strength), dtype=types.UINT8))


def _solarize(images: Any, strength: Any) -> Any:
    return augmentations.solarize.op(images, _beside(images, strength))


def _auto_contrast(images: Any, strength: Any) -> Any:
    return augmentations.auto_contrast.op(images, None)


def _equalize(images: Any, strength: Any) -> Any:
    return fn.equalize(images)


def _invert(images: Any, strength: Any) -> Any:
    return augmentations.invert.op(images, None)


_DO = {
    "identity": _identity,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
}


def _beside(images: Any, parameter: Any) -> Any:
    """A parameter that is computed with the pictures has to lie where they do."""
    return parameter.gpu() if images.device == "gpu" else parameter

"""What a fixed augmentation policy can do to a picture: the words of the settings and of the loader."""

from __future__ import annotations

from typing import Literal, get_args

Operation = Literal[
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
    "invert",
]
OPERATIONS: tuple[str, ...] = get_args(Operation)  # a drawn operation is an index of it

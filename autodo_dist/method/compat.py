"""The original code's warp, so that a reproduction can be told from an improvement (`compat: autodo2021`).

Facts taken from the authors' code (github.com/gudovskiy/autodo at 93c9d37, custom_models/automodels.py) and kornia
0.4.1, on which it stands: the matrix is made for pictures of H × W pixels and applied, on small pictures, to ones
that were enlarged four times, so that rotation and scale turn about a point near the upper left corner and translation
moves by a quarter; pixel positions are normalised by (size − 1)/2 and then sampled as if by size/2, so that a picture
changes even where nothing is asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SMALL, ENLARGED = 224, 4  # the original enlarges the pictures of every data set but ImageNet


def warp(images_BCHW: torch.Tensor, strengths_B7: torch.Tensor) -> torch.Tensor:
    """Pictures under the original's map; strengths as in `warp.strengths`, in the order of `warp.AFFINE`."""
    height, width = images_BCHW.shape[2:]
    factor = ENLARGED if max(height, width) < SMALL else 1
    large = _resize(images_BCHW, (factor * height, factor * width)) if factor > 1 else images_BCHW
    grid = _grid(_pixel_map(strengths_B7, height, width), *large.shape[2:])
    moved = F.grid_sample(large, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _resize(moved, (height, width)) if factor > 1 else moved


def resample(images_BCHW: torch.Tensor) -> torch.Tensor:
    """What the original does to pictures of the train and validation part that it does not augment."""
    if max(images_BCHW.shape[2:]) >= SMALL:
        return images_BCHW
    return warp(images_BCHW, images_BCHW.new_zeros(len(images_BCHW), 7))


def _pixel_map(strengths_B7: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Shear · translation · rotation with scale about (W//2, H//2): B × 3 × 3, from input to output pixels (x, y)."""
    angle, right, down, shear_x, shear_y, scale_x, scale_y = strengths_B7.unbind(1)
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    x, y = width // 2, height // 2
    cos_x, sin_y = angle.cos() * (1 + scale_x), angle.sin() * (1 + scale_y)
    sin_x, cos_y = angle.sin() * (1 + scale_x), angle.cos() * (1 + scale_y)
    # kornia 0.4.1 takes the offset as if both scales were the first row's.
    rotate = _matrix(
        [cos_x, sin_y, (1 - cos_x) * x - sin_y * y], [-sin_x, cos_y, sin_y * x + (1 - cos_x) * y], [zero, zero, one]
    )
    shift = _matrix([one, zero, width * right], [zero, one, height * down], [zero, zero, one])
    shear = _matrix([one, shear_x, zero], [shear_y, one, zero], [zero, zero, one])
    return shear @ shift @ rotate


def _grid(pixel_map_B33: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where each output pixel is read, in grid_sample's coordinates: B × H × W × 2."""
    like = pixel_map_B33
    rows, columns = (torch.linspace(-1, 1, side, dtype=like.dtype, device=like.device) for side in (height, width))
    at = torch.stack(torch.broadcast_tensors(columns[None, :], rows[:, None], like.new_ones(())), -1)
    half = like.new_tensor([(width - 1) / 2, (height - 1) / 2, 1.0])
    pixels = like.new_tensor([[half[0], 0, half[0]], [0, half[1], half[1]], [0, 0, 1]])
    back = torch.linalg.inv(torch.linalg.inv(pixels) @ pixel_map_B33 @ pixels)
    grid: torch.Tensor = (at.reshape(1, -1, 3) @ back.mT).view(len(like), height, width, 3)[..., :2]
    return grid


def _matrix(*rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _resize(images_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(images_BCHW, size=size, mode="bilinear", align_corners=False)

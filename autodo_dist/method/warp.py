"""λ^A: operations with learnt gates and magnitudes: seven affine ones in one differentiable warp, three on colour.

Per sample and operation k: a gate b_k, 1 with probability sigmoid(λ^Ab_k), drawn by the straight-through Gumbel-softmax
at temperature 1 (Jang et al. 2017), and a magnitude m_k = sigmoid(λ^Am_k)·N(0, 1)·range_k. The operation has strength
b_k·m_k. The affine ones make one matrix about the picture's centre, and the picture is sampled once. The randomness is
an argument: uniform numbers that the data stream draws from (seed, epoch, pass, id).

Shapes: B samples, K operations (the affine ones, or these and those on colour), pictures C × H × W.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

AFFINE = ("rotate", "translate_x", "translate_y", "shear_x", "shear_y", "scale_x", "scale_y")
COLOR = ("brightness", "contrast", "saturation")
# Radians; shares of width and height; slopes; natural logarithms of the factor, for colour too.
RANGES = (math.radians(30.0), 0.45, 0.45, 0.30, 0.30, 0.50, 0.50, 0.50, 0.50, 0.50)
START_PROBABILITY = 0.2  # 1/(K - 2) for the paper's seven operations
START_MAGNITUDE = 0.5
GREY = (0.2989, 0.587, 0.114)  # of R, G, B: ITU-R BT.601, with torchvision's digits


def start_logits() -> tuple[float, float]:
    """Start values of a gate logit and a magnitude logit."""
    return _logit(START_PROBABILITY), _logit(START_MAGNITUDE)


def strengths(gate_logit_BK: torch.Tensor, magnitude_logit_BK: torch.Tensor, draws_BD: torch.Tensor) -> torch.Tensor:
    """Strengths b_k·m_k (B × K) from uniform draws in (0, 1), D = 2K: the gates' noise first, then the magnitudes'.

    The gate's value is the hard 0 or 1, its derivative that of sigmoid(λ^Ab + logistic noise), the two-class
    Gumbel-softmax.
    """
    gate_draw, magnitude_draw = _open_interval(draws_BD.to(gate_logit_BK.dtype)).chunk(2, dim=1)
    soft = torch.sigmoid(gate_logit_BK + torch.logit(gate_draw))
    gate = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
    normal = math.sqrt(2) * torch.erfinv(2 * magnitude_draw - 1)
    ranges = gate_logit_BK.new_tensor(RANGES[: gate_logit_BK.shape[1]])
    return gate * torch.sigmoid(magnitude_logit_BK) * normal * ranges


def augment(
    images_BCHW: torch.Tensor, strengths_BK: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Pictures, normalised by (x − mean)/std per channel, under the operations that have strengths. 0: unchanged."""
    affine_BK, color_BK = strengths_BK.split([len(AFFINE), strengths_BK.shape[1] - len(AFFINE)], 1)
    images_BCHW = warp(images_BCHW, affine_BK)
    return color(images_BCHW, color_BK, mean, std) if color_BK.shape[1] else images_BCHW


def color(
    images_BCHW: torch.Tensor, strengths_B3: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Brightness, then contrast, then saturation, each by the factor f = exp(strength), on RGB in 0..1.

    f·x; f·x + (1 − f)·(mean grey of the picture); f·x + (1 − f)·(grey of the pixel). Nothing is cut off at 0 and 1, so
    that derivatives exist everywhere.
    """
    mean_C11, std_C11, grey_C11 = (images_BCHW.new_tensor(values)[:, None, None] for values in (mean, std, GREY))
    bright, contrast, saturation = strengths_B3.exp()[:, :, None, None, None].unbind(1)
    pixels = (images_BCHW * std_C11 + mean_C11) * bright
    pixels = contrast * pixels + (1 - contrast) * (pixels * grey_C11).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pixels = saturation * pixels + (1 - saturation) * (pixels * grey_C11).sum(1, keepdim=True)
    return (pixels - mean_C11) / std_C11


def matrix(strengths_B7: torch.Tensor) -> torch.Tensor:
    """The B × 2 × 3 map from output to input coordinates, both in [-1, 1]: translate · rotate · shear · scale."""
    angle, right, down, shear_x, shear_y, log_x, log_y = strengths_B7.unbind(1)
    cos, sin, one = angle.cos(), angle.sin(), torch.ones_like(angle)
    rotate = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shear = torch.stack([torch.stack([one, shear_x], 1), torch.stack([shear_y, one], 1)], 1)
    scale = torch.diag_embed(torch.stack([log_x.exp(), log_y.exp()], 1))
    shift = 2 * torch.stack([right, down], 1)  # a picture is 2 wide in these coordinates
    return torch.cat([rotate @ shear @ scale, shift[:, :, None]], 2)


def warp(images_BCHW: torch.Tensor, strengths_B7: torch.Tensor) -> torch.Tensor:
    """Warp pictures by their affine strengths, bilinearly; outside the picture its border goes on. 0: unchanged."""
    # Not F.affine_grid, which refuses the empty part of a batch that a rank may have.
    grid = torch.affine_grid_generator(matrix(strengths_B7), list(images_BCHW.shape), False)
    return F.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _open_interval(draws: torch.Tensor) -> torch.Tensor:
    """Keep uniform draws off 0 and 1, where noise would be infinite."""
    tiny = torch.finfo(torch.float32).eps
    return draws.clamp(tiny, 1 - tiny)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))

"""λ^A: seven affine operations with learnt gates and magnitudes, composed into one differentiable warp.

Per sample and operation k: a gate b_k, 1 with probability sigmoid(λ^Ab_k), drawn by the straight-through Gumbel-softmax
at temperature 1 (Jang et al. 2017), and a magnitude m_k = sigmoid(λ^Am_k)·N(0, 1)·range_k. The operation has strength
b_k·m_k. All seven make one matrix about the picture's centre, and the picture is sampled once. The randomness is an
argument: uniform numbers that the data stream draws from (seed, epoch, pass, id).

Shapes: B samples, K = 7 operations, pictures C × H × W.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

OPERATIONS = ("rotate", "translate_x", "translate_y", "shear_x", "shear_y", "scale_x", "scale_y")
K = len(OPERATIONS)
# Radians; shares of width and height; slopes; natural logarithms of the factor.
RANGES = (math.radians(30.0), 0.45, 0.45, 0.30, 0.30, 0.50, 0.50)
START_PROBABILITY = 1 / (K - 2)
START_MAGNITUDE = 0.5
DRAWS = 2 * K  # uniform numbers per sample


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
    return gate * torch.sigmoid(magnitude_logit_BK) * normal * gate_logit_BK.new_tensor(RANGES)


def matrix(strengths_BK: torch.Tensor) -> torch.Tensor:
    """The B × 2 × 3 map from output to input coordinates, both in [-1, 1]: translate · rotate · shear · scale."""
    angle, right, down, shear_x, shear_y, log_x, log_y = strengths_BK.unbind(1)
    cos, sin, one = angle.cos(), angle.sin(), torch.ones_like(angle)
    rotate = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shear = torch.stack([torch.stack([one, shear_x], 1), torch.stack([shear_y, one], 1)], 1)
    scale = torch.diag_embed(torch.stack([log_x.exp(), log_y.exp()], 1))
    shift = 2 * torch.stack([right, down], 1)  # a picture is 2 wide in these coordinates
    return torch.cat([rotate @ shear @ scale, shift[:, :, None]], 2)


def warp(images_BCHW: torch.Tensor, strengths_BK: torch.Tensor) -> torch.Tensor:
    """Warp pictures by their strengths, bilinearly; outside the picture its border goes on. Strengths 0: unchanged."""
    # Not F.affine_grid, which refuses the empty part of a batch that a rank may have.
    grid = torch.affine_grid_generator(matrix(strengths_BK), list(images_BCHW.shape), False)
    return F.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _open_interval(draws: torch.Tensor) -> torch.Tensor:
    """Keep uniform draws off 0 and 1, where noise would be infinite."""
    tiny = torch.finfo(torch.float32).eps
    return draws.clamp(tiny, 1 - tiny)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))

"""H⁻¹g_v at the last linear layer, θ = (W, b) as one C × (D + 1) matrix, the bias in the last column.

For a direction V: ζ_i = V h_i, (HV) = Σ c_i (A_iζ_i) h_iᵀ, features h with a last column of ones. Two matrix products.
Neumann series, conjugate gradients and power iterations know a vector only by sums, multiples, products with H and
inner products, and so run in either of two spaces (`Space`): in θ itself, or in sample space, where every iterate is
a·g_v + Yᵀh with Y of B × C. The numbers are the same. Sums over ranks come in as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Solver = Literal["identity", "neumann", "cg", "fisher"]
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Space:
    """Where a solver iterates. Its vectors are tensors of one shape, added and scaled like any others.

    start: g_v. product: v -> Hv. dot: the inner product of θ-space. direction: v as a direction in θ, C × (D + 1).
    """

    start: torch.Tensor
    product: Product
    dot: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    direction: Product


def identity_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over ranks where there is one rank."""
    return value


def parameter_space(
    features_BD: torch.Tensor,
    coefficient_B: torch.Tensor,
    curve: Callable[[torch.Tensor], torch.Tensor],
    valid_grad_CD: torch.Tensor,
    all_sum: Product = identity_sum,
) -> Space:
    """θ itself, for the loss Σ c_i l_i over all ranks: 4·B·C·D operations a product, and a sum over ranks of C × D.

    features_BD: this rank's features with a last column of ones; coefficient_B: its c_i = w_i / (global batch);
    curve: ζ_BC -> A_iζ_i (see losses.curvature); all_sum: sum over ranks.
    """

    def product(direction_CD: torch.Tensor) -> torch.Tensor:
        zeta_BC = features_BD @ direction_CD.T
        return all_sum((coefficient_B[:, None] * curve(zeta_BC)).T @ features_BD)

    return Space(valid_grad_CD, product, lambda v, w: (v * w).sum(), lambda v: v)


def sample_space(
    features_BD: torch.Tensor,
    coefficient_B: torch.Tensor,
    curve: Callable[[torch.Tensor], torch.Tensor],
    valid_grad_CD: torch.Tensor,
) -> Space:
    """The span of g_v and the samples' gradients: 2·B²·C operations a product, and no sums; cheaper where B < 2D.

    Arguments as for `parameter_space`, but of every sample that H is made of, those of other ranks included. A vector
    v = a·g_v + Yᵀh is kept as (a, Y, ζ) with its logits ζ = h vᵀ beside it, so that an inner product costs no product.
    """
    gram_BB, valid_zeta_BC = features_BD @ features_BD.T, features_BD @ valid_grad_CD.T
    valid_norm = valid_grad_CD.square().sum()

    def pack(scale: torch.Tensor, y_BC: torch.Tensor, zeta_BC: torch.Tensor) -> torch.Tensor:
        return torch.cat([scale.reshape(1), y_BC.flatten(), zeta_BC.flatten()])

    def unpack(vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y_BC, zeta_BC = vector[1:].view(2, *valid_zeta_BC.shape)
        return vector[0], y_BC, zeta_BC

    def product(vector: torch.Tensor) -> torch.Tensor:
        y_BC = coefficient_B[:, None] * curve(unpack(vector)[2])
        return pack(torch.zeros_like(valid_norm), y_BC, gram_BB @ y_BC)

    def dot(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        (a, y_BC, _), (b, x_BC, zeta_BC) = unpack(one), unpack(two)
        return a * (b * valid_norm + (x_BC * valid_zeta_BC).sum()) + (y_BC * zeta_BC).sum()

    def direction(vector: torch.Tensor) -> torch.Tensor:
        scale, y_BC, _ = unpack(vector)
        return scale * valid_grad_CD + y_BC.T @ features_BD

    start = pack(torch.ones_like(valid_norm), torch.zeros_like(valid_zeta_BC), valid_zeta_BC)
    return Space(start, product, dot, direction)


def largest_eigenvalue(space: Space, iterations: int) -> torch.Tensor:
    """Estimate H's eigenvalue of largest magnitude by power iterations from g_v; never negative.

    ‖Hv‖ for the unit vector v that `iterations` − 1 products lead to: at most the true one, and from below.
    """
    vector, size = space.start, norm(space, space.start)
    for _ in range(iterations):
        vector = space.product(vector / size.clamp_min(torch.finfo(size.dtype).tiny))
        size = norm(space, vector)
    return size


def neumann(space: Space, step: torch.Tensor | float, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """α Σ_{j=0..T} (I − αH)^j g_v, T = `terms` products: tends to H⁻¹g_v where 0 < αμ < 2 for every eigenvalue μ.

    (Lorraine et al. 2020, algorithm 3; AutoDO sets T = 5.) Beside it the largest ‖Hv‖/‖v‖ that came up, a bound from
    below on the largest eigenvalue: where α times it is 2 or more, the series does not converge.
    """
    summand = total = space.start
    seen = torch.zeros((), dtype=total.dtype, device=total.device)
    # In sample space the norm of a summand below this share of g_v's is rounding, and says nothing.
    floor = math.sqrt(16 * torch.finfo(seen.dtype).eps) * norm(space, summand)
    for _ in range(terms):
        product = space.product(summand)
        size = torch.maximum(norm(space, summand), floor).clamp_min(torch.finfo(seen.dtype).tiny)
        ratio = norm(space, product) / size
        seen = torch.where(ratio.isfinite(), torch.maximum(seen, ratio), seen)  # a series that diverges overflows
        summand = summand - step * product
        total = total + summand
    return step * total, seen


def conjugate_gradients(space: Space, damping: float, iterations: int, tolerance: float) -> tuple[torch.Tensor, bool]:
    """(H + μI)⁻¹g_v for a positive semidefinite H, μ = `damping` (Hestenes & Stiefel 1952).

    Ends when the residual's norm is at most `tolerance` times g_v's, or after `iterations` products: whether the first.
    """
    total, residual, search = torch.zeros_like(space.start), space.start, space.start
    size = first = space.dot(residual, residual)
    for _ in range(iterations):
        if size <= tolerance**2 * first:  # true for g_v = 0 too
            return total, True
        product = space.product(search) + damping * search
        curvature = space.dot(search, product)
        if curvature <= 0:  # rounding, in sample space
            break
        along = size / curvature
        total, residual = total + along * search, residual - along * product
        size, before = space.dot(residual, residual), size
        search = residual + size / before * search
    return total, bool(size <= tolerance**2 * first)


def fisher(
    features_BD: torch.Tensor, score_BC: torch.Tensor, valid_grad_CD: torch.Tensor, damping: float, batch_size: int
) -> torch.Tensor:
    """(F + μI)⁻¹g_v for the empirical Fisher matrix F = (1/B) Σ u_i u_iᵀ, u_i = w_iδ_i ⊗ h_i, by Woodbury's identity.

    With the Gram matrix K of the u_i (B × B, from those of δ and h), t_i = u_i·g_v and k = (BμI + K)⁻¹t it is
    (g_v − Σ k_i u_i)/μ. score_BC: w_iδ_i of all `batch_size` samples. The B × B system is solved in float64, as the
    difference loses about K/(Bμ) in precision.
    """
    gram_BB = (score_BC @ score_BC.T * (features_BD @ features_BD.T)).double()
    gram_BB.diagonal().add_(batch_size * damping)
    along_B = (score_BC * (features_BD @ valid_grad_CD.T)).sum(1).double()
    factor_BB, info = torch.linalg.cholesky_ex(gram_BB)  # unlike cholesky, no error for a gradient that is not finite
    k_B = torch.cholesky_solve(along_B[:, None], factor_BB)[:, 0].to(score_BC.dtype)
    k_B = torch.where(info == 0, k_B, torch.nan)
    return (valid_grad_CD - (k_B[:, None] * score_BC).T @ features_BD) / damping


def cheaper_space(batch: int, ranks: int, classes: int, features: int, products: int) -> Literal["parameter", "sample"]:
    """The space with fewer operations a rank, for a global `batch` spread over `ranks`.

    In parameter space each rank multiplies its own samples; in sample space every rank multiplies all of them.
    """
    parameter = products * 4 * batch * classes * features / ranks
    sample = products * 2 * batch**2 * classes + 2 * batch**2 * features + 4 * batch * classes * features
    return "sample" if sample < parameter else "parameter"


def norm(space: Space, vector: torch.Tensor) -> torch.Tensor:
    """‖v‖ in θ-space; rounding may take the square below 0 in sample space."""
    return space.dot(vector, vector).clamp_min(0).sqrt()

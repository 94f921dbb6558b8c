"""H⁻¹v at the last linear layer: H = ∂²L/∂θ² for θ = (W, b), as Hessian-vector products of two matrix products each.

For a direction V = (V_W, v_b): ζ_i = V_W h_i + v_b, (HV)_W = Σ c_i (A_iζ_i) h_iᵀ, (HV)_b = Σ c_i A_iζ_i. A direction is
one C × (D + 1) tensor, the bias in the last column, and features carry a last column of ones, so (HV) = (c∘Aζ)ᵀ h.
Sums over ranks come in as an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Solver = Literal["identity", "neumann"]
Product = Callable[[torch.Tensor], torch.Tensor]


def identity_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over ranks where there is one rank."""
    return value


def hessian_product(
    features_BD: torch.Tensor,
    coefficient_B: torch.Tensor,
    curve: Callable[[torch.Tensor], torch.Tensor],
    all_sum: Callable[[torch.Tensor], torch.Tensor] = identity_sum,
) -> Product:
    """V -> HV for the loss Σ c_i l_i over all ranks.

    features_BD: this rank's features with a last column of ones; coefficient_B: its c_i = w_i / (global batch);
    curve: ζ_BC -> A_iζ_i (see losses.curvature); all_sum: sum over ranks.
    """

    def product(direction_CD: torch.Tensor) -> torch.Tensor:
        zeta_BC = features_BD @ direction_CD.T
        return all_sum((coefficient_B[:, None] * curve(zeta_BC)).T @ features_BD)

    return product


def largest_eigenvalue(product: Product, start: torch.Tensor, iterations: int) -> torch.Tensor:
    """Estimate the eigenvalue of largest magnitude by power iterations from `start`; never negative.

    ‖Hv‖ for the unit vector v that `iterations` − 1 products lead to: at most the true one, and from below.
    """
    vector = start
    size = torch.zeros((), dtype=start.dtype, device=start.device)
    for _ in range(iterations):
        vector = product(vector / vector.norm().clamp_min(torch.finfo(start.dtype).tiny))
        size = vector.norm()
    return size


def neumann(product: Product, value: torch.Tensor, step: torch.Tensor | float, terms: int) -> torch.Tensor:
    """α Σ_{j=0..T} (I − αH)^j v, T = `terms` products: tends to H⁻¹v where 0 < αμ < 2 for every eigenvalue μ.

    Lorraine et al. 2020, algorithm 3; AutoDO sets T = 5.
    """
    summand = total = value
    for _ in range(terms):
        summand = summand - step * product(summand)
        total = total + summand
    return step * total

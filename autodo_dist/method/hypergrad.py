"""The hypergradient of a validation batch with respect to the rows of a train batch, without a double backward.

By the implicit function theorem dL_v/dλ = −g_vᵀ H⁻¹ ∂²L/∂θ∂λᵀ with g_v = ∂L_v/∂θ, H = ∂²L/∂θ² and θ the last linear
layer (Gudovskiy et al. 2021, eqs. 5-7). With the direction V = −H⁻¹g_v it is the gradient of the scalar
φ = ⟨∂L/∂θ, V⟩ = Σ c_i δ_i·ζ_i, ζ_i = V_W h_i + v_b, c_i = w_i/B, whose derivatives are known in closed form:

    ∂φ/∂λ^W_i = (w'_i/B) δ_i·ζ_i        ∂φ/∂λ^S_i = c_i ∂(δ_i·ζ_i)/∂λ^S_i (losses.soft_mixed)
    ∂φ/∂h_i   = c_i [Wᵀ A_iζ_i + V_Wᵀ δ_i], and one backward through encoder and warp, weights held fixed, gives λ^A.

Shapes: B train samples of this rank, C classes, D features; a direction in θ is C × (D + 1), the bias last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from autodo_dist.method import losses, solvers, warp
from autodo_dist.method.losses import Loss
from autodo_dist.method.solvers import Solver

Encoder = Callable[[torch.Tensor], torch.Tensor]
Sum = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Hyperparameters of a batch, or their gradients; None where a group is not learnt.

    Gates and magnitudes are B × K, or K where all samples share them.
    """

    gate_logit: torch.Tensor | None = None
    magnitude_logit: torch.Tensor | None = None
    weight_logit: torch.Tensor | None = None
    soft_logit: torch.Tensor | None = None


@dataclass(frozen=True)
class Solve:
    """How H⁻¹g_v is found: `terms` products of the Neumann sum, `power_iterations` for its step 1/μ_max."""

    solver: Solver
    terms: int
    power_iterations: int


@dataclass(frozen=True)
class Hypergradient:
    """Row gradients, the cosine of −V and g_v, and the estimate of H's largest eigenvalue (nan: not needed)."""

    grads: Rows
    cosine: torch.Tensor
    eigenvalue: torch.Tensor


def augmented(images_BCHW: torch.Tensor, rows: Rows, draws_BD: torch.Tensor) -> torch.Tensor:
    """The pictures under their learnt warp; as they are where augmentation is not learnt."""
    if rows.gate_logit is None or rows.magnitude_logit is None:
        return images_BCHW
    shape = (len(images_BCHW), warp.K)
    gate, magnitude = rows.gate_logit.expand(shape), rows.magnitude_logit.expand(shape)
    return warp.warp(images_BCHW, warp.strengths(gate, magnitude, draws_BD).to(images_BCHW.dtype))


def sample_weights(rows: Rows, like_B: torch.Tensor) -> torch.Tensor:
    """w_i, or 1 where weights are not learnt."""
    return torch.ones_like(like_B) if rows.weight_logit is None else losses.weight(rows.weight_logit).to(like_B.dtype)


def frozen(module: nn.Module) -> Encoder:
    """The module as a function whose weights get no gradient, so that a backward through it is activation-only."""
    state = {name: value.detach() for name, value in module.named_parameters()}
    return lambda images: torch.func.functional_call(module, state, (images,))


@torch.no_grad()
def validation_gradient(
    encoder: Encoder, head: nn.Linear, images: torch.Tensor, labels: torch.Tensor, all_sum: Sum, size: int
) -> torch.Tensor:
    """g_v: gradient at θ of the mean cross entropy over the `size` validation pictures of all ranks."""
    features = with_ones(encoder(images))
    logits = features @ joined(head).T
    return all_sum(losses.logit_grad("cross_entropy", logits, labels, None).T @ features / size)


def hypergradient(
    encoder: Encoder,
    head: nn.Linear,
    images_BCHW: torch.Tensor,
    labels_B: torch.Tensor,
    draws_BD: torch.Tensor,
    rows: Rows,
    valid_grad_CD: torch.Tensor,
    *,
    loss: Loss,
    solve: Solve,
    batch_size: int,
    all_sum: Sum,
) -> Hypergradient:
    """Row gradients dL_v/dλ of this rank's samples. Every rank must call this where `all_sum` is a collective.

    `encoder` is `frozen`; batch_size is that of the global batch, over which L is a mean.
    """
    learnt = [leaf.detach().requires_grad_() for leaf in (rows.gate_logit, rows.magnitude_logit) if leaf is not None]
    with torch.set_grad_enabled(bool(learnt)):
        features_BD = encoder(augmented(images_BCHW, Rows(*learnt), draws_BD))
    with torch.no_grad():
        theta = joined(head)
        h = with_ones(features_BD)
        logits, soft = h @ theta.T, rows.soft_logit
        c_B = sample_weights(rows, logits[:, 0]) / batch_size
        curve = functools.partial(losses.curvature, loss, logits, soft)
        inverse, eigenvalue = inverse_product(solvers.hessian_product(h, c_B, curve, all_sum), valid_grad_CD, solve)
        zeta, delta = h @ -inverse.T, losses.logit_grad(loss, logits, labels_B, soft)
        grads: dict[str, torch.Tensor] = {}
        if rows.weight_logit is not None:
            grads["weight_logit"] = losses.weight_slope(rows.weight_logit) / batch_size * (delta * zeta).sum(1)
        if soft is not None:
            grads["soft_logit"] = c_B[:, None] * losses.soft_mixed(loss, logits, soft, zeta)
        feature_grad = (c_B[:, None] * (curve(zeta) @ theta - delta @ inverse))[:, :-1]
        cosine = torch.nn.functional.cosine_similarity(inverse.flatten(), valid_grad_CD.flatten(), dim=0)
    if learnt:
        gate, magnitude = torch.autograd.grad(features_BD, learnt, grad_outputs=feature_grad)
        grads |= {"gate_logit": gate, "magnitude_logit": magnitude}
    return Hypergradient(Rows(**grads), cosine, eigenvalue)


def inverse_product(product: solvers.Product, value: torch.Tensor, solve: Solve) -> tuple[torch.Tensor, torch.Tensor]:
    """H⁻¹v by the solver asked for, and the largest eigenvalue where it was estimated."""
    if solve.solver == "identity":
        return value, torch.full((), torch.nan, dtype=value.dtype, device=value.device)
    eigenvalue = solvers.largest_eigenvalue(product, value, solve.power_iterations)
    # Without curvature (all weights near 0) there is nothing to invert, and rows stay where they are.
    step = torch.where(eigenvalue > torch.finfo(value.dtype).eps, 1 / eigenvalue, 0.0)
    return solvers.neumann(product, value, step, solve.terms), eigenvalue


def joined(head: nn.Linear) -> torch.Tensor:
    """θ = (W, b) as one C × (D + 1) matrix, the bias in the last column."""
    return torch.cat([head.weight, head.bias[:, None]], 1).detach()


def with_ones(features_BD: torch.Tensor) -> torch.Tensor:
    """Features with a last column of ones, for the bias."""
    return torch.cat([features_BD.detach(), features_BD.new_ones(len(features_BD), 1)], 1)

"""The hypergradient of a validation batch with respect to the rows of a train batch, without a double backward.

By the implicit function theorem dL_v/dλ = −g_vᵀ H⁻¹ ∂²L/∂θ∂λᵀ with g_v = ∂L_v/∂θ, H = ∂²L/∂θ² and θ the last linear
layer (Gudovskiy et al. 2021, eqs. 5-7). With the direction V = −H⁻¹g_v it is the gradient of the scalar
φ = ⟨∂L/∂θ, V⟩ = Σ c_i δ_i·ζ_i, ζ_i = V h_i, c_i = w_i/B, whose derivatives are known in closed form:

    ∂φ/∂λ^W_i = (w'_i/B) δ_i·ζ_i        ∂φ/∂λ^S_i = c_i ∂(δ_i·ζ_i)/∂λ^S_i (losses.soft_mixed)
    ∂φ/∂h_i   = c_i [Wᵀ A_iζ_i + V_Wᵀ δ_i], and one backward through encoder and warp, weights held fixed, gives λ^A.

The Fisher form (appendix C) replaces the mixed derivative by a product of first ones: dL_v/dλ_i = a_i ∂(w_i l_i)/∂λ_i
with a_i = c_i δ_i·ζ_i. It is the gradient of φ = Σ a_i w_i l_i with a_i held fixed, so that λ^A needs no backward but
the loss's own.

Shapes: B train samples of this rank, C classes, D features; a direction in θ is C × (D + 1), the bias last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from autodo_dist.method import losses, warp
from autodo_dist.method.direction import Group, HeadBatch, Inverse, Solve, inverse_product
from autodo_dist.method.losses import Loss

Encoder = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pictures:
    """What becomes of pictures on their way to the encoder: with learnt strengths (B × K), and without."""

    augment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    plain: Callable[[torch.Tensor], torch.Tensor] = lambda images: images


@dataclass(frozen=True)
class Rows:
    """Hyperparameters of a batch, or their gradients; None where a group is not learnt.

    Gates and magnitudes are B × K, or K where all samples share them; as gradients always B × K.
    """

    gate_logit: torch.Tensor | None = None
    magnitude_logit: torch.Tensor | None = None
    weight_logit: torch.Tensor | None = None
    soft_logit: torch.Tensor | None = None

    def with_leaves(self, samples: int) -> tuple[Rows, list[torch.Tensor]]:
        """The rows with gates and magnitudes as leaves of a graph, B × K, and these leaves; none if not learnt."""
        leaves = [
            logit.detach().expand(samples, -1).clone().requires_grad_()
            for logit in (self.gate_logit, self.magnitude_logit)
            if logit is not None
        ]
        gate, magnitude = leaves or (None, None)
        return Rows(gate, magnitude, self.weight_logit, self.soft_logit), leaves

    def of(self, samples: slice) -> Rows:
        """The rows of some of the samples."""

        def cut(logit: torch.Tensor | None, shared: bool = False) -> torch.Tensor | None:
            return logit if logit is None or shared else logit[samples]

        shared = self.gate_logit is not None and self.gate_logit.ndim == 1
        return Rows(
            cut(self.gate_logit, shared),
            cut(self.magnitude_logit, shared),
            cut(self.weight_logit),
            cut(self.soft_logit),
        )


@dataclass(frozen=True)
class Objective:
    """The train loss (1/B) Σ w_i l_i over the B = `batch_size` samples of all ranks.

    normalise: w_i are divided by their mean over those samples. bias: whether θ has the bias (the original's had not).
    smoothing: α of the labels that cross entropy reads. adjustment_C: what is added to the logits that the train loss
    sees, None for nothing; renewed in place (class_prior.py).
    """

    loss: Loss
    batch_size: int
    normalise: bool = False
    bias: bool = True
    smoothing: float = 0.0
    adjustment_C: torch.Tensor | None = None

    def adjusted(self, logits_BC: torch.Tensor) -> torch.Tensor:
        """The logits that the train loss sees."""
        return logits_BC if self.adjustment_C is None else logits_BC + self.adjustment_C


@dataclass(frozen=True)
class Head:
    """The last linear layer, as weights alone: logits_BC = h weight_CDᵀ + bias_C."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, features_BD: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return F.linear(features_BD, self.weight, self.bias)


@dataclass(frozen=True)
class Hypergradient:
    """What the last layer gives: gradients of weights and soft labels, and what λ^A needs.

    feature_grad_BD: ∂φ/∂h, to be sent back through encoder and warp. factor_B: a_i of the Fisher form, else None.
    cosine: of H⁻¹g_v and g_v. eigenvalue: the estimate of H's largest (nan: not needed).
    """

    weight_logit: torch.Tensor | None
    soft_logit: torch.Tensor | None
    feature_grad_BD: torch.Tensor
    factor_B: torch.Tensor | None
    cosine: torch.Tensor
    eigenvalue: torch.Tensor

    def rows(self, gates: Sequence[torch.Tensor]) -> Rows:
        """The gradients of all groups; `gates` are those of gate and magnitude logits, or empty."""
        gate, magnitude = gates or (None, None)
        return Rows(gate, magnitude, self.weight_logit, self.soft_logit)


def augmented(images_BCHW: torch.Tensor, rows: Rows, draws_BD: torch.Tensor, pictures: Pictures) -> torch.Tensor:
    """The pictures under their learnt operations, or without where augmentation is not learnt."""
    if rows.gate_logit is None or rows.magnitude_logit is None:
        return pictures.plain(images_BCHW)
    gate_BK, magnitude_BK = (logit.expand(len(images_BCHW), -1) for logit in (rows.gate_logit, rows.magnitude_logit))
    return pictures.augment(images_BCHW, warp.strengths(gate_BK, magnitude_BK, draws_BD).to(images_BCHW.dtype))


def sample_weights(rows: Rows, like_B: torch.Tensor, objective: Objective, group: Group) -> torch.Tensor:
    """w_i, or 1 where weights are not learnt. With normalise w_i·B/Σw: every rank must call this."""
    if rows.weight_logit is None:
        return torch.ones_like(like_B)
    weight_B = losses.weight(rows.weight_logit).to(like_B.dtype)
    return weight_B * (objective.batch_size / group.sum(weight_B.sum())) if objective.normalise else weight_B


def frozen(module: nn.Module) -> Encoder:
    """The module as a function whose weights get no gradient, so that a backward through it is activation-only."""
    state = {name: value.detach() for name, value in module.named_parameters()}
    return lambda images: torch.func.functional_call(module, state, (images,))


@torch.no_grad()
def validation_gradient(
    model: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    images_BCHW: torch.Tensor,
    labels_B: torch.Tensor,
    *,
    size: int,
    bias: bool,
    group: Group,
) -> torch.Tensor:
    """g_v: gradient at θ of the mean cross entropy over the `size` validation pictures of all ranks.

    `model` gives features and logits. Every rank must call this.
    """
    features_BD, logits_BC = model(images_BCHW)
    delta_BC = losses.logit_grad("cross_entropy", logits_BC, labels_B, None)
    return group.sum(delta_BC.T @ extended(features_BD, bias) / size)


@torch.no_grad()
def hypergradient(
    features_BD: torch.Tensor,
    head: Head,
    labels_B: torch.Tensor,
    rows: Rows,
    valid_grad_CD: torch.Tensor,
    objective: Objective,
    solve: Solve,
    group: Group,
) -> Hypergradient:
    """dL_v/dλ of this rank's samples, as far as the last layer gives it. Every rank must call this."""
    logits_BC = objective.adjusted(head(features_BD))
    weight_B = sample_weights(rows, logits_BC[:, 0], objective, group)
    h_BD = extended(features_BD, objective.bias)
    batch = HeadBatch(objective.loss, h_BD, logits_BC, weight_B, labels_B, rows.soft_logit, objective.smoothing)
    inverse = inverse_product(batch, valid_grad_CD, solve, objective.batch_size, group)
    form = fisher_form if solve.solver == "fisher" else exact_form
    return form(batch, rows, inverse, valid_grad_CD, head.weight, objective, group)


def exact_form(
    batch: HeadBatch,
    rows: Rows,
    inverse: Inverse,
    valid_grad_CD: torch.Tensor,
    weight_CD: torch.Tensor,
    objective: Objective,
    group: Group,
) -> Hypergradient:
    """The mixed derivative ∂²L/∂θ∂λ along V."""
    c_B, zeta_BC = batch.weight_B / objective.batch_size, batch.h_BD @ -inverse.value_CD.T
    soft_grad = None
    if rows.soft_logit is not None:
        mixed_BC = losses.soft_mixed(batch.loss, batch.logits_BC, rows.soft_logit, zeta_BC)
        soft_grad = c_B[:, None] * mixed_BC
    along_V = batch.delta_BC @ inverse.value_CD[:, :-1]
    return Hypergradient(
        weight_logit=weight_grad(rows, (batch.delta_BC * zeta_BC).sum(1), batch.weight_B, objective, group),
        soft_logit=soft_grad,
        feature_grad_BD=c_B[:, None] * (batch.curve(zeta_BC) @ weight_CD - along_V),
        factor_B=None,
        cosine=cosine(inverse.value_CD, valid_grad_CD),
        eigenvalue=inverse.eigenvalue,
    )


def fisher_form(
    batch: HeadBatch,
    rows: Rows,
    inverse: Inverse,
    valid_grad_CD: torch.Tensor,
    weight_CD: torch.Tensor,
    objective: Objective,
    group: Group,
) -> Hypergradient:
    """Appendix C: a_i ∂(w_i l_i)/∂λ_i with a_i = −(1/B) w_iδ_i·F⁻¹g_v h_i."""
    along_B = (batch.delta_BC * (batch.h_BD @ -inverse.value_CD.T)).sum(1)
    a_B = batch.weight_B / objective.batch_size * along_B
    loss_B = losses.sample_loss(batch.loss, batch.logits_BC, batch.labels_B, rows.soft_logit, batch.smoothing)
    share_B = a_B * batch.weight_B
    soft_grad = None
    if rows.soft_logit is not None:
        soft_grad = share_B[:, None] * losses.soft_grad(batch.loss, batch.logits_BC, rows.soft_logit)
    return Hypergradient(
        weight_logit=weight_grad(rows, objective.batch_size * a_B * loss_B, batch.weight_B, objective, group),
        soft_logit=soft_grad,
        feature_grad_BD=share_B[:, None] * (batch.delta_BC @ weight_CD),
        factor_B=a_B,
        cosine=cosine(inverse.value_CD, valid_grad_CD),
        eigenvalue=inverse.eigenvalue,
    )


def weight_grad(
    rows: Rows, value_B: torch.Tensor, weight_B: torch.Tensor, objective: Objective, group: Group
) -> torch.Tensor | None:
    """∂/∂λ^W of (1/B) Σ w_i·value_i with the values held fixed: (w'_i/B) value_i.

    With normalised weights ŵ = w·B/S, S = Σw: (w'_i/S)(value_i − (1/B) Σ ŵ_j value_j).
    """
    if rows.weight_logit is None:
        return None
    slope_B, size = losses.weight_slope(rows.weight_logit), objective.batch_size
    if not objective.normalise:
        return slope_B / size * value_B
    total, mean = group.sum(torch.stack([losses.weight(rows.weight_logit).sum(), (weight_B * value_B).sum() / size]))
    normalised: torch.Tensor = slope_B / total * (value_B - mean)
    return normalised


def cosine(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """The cosine of two directions; 0 where one of them is 0."""
    return F.cosine_similarity(one.flatten(), two.flatten(), dim=0)


def extended(features_BD: torch.Tensor, bias: bool) -> torch.Tensor:
    """Features with a last column of ones, for the bias; of zeros where θ is without it, so that nothing moves it."""
    last = features_BD.new_full((len(features_BD), 1), float(bias))
    return torch.cat([features_BD.detach(), last], 1)

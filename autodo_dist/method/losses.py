"""λ^W and λ^S: the weighted soft-label loss, its gradient and its curvature at the logits, in closed form.

METHOD: w_i = κ·softplus(λ^W_i), κ = 1/ln 2, so that a logit of 0 weighs 1; q_i = softmax(λ^S_i). With p = softmax(z),
r = log p − log q and g = r − p·r, per sample:

    loss           l                                δ = ∂l/∂z               Aζ = (∂²l/∂z²)ζ
    cross entropy  −Σ t·log p                       p − t                   S(p)ζ
    KL             Σ q·log(q/p)                     p − q                   S(p)ζ
    symmetric KL   ½ Σ q·log(q/p) + ½ Σ p·log(p/q)  ½[(p − q) + p∘g]        S(p)ζ + ½[g∘S(p)ζ − p(g·S(p)ζ)]

where S(p)ζ = p∘(ζ − p·ζ) and t = (1−α)e_y + α/C, α being the label smoothing, 0 by default (AutoDO's loss, Gudovskiy
et al. 2021, eq. 3; derivatives checked by double backward in tests/test_losses.py). Shapes: B samples, C classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from autodo_dist.errors import AutodoError

Loss = Literal["cross_entropy", "kl", "symmetric_kl"]
KAPPA = 1 / math.log(2)  # softplus(0) = ln 2


def weight(weight_logit_B: torch.Tensor) -> torch.Tensor:
    """Loss weights κ·softplus(λ^W), above 0; 1 at logit 0."""
    return KAPPA * F.softplus(weight_logit_B)


def weight_slope(weight_logit_B: torch.Tensor) -> torch.Tensor:
    """∂w/∂λ^W = κ·sigmoid(λ^W)."""
    return KAPPA * torch.sigmoid(weight_logit_B)


def soft_logit_start(classes: int, smoothing: float) -> float:
    """The s for which soft logits +s at the given label and −s elsewhere give q = (1−α)y + α/C exactly, α = smoothing.

    s = ½·log(1 − C + C/α). AutodoError unless 0 < α < C/(C−1), where every probability is above 0.
    """
    if classes < 2 or not 0 < smoothing < classes / max(1, classes - 1):
        raise AutodoError(
            f"learn.smoothing = {smoothing}: not between 0 and C/(C-1) = {classes / max(1, classes - 1):.4f} "
            f"for {classes} classes; 0.1 is usual"
        )
    return 0.5 * math.log(1 - classes + classes / smoothing)


def sample_loss(
    loss: Loss,
    logits_BC: torch.Tensor,
    labels_B: torch.Tensor,
    soft_logit_BC: torch.Tensor | None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Each sample's l_i. `cross_entropy` reads the labels, smoothed by α = `smoothing`, the others the soft logits."""
    if soft_logit_BC is None or loss == "cross_entropy":
        return F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=smoothing)
    log_p, log_q = F.log_softmax(logits_BC, 1), F.log_softmax(soft_logit_BC, 1)
    forward = (log_q.exp() * (log_q - log_p)).sum(1)
    if loss == "kl":
        return forward
    return 0.5 * forward + 0.5 * (log_p.exp() * (log_p - log_q)).sum(1)


def spread(p_BC: torch.Tensor, zeta_BC: torch.Tensor) -> torch.Tensor:
    """S(p)ζ = p∘(ζ − p·ζ): the softmax's Jacobian times ζ."""
    return p_BC * (zeta_BC - (p_BC * zeta_BC).sum(1, keepdim=True))


def logit_grad(
    loss: Loss,
    logits_BC: torch.Tensor,
    labels_B: torch.Tensor,
    soft_logit_BC: torch.Tensor | None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """δ_i = ∂l_i/∂z_i."""
    log_p = F.log_softmax(logits_BC, 1)
    p = log_p.exp()
    if soft_logit_BC is None or loss == "cross_entropy":
        classes = logits_BC.shape[1]
        return p - (1 - smoothing) * F.one_hot(labels_B, classes).to(p.dtype) - smoothing / classes
    log_q = F.log_softmax(soft_logit_BC, 1)
    if loss == "kl":
        return p - log_q.exp()
    return 0.5 * (p - log_q.exp() + spread(p, log_p - log_q))


def curvature(
    loss: Loss, logits_BC: torch.Tensor, soft_logit_BC: torch.Tensor | None, zeta_BC: torch.Tensor
) -> torch.Tensor:
    """A_iζ_i, the product of ∂²l_i/∂z_i² with a direction ζ_i in logit space."""
    log_p = F.log_softmax(logits_BC, 1)
    p = log_p.exp()
    eta = spread(p, zeta_BC)
    if soft_logit_BC is None or loss != "symmetric_kl":
        return eta
    r = log_p - F.log_softmax(soft_logit_BC, 1)
    g = r - (p * r).sum(1, keepdim=True)
    return eta + 0.5 * (g * eta - p * (g * eta).sum(1, keepdim=True))


def soft_mixed(loss: Loss, logits_BC: torch.Tensor, soft_logit_BC: torch.Tensor, zeta_BC: torch.Tensor) -> torch.Tensor:
    """∂(δ_i·ζ_i)/∂λ^S_i: 0 for cross entropy, −S(q)ζ for KL, −½[S(q) + S(p)]ζ for the symmetric KL."""
    if loss == "cross_entropy":
        return torch.zeros_like(soft_logit_BC)
    q_side = spread(torch.softmax(soft_logit_BC, 1), zeta_BC)
    if loss == "kl":
        return -q_side
    return -0.5 * (q_side + spread(torch.softmax(logits_BC, 1), zeta_BC))


def soft_grad(loss: Loss, logits_BC: torch.Tensor, soft_logit_BC: torch.Tensor) -> torch.Tensor:
    """∂l_i/∂λ^S_i: 0 for cross entropy, S(q)(log q − log p) for KL, ½[S(q)(log q − log p) + q − p] symmetric."""
    if loss == "cross_entropy":
        return torch.zeros_like(soft_logit_BC)
    log_p, log_q = F.log_softmax(logits_BC, 1), F.log_softmax(soft_logit_BC, 1)
    q = log_q.exp()
    forward = spread(q, log_q - log_p)
    return forward if loss == "kl" else 0.5 * (forward + q - log_p.exp())

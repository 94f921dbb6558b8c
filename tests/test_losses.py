"""Weights, soft labels and the losses' closed-form derivatives, against autograd and double backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autodo_dist.errors import AutodoError
from autodo_dist.method import losses
from autodo_dist.method.losses import Loss

LOSSES: tuple[Loss, ...] = get_args(Loss)
SOFT = pytest.mark.parametrize("with_soft", [True, False], ids=["soft", "hard"])
EACH = pytest.mark.parametrize("loss", LOSSES)
Function = Callable[[torch.Tensor], torch.Tensor]


class Case:
    """Logits z, labels, soft logits s and directions ζ, from a seed; `spread` is the logits' standard deviation."""

    def __init__(self, seed: int, samples: int = 5, classes: int = 4, spread: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(3, samples, classes, generator=generator, dtype=torch.float64)
        self.logits, self.soft, self.zeta = spread * normal[0], spread * normal[1], normal[2]
        self.labels = torch.randint(classes, (samples,), generator=generator)


def oracle(loss: Loss, logits: torch.Tensor, labels: torch.Tensor, soft: torch.Tensor | None) -> torch.Tensor:
    """Each sample's loss by torch's own cross entropy and KL divergence."""
    if soft is None or loss == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="none")
    p, q = F.log_softmax(logits, 1), F.log_softmax(soft, 1)
    forward, backward = (F.kl_div(a, b, reduction="none", log_target=True).sum(1) for a, b in ((p, q), (q, p)))
    return forward if loss == "kl" else (forward + backward) / 2


def gradient(function: Function, at: torch.Tensor) -> torch.Tensor:
    """Of the sum, by autograd; zeros where the function does not depend on `at`."""
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf, allow_unused=True, materialize_grads=True)[0]


def double_backward(loss: Loss, case: Case, soft: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """δ as a graph, by autograd through sample_loss."""
    total = losses.sample_loss(loss, logits, case.labels, soft).sum()
    return torch.autograd.grad(total, logits, create_graph=True)[0]


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------- weights


def test_a_logit_of_zero_weighs_one() -> None:
    assert losses.weight(torch.zeros(3, dtype=torch.float64)).tolist() == pytest.approx([1.0] * 3, rel=1e-15)


def test_weight_is_softplus_over_log_two_and_its_slope_is_the_derivative() -> None:
    logit = torch.linspace(-40, 40, 81, dtype=torch.float64)
    zero = torch.zeros_like(logit)
    # torch's softplus is the identity above 20: 1e-10 off.
    torch.testing.assert_close(losses.weight(logit), torch.logaddexp(logit, zero) / math.log(2), rtol=1e-10, atol=0)
    expected = gradient(lambda x: torch.logaddexp(x, zero) / math.log(2), logit)
    torch.testing.assert_close(losses.weight_slope(logit), expected, rtol=1e-12, atol=0)
    assert (losses.weight(logit) > 0).all()


# --------------------------------------------------------------------------------------------------- start soft labels


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("smoothing", [1e-6, 0.05, 0.1, 0.5, 0.99, 1.0, 1.0005])
def test_soft_labels_start_as_smoothed_labels(classes: int, smoothing: float) -> None:
    """(1 − α)y + α/C exactly, from +s at the given label and −s elsewhere."""
    start = losses.soft_logit_start(classes, smoothing)
    given = F.one_hot(torch.tensor([1]), classes).double()
    near(torch.softmax(start * (2 * given - 1), 1), (1 - smoothing) * given + smoothing / classes)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, -0.1, math.nan, "end", 3.0])
def test_smoothing_out_of_its_range_is_refused(classes: int, smoothing: float | str) -> None:
    end = classes / (classes - 1)
    with pytest.raises(AutodoError, match=f"learn.smoothing = .* not between 0 and .* = {end:.4f} for {classes} "):
        losses.soft_logit_start(classes, end if isinstance(smoothing, str) else smoothing)


# ---------------------------------------------------------------------------------------------------------- the losses


@SOFT
@EACH
def test_loss_against_torch(loss: Loss, with_soft: bool) -> None:
    case = Case(0)
    soft = case.soft if with_soft else None
    found = losses.sample_loss(loss, case.logits, case.labels, soft)
    near(found, oracle(loss, case.logits, case.labels, soft))
    assert found.shape == (5,)


@SOFT
@EACH
def test_logit_gradient_against_autograd(loss: Loss, with_soft: bool) -> None:
    case = Case(1)
    soft = case.soft if with_soft else None
    expected = gradient(lambda z: oracle(loss, z, case.labels, soft), case.logits)
    near(losses.logit_grad(loss, case.logits, case.labels, soft), expected)


def test_label_smoothing_against_torch_and_autograd() -> None:
    case = Case(1)

    def smoothed(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, case.labels, reduction="none", label_smoothing=0.3)

    near(losses.sample_loss("cross_entropy", case.logits, case.labels, None, 0.3), smoothed(case.logits))
    found = losses.logit_grad("cross_entropy", case.logits, case.labels, None, 0.3)
    near(found, gradient(smoothed, case.logits))


@SOFT
@EACH
def test_curvature_against_the_dense_hessian(loss: Loss, with_soft: bool) -> None:
    case = Case(2)
    soft = case.soft if with_soft else None
    found = losses.curvature(loss, case.logits, soft, case.zeta)
    for i in range(len(case.labels)):
        one = slice(i, i + 1)

        def loss_of(z: torch.Tensor, one: slice = one) -> torch.Tensor:
            return oracle(loss, z[None], case.labels[one], None if soft is None else soft[one]).sum()

        near(found[i], torch.autograd.functional.hessian(loss_of, case.logits[i]) @ case.zeta[i])


@EACH
def test_soft_label_derivative_against_double_backward(loss: Loss) -> None:
    """∂(δ·ζ)/∂λ^S with δ by autograd through the loss."""
    case = Case(3)
    logits = case.logits.clone().requires_grad_()
    expected = gradient(lambda s: double_backward(loss, case, s, logits) * case.zeta, case.soft)
    near(losses.soft_mixed(loss, case.logits, case.soft, case.zeta), expected)
    assert (loss == "cross_entropy") == (not expected.any())


@EACH
def test_soft_label_gradient_against_autograd(loss: Loss) -> None:
    """∂l/∂λ^S, of which the Fisher form is made."""
    case = Case(3)
    logits = case.logits.clone().requires_grad_()  # so that cross entropy, blind to soft labels, has a graph
    expected = gradient(lambda s: oracle(loss, logits, case.labels, s), case.soft)
    near(losses.soft_grad(loss, case.logits, case.soft), expected)
    assert (loss == "cross_entropy") == (not expected.any())


def test_spread_is_the_softmaxs_jacobian() -> None:
    case = Case(4)
    _, expected = torch.autograd.functional.jvp(lambda z: torch.softmax(z, 1), case.logits, case.zeta)
    near(losses.spread(torch.softmax(case.logits, 1), case.zeta), expected)


@pytest.mark.parametrize("loss", ["kl", "symmetric_kl"])
def test_a_label_that_agrees_with_the_prediction_has_no_loss(loss: Loss) -> None:
    """At p = q loss and gradients are 0, and the curvature is S(p) for either divergence."""
    case = Case(5)
    soft = case.logits + 3.0  # the softmax does not see a constant
    near(losses.sample_loss(loss, case.logits, case.labels, soft), torch.zeros(5, dtype=torch.float64))
    near(losses.logit_grad(loss, case.logits, case.labels, soft), torch.zeros_like(case.logits))
    near(losses.soft_grad(loss, case.logits, soft), torch.zeros_like(soft))
    fisher = losses.spread(torch.softmax(case.logits, 1), case.zeta)
    near(losses.curvature(loss, case.logits, soft, case.zeta), fisher)


def test_kl_of_a_sharp_label_is_the_cross_entropy() -> None:
    case = Case(6)
    sharp = 100.0 * F.one_hot(case.labels, 4).double()
    near(
        losses.sample_loss("kl", case.logits, case.labels, sharp),
        losses.sample_loss("cross_entropy", case.logits, case.labels, None),
    )


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(LOSSES),
    st.booleans(),
    st.integers(2, 7),
    st.floats(0.01, 50),
    st.floats(0.01, 50),
    st.integers(0, 2**31),
)
def test_closed_forms_hold_for_large_logits(
    loss: Loss, with_soft: bool, classes: int, size: float, soft_size: float, seed: int
) -> None:
    """Logits up to ±50, where p and q underflow to 1e-44: finite, and equal to double backward."""
    case = Case(seed, samples=3, classes=classes)
    logits = (size * case.logits / case.logits.abs().max()).requires_grad_()
    soft = soft_size * case.soft / case.soft.abs().max() if with_soft else None
    delta = double_backward(loss, case, soft, logits)
    curve = torch.autograd.grad((delta * case.zeta).sum(), logits, create_graph=True)[0]
    pairs = [
        (losses.sample_loss(loss, logits, case.labels, soft), oracle(loss, logits, case.labels, soft)),
        (losses.logit_grad(loss, logits, case.labels, soft), delta),
        (losses.curvature(loss, logits, soft, case.zeta), curve),
    ]
    if soft is not None:
        mixed = gradient(lambda s: double_backward(loss, case, s, logits) * case.zeta, soft)
        pairs.append((losses.soft_mixed(loss, logits, soft, case.zeta), mixed))
        first = gradient(lambda s: oracle(loss, logits, case.labels, s), soft)
        pairs.append((losses.soft_grad(loss, logits, soft), first))
    for found, expected in pairs:
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

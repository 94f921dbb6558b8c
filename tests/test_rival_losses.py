"""The formulas of the rivals, each against one written out otherwise, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodo_dist.experiment.rivals import elr, sop
from autodo_dist.experiment.rivals.meta_weight_net import logits_of, meta_gradient, sample_weights, weight_net
from autodo_dist.models import build_model

B, C, N = 6, 4, 20
IDS = torch.arange(100, 100 + 3 * N, 3)  # sorted, with gaps


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def one_hot(labels_B: torch.Tensor) -> torch.Tensor:
    return torch.eye(C, dtype=torch.float64)[labels_B]


def written_out_softmax(logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC.exp() / logits_BC.exp().sum(1, keepdim=True)


def test_elr_gradient_is_that_of_the_paper() -> None:
    """Lemma 2: ∇_z = p − y + λ g with g_c = p_c / (1 − ⟨p, t⟩) Σ_k (t_k − t_c) p_k, targets held fixed."""
    logits_BC, labels_B = randn(B, C).requires_grad_(), torch.randint(C, (B,))
    target_BC = 0.9 * torch.softmax(randn(B, C), 1)
    elr.losses(logits_BC, labels_B, target_BC, coefficient=3.0).sum().backward()
    p = written_out_softmax(logits_BC.detach())
    differences_BCC = target_BC[:, None, :] - target_BC[:, :, None]  # t_k − t_c at place (c, k)
    g = p / (1 - (p * target_BC).sum(1, keepdim=True)) * (differences_BCC * p[:, None, :]).sum(2)
    assert logits_BC.grad is not None
    torch.testing.assert_close(logits_BC.grad, p - one_hot(labels_B) + 3.0 * g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_elr_over_several_visits(smoothing: float) -> None:
    """After visits with predictions p̄_1 … p̄_k a target is (1 − β) Σ_j β^(k−j) p̄_j; the loss reads the newest one."""
    options = elr.Options(coefficient=2.0, momentum=0.6)
    rule = elr.Elr(options, IDS, torch.zeros(N, C, dtype=torch.float64), smoothing)
    visits: dict[int, list[torch.Tensor]] = {}
    for _ in range(5):
        places = torch.randperm(N)[:B]
        logits_BC, labels_B = randn(B, C).requires_grad_(), torch.randint(C, (B,))
        loss_B = rule.losses(logits_BC, labels_B, IDS[places])
        (grad_BC,) = torch.autograd.grad(loss_B.sum(), logits_BC)
        p_BC = written_out_softmax(logits_BC)
        for row, place in enumerate(places.tolist()):
            visits.setdefault(place, []).append(p_BC[row].detach())
        target_BC = torch.stack([discounted(visits[place], 0.6) for place in places.tolist()])
        soft_BC = (1 - smoothing) * one_hot(labels_B) + smoothing / C
        expected_B = -(soft_BC * p_BC.log()).sum(1) + 2.0 * (1 - (p_BC * target_BC).sum(1)).log()
        (expected_BC,) = torch.autograd.grad(expected_B.sum(), logits_BC)
        torch.testing.assert_close(loss_B, expected_B, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_BC, expected_BC, rtol=1e-12, atol=1e-12)
    for place in range(N):
        expected_C = discounted(visits[place], 0.6) if place in visits else torch.zeros(C, dtype=torch.float64)
        torch.testing.assert_close(rule.target_NC[place], expected_C, rtol=1e-12, atol=1e-12)


def discounted(predictions: list[torch.Tensor], momentum: float) -> torch.Tensor:
    """The sum over all visits."""
    count = len(predictions)
    terms = [(1 - momentum) * momentum ** (count - 1 - j) * p for j, p in enumerate(predictions)]
    return torch.stack(terms).sum(0)


def test_elr_clamps_what_is_nearly_certain() -> None:
    """(1, 0, 0, 0) counts as (0.9999, 1e-4, 1e-4, 1e-4), in the target over their sum, so log(1 − ⟨p, t⟩) is finite."""
    logits_BC = torch.tensor([[800.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    seen = torch.tensor([0.9999, 1e-4, 1e-4, 1e-4], dtype=torch.float64)
    target_BC = elr.renewed(torch.zeros(1, C, dtype=torch.float64), logits_BC, 0.25)
    torch.testing.assert_close(target_BC[0], 0.75 * seen / 1.0002)
    loss_B = elr.losses(logits_BC, torch.zeros(1, dtype=torch.int64), target_BC, 3.0)
    torch.testing.assert_close(loss_B[0], 3 * torch.log(1 - 0.75 * (seen @ seen) / 1.0002))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sop_gradients_are_those_of_two_losses(smoothing: float) -> None:
    """θ and u by the cross entropy of φ(p + s), v by the squared error; each loss written out with the others fixed."""
    logits_BC, labels_B = (2 * randn(B, C)).requires_grad_(), torch.randint(C, (B,))
    u_B, v_BC = (0.5 * randn(B)).requires_grad_(), (0.5 * randn(B, C)).requires_grad_()
    got = torch.autograd.grad(sop.losses(logits_BC, labels_B, u_B, v_BC, smoothing).mean(), (logits_BC, u_B, v_BC))

    y = one_hot(labels_B)

    def s(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        u_BC = u[:, None].expand(B, C)  # only the given label's entry counts
        return u_BC * u_BC * y - v * v * (1 - y)

    x = torch.maximum(written_out_softmax(logits_BC) + s(u_B, v_BC.detach()), torch.tensor(1e-4, dtype=torch.float64))
    phi = x / x.abs().sum(1, keepdim=True)
    t = (1 - smoothing) * y + smoothing / C
    cross_entropy = -(t * phi.log()).sum() / B
    for found, expected in zip(got[:2], torch.autograd.grad(cross_entropy, (logits_BC, u_B)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    h = one_hot(logits_BC.detach().argmax(1))
    (expected,) = torch.autograd.grad(((h + s(u_B.detach(), v_BC) - y) ** 2).sum() / B, v_BC)
    torch.testing.assert_close(got[2], expected, rtol=1e-12, atol=1e-12)
    assert (v_BC.detach() != 0).all()
    assert (got[2][y.bool()] == 0).all()


def test_sop_steps_stay_within_one() -> None:
    """Rows of the batch move by lr times the mean loss's gradient, cut back to [−1, 1]; the others stay."""
    options = sop.Options(lr_u=50.0, lr_v=3.0)
    u_N, v_NC = 0.6 * randn(N), 0.6 * randn(N, C)
    start_u, start_v = u_N.clone(), v_NC.clone()
    rule = sop.Sop(options, IDS, u_N, v_NC, 0.0)
    places, logits_BC, labels_B = torch.randperm(N)[:B], randn(B, C), torch.randint(C, (B,))
    (rule.losses(logits_BC, labels_B, IDS[places]).sum() / B).backward()
    rule.after_backward()

    u_B, v_BC = start_u[places].requires_grad_(), start_v[places].requires_grad_()
    grad_u, grad_v = torch.autograd.grad(sop.losses(logits_BC, labels_B, u_B, v_BC).mean(), (u_B, v_BC))
    moved_u, moved_v = (start_u[places] - 50 * grad_u), (start_v[places] - 3 * grad_v)
    assert (moved_u.abs() > 1).any()
    assert (moved_v.abs() > 1).any()
    assert (moved_u.abs() < 1).any()
    torch.testing.assert_close(u_N[places], moved_u.clip(-1, 1))
    torch.testing.assert_close(v_NC[places], moved_v.clip(-1, 1))
    others = torch.ones(N, dtype=torch.bool)
    others[places] = False
    assert torch.equal(u_N[others], start_u[others])
    assert torch.equal(v_NC[others], start_v[others])


def linear_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, nn.Module]:
    """Train and clean features with labels, weights of a linear classifier, and a weight network."""
    return (
        *(randn(B, 3), torch.randint(C, (B,)), randn(5, 3), torch.randint(C, (5,))),
        *(randn(C, 3), weight_net(1).double()),
    )


def meta_loss_written_out(net: nn.Module, lr: float, problem: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The clean loss after a step along (1/n) Σ V(l_i) (p_i − y_i) x_iᵀ."""
    x_BD, y_B, clean_MD, clean_M, w_CD = problem
    p_BC = written_out_softmax(x_BD @ w_CD.T)
    loss_B = -p_BC[torch.arange(B), y_B].log()
    weight_B = net(loss_B[:, None])[:, 0]
    step_CD = (weight_B[:, None] * (p_BC - one_hot(y_B))).T @ x_BD / B
    clean_MC = clean_MD @ (w_CD - lr * step_CD).T
    return -written_out_softmax(clean_MC)[torch.arange(5), clean_M].log().mean()


def found_meta_gradient(net: nn.Module, lr: float, problem: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x_BD, y_B, clean_MD, clean_M, w_CD = problem
    return meta_gradient(
        lambda w: F.cross_entropy(x_BD @ w["w"].T, y_B, reduction="none"),
        lambda w: F.cross_entropy(clean_MD @ w["w"].T, clean_M),
        {"w": w_CD.clone().requires_grad_()},
        net,
        lr,
    )


def test_meta_gradient_by_finite_differences() -> None:
    """Every weight of the network moved by ±ε, in float64: the central difference errs by ε² and by rounding / ε."""
    *problem, net = linear_problem()
    found = found_meta_gradient(net, 2.0, tuple(problem))
    epsilon = 1e-5
    for parameter, grad in zip(net.parameters(), found, strict=True):
        flat = parameter.data.view(-1)
        for place in range(len(flat)):
            value = flat[place].item()
            sides = []
            for moved in (value + epsilon, value - epsilon):
                flat[place] = moved
                sides.append(meta_loss_written_out(net, 2.0, tuple(problem)).item())
            flat[place] = value
            assert (sides[0] - sides[1]) / (2 * epsilon) == pytest.approx(grad.view(-1)[place].item(), abs=2e-9)


def test_meta_gradient_written_out_for_a_linear_model() -> None:
    """−(α/n) Σ_i ⟨∇l_meta(θ̂), ∇l_i(θ)⟩ ∂V(l_i)/∂Θ, with ∇l_i = (p_i − y_i) x_iᵀ."""
    *problem, net = linear_problem()
    x_BD, y_B, clean_MD, clean_M, w_CD = problem
    p_BC = written_out_softmax(x_BD @ w_CD.T)
    loss_B = -p_BC[torch.arange(B), y_B].log()
    weight_B = net(loss_B[:, None])[:, 0]
    grad_BCD = (p_BC - one_hot(y_B))[:, :, None] * x_BD[:, None, :]
    moved_CD = w_CD - 2.0 * (weight_B.detach()[:, None, None] * grad_BCD).mean(0)
    clean_CD = (written_out_softmax(clean_MD @ moved_CD.T) - one_hot(clean_M)).T @ clean_MD / 5
    factor_B = -2.0 / B * (grad_BCD * clean_CD).sum((1, 2))
    expected = torch.autograd.grad(weight_B @ factor_B, list(net.parameters()))
    for got, wanted in zip(found_meta_gradient(net, 2.0, tuple(problem)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["convnet", "wrn_10_1"])
def test_meta_gradient_through_a_network(name: str) -> None:
    """Along a random direction of Θ, against a real step of torch.optim.SGD on a copy; running statistics stay."""
    model, net = build_model(name, C, seed=0).double().train(), weight_net(2).double()
    images, labels, clean, clean_labels = randn(8, 3, 8, 8), torch.arange(8) % C, randn(4, 3, 8, 8), torch.arange(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = logits_of(model)
    found = meta_gradient(
        lambda w: F.cross_entropy(logits(w, images), labels, reduction="none"),
        lambda w: F.cross_entropy(logits(w, clean), clean_labels),
        {key: value.detach().requires_grad_() for key, value in model.named_parameters()},
        net,
        0.3,
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def after_a_step(moved: nn.Module) -> float:
        copied = copy.deepcopy(model)
        loss_B = F.cross_entropy(copied(images)[1], labels, reduction="none")
        (sample_weights(moved, loss_B).detach() @ loss_B / 8).backward()
        torch.optim.SGD(copied.parameters(), lr=0.3).step()
        return F.cross_entropy(copied(clean)[1], clean_labels).item()

    direction = [torch.randn_like(parameter) for parameter in net.parameters()]
    slope = central_difference(after_a_step, net, direction, 1e-4)
    assert slope == pytest.approx(sum((g * d).sum().item() for g, d in zip(found, direction, strict=True)), rel=1e-5)


def central_difference(
    value: Callable[[nn.Module], float], net: nn.Module, direction: list[torch.Tensor], step: float
) -> float:
    """The slope of `value` along a direction of the weights."""
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for parameter, part in zip(moved.parameters(), direction, strict=True):
                parameter += sign * step * part
        sides.append(value(moved))
    return (sides[0] - sides[1]) / (2 * step)

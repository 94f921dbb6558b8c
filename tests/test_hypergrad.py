"""A whole hyper step through encoder, gates, warp and head, against double backward and a dense Hessian."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any, Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodo_dist.method import hypergrad, solvers, warp
from autodo_dist.method.hypergrad import Hypergradient, Rows, Solve, hypergradient
from autodo_dist.method.losses import Loss
from autodo_dist.method.solvers import Solver

SAMPLES, CLASSES, FEATURES, GLOBAL = 6, 4, 3, 10  # GLOBAL: the batch of all ranks, over which the loss is a mean
Augment = Literal["none", "per_sample", "shared"]
NAMES = tuple(field.name for field in fields(Rows))
IDENTITY, NEUMANN = Solve("identity", 0, 0), Solve("neumann", 5, 4)
EACH = pytest.mark.parametrize("loss", get_args(Loss))


class Setting:
    """A small convolutional encoder with BatchNorm in eval mode, a head, a train and a validation batch, and rows."""

    def __init__(self, augment: Augment, weight: bool, soft: bool, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.encoder = nn.Sequential(
            nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.CELU(), nn.Conv2d(5, FEATURES, 3, stride=2),
            nn.CELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ).to(dtype).eval()  # fmt: skip
        self.head = nn.Linear(FEATURES, CLASSES).to(dtype)
        with torch.no_grad():
            for parameter in (*self.encoder.parameters(), *self.head.parameters()):
                parameter.copy_(0.7 * normal(*parameter.shape))
            self.encoder[1].running_mean.copy_(normal(5))
            self.encoder[1].running_var.copy_(normal(5).square() + 0.5)
        self.images, self.valid_images = normal(SAMPLES, 2, 8, 8), normal(5, 2, 8, 8)
        self.labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        self.valid_labels = torch.randint(CLASSES, (5,), generator=generator)
        self.draws = torch.rand(SAMPLES, warp.DRAWS, generator=generator, dtype=torch.float64)
        gates = {"none": None, "per_sample": normal(2, SAMPLES, warp.K), "shared": normal(2, warp.K)}[augment]
        self.rows = Rows(
            None if gates is None else gates[0],
            None if gates is None else gates[1],
            normal(SAMPLES) if weight else None,
            normal(SAMPLES, CLASSES) if soft else None,
        )

    def valid_grad(self) -> torch.Tensor:
        """∂L_v/∂θ by autograd, W and b side by side."""
        loss = F.cross_entropy(self.head(self.encoder(self.valid_images)), self.valid_labels)
        weight, bias = torch.autograd.grad(loss, (self.head.weight, self.head.bias))
        return torch.cat([weight, bias[:, None]], 1)

    def found(self, loss: Loss, solve: Solve, part: slice = slice(None), **changes: Any) -> Hypergradient:
        """`hypergradient` for a part of the batch."""
        rows = {name: None if value is None else value[part] for name, value in vars(self.rows).items()}
        if self.rows.gate_logit is not None and self.rows.gate_logit.dim() == 1:  # shared
            rows |= {"gate_logit": self.rows.gate_logit, "magnitude_logit": self.rows.magnitude_logit}
        arguments: dict[str, Any] = {"batch_size": GLOBAL, "all_sum": solvers.identity_sum} | changes
        return hypergradient(
            hypergrad.frozen(self.encoder), self.head, self.images[part], self.labels[part], self.draws[part],
            Rows(**rows), self.valid_grad(), loss=loss, solve=solve, **arguments,
        )  # fmt: skip


def reference(setting: Setting, loss: Loss, solve: Solve, eigenvalue: torch.Tensor) -> tuple[Rows, torch.Tensor]:
    """By double backward: L(θ, λ) as a graph, V from its dense Hessian, then the gradient of ⟨∂L/∂θ, V⟩ for each row.

    Also H⁻¹g_v.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in vars(setting.rows).items() if value is not None}
    images = setting.images
    if "gate_logit" in leaves:
        shape = (SAMPLES, warp.K)
        gate, magnitude = leaves["gate_logit"].expand(shape), leaves["magnitude_logit"].expand(shape)
        images = warp.warp(images, warp.strengths(gate, magnitude, setting.draws))
    features = setting.encoder(images)

    def value(theta: torch.Tensor, features: torch.Tensor = features) -> torch.Tensor:
        theta = theta.view(CLASSES, FEATURES + 1)
        logits = F.linear(features, theta[:, :-1], theta[:, -1])
        each = F.cross_entropy(logits, setting.labels, reduction="none")
        if "soft_logit" in leaves and loss != "cross_entropy":
            log_p, log_q = F.log_softmax(logits, 1), F.log_softmax(leaves["soft_logit"], 1)
            each = (log_q.exp() * (log_q - log_p)).sum(1)
            if loss == "symmetric_kl":
                each = (each + (log_p.exp() * (log_p - log_q)).sum(1)) / 2
        if "weight_logit" in leaves:
            each = F.softplus(leaves["weight_logit"]) / math.log(2) * each
        return each.sum() / GLOBAL

    theta = torch.cat([setting.head.weight, setting.head.bias[:, None]], 1).detach().flatten().requires_grad_()
    valid_grad = setting.valid_grad().flatten()
    inverse = valid_grad
    if solve.solver == "neumann":
        dense = torch.autograd.functional.hessian(functools.partial(value, features=features.detach()), theta.detach())
        factor = torch.eye(len(dense), dtype=torch.float64) - dense / eigenvalue
        powers = [torch.linalg.matrix_power(factor, j) for j in range(solve.terms + 1)]
        inverse = sum(powers) @ valid_grad / eigenvalue
        vectors = [torch.linalg.matrix_power(dense, n) @ valid_grad for n in range(solve.power_iterations + 1)]
        assert eigenvalue == pytest.approx(float(vectors[-1].norm() / vectors[-2].norm()), rel=1e-12)
    if not leaves:
        return Rows(), inverse
    (train_grad,) = torch.autograd.grad(value(theta), theta, create_graph=True)
    scalar = (train_grad * -inverse).sum()
    grads = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Rows(**dict(zip(leaves, grads, strict=True))), inverse


def compare(found: Rows, expected: Rows) -> None:
    """The same groups, each within 1e-10 of its norm."""
    for name in NAMES:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.shape == theirs.shape
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm(), name


@pytest.mark.parametrize("solve", [IDENTITY, NEUMANN], ids=lambda solve: solve.solver)
@pytest.mark.parametrize("augment", get_args(Augment))
@EACH
def test_row_gradients_against_double_backward(loss: Loss, augment: Augment, solve: Solve) -> None:
    """Every group of rows, learnt or not, and a global batch larger than this rank's."""
    for weight, soft in itertools.product([False, True], repeat=2):
        setting = Setting(augment, weight, soft)
        found = setting.found(loss, solve)
        expected, inverse = reference(setting, loss, solve, found.eigenvalue)
        compare(found.grads, expected)
        cosine = F.cosine_similarity(inverse, setting.valid_grad().flatten(), dim=0)
        assert float(found.cosine) == pytest.approx(float(cosine), rel=1e-12)
        assert bool(found.eigenvalue.isnan()) == (solve.solver == "identity")
        if solve.solver == "identity":
            assert float(found.cosine) == pytest.approx(1, rel=1e-14)
        else:
            assert found.cosine < 0.999  # the solver does something
        for name in NAMES:  # nothing passes for being zero
            value = getattr(found.grads, name)
            assert value is None or bool(value.any()) == (name != "soft_logit" or loss != "cross_entropy")


@pytest.mark.parametrize("solver", get_args(Solver))
def test_the_mean_is_over_the_global_batch(solver: Solver) -> None:
    """Identity: gradients go as 1/batch_size. Neumann with the step 1/μ: H, μ and so H⁻¹ undo it."""
    setting = Setting("per_sample", True, True)
    small, large = (setting.found("symmetric_kl", Solve(solver, 5, 4), batch_size=size).grads for size in (6, 18))
    share = 3 if solver == "identity" else 1
    compare(Rows(*(share * getattr(large, name) for name in NAMES)), small)


def test_two_ranks_give_what_one_gives() -> None:
    """Threads as ranks: all_sum adds both parts; a shared gradient is the sum of the ranks' own."""
    for augment in ("per_sample", "shared"):
        setting = Setting(augment, True, True)
        barrier = threading.Barrier(2, timeout=60)
        slots: list[torch.Tensor] = [torch.empty(0)] * 2

        def all_sum(rank: int, value: torch.Tensor, slots=slots, barrier=barrier) -> torch.Tensor:
            slots[rank] = value
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        def one(rank: int, setting=setting, all_sum: Callable[..., torch.Tensor] = all_sum) -> Hypergradient:
            part = (slice(0, 2), slice(2, None))[rank]
            return setting.found("symmetric_kl", NEUMANN, part, all_sum=functools.partial(all_sum, rank))

        with ThreadPoolExecutor(2) as threads:
            halves = list(threads.map(one, range(2)))
        whole = setting.found("symmetric_kl", NEUMANN)
        joined = {}
        for name in NAMES:
            parts = [getattr(half.grads, name) for half in halves]
            shared = augment == "shared" and name in ("gate_logit", "magnitude_logit")
            joined[name] = sum(parts) if shared else torch.cat(parts)
        compare(Rows(**joined), whole.grads)
        for half in halves:
            assert float(half.eigenvalue) == pytest.approx(float(whole.eigenvalue), rel=1e-12)
            assert float(half.cosine) == pytest.approx(float(whole.cosine), rel=1e-12)


@pytest.mark.parametrize("augment", get_args(Augment))
def test_a_rank_without_samples_takes_part(augment: Augment) -> None:
    """The last batch of a pass may leave a rank's piece empty; its sums over ranks still run."""
    setting = Setting(augment, True, True)
    sums = 0

    def all_sum(value: torch.Tensor) -> torch.Tensor:
        nonlocal sums
        sums += 1
        return value + 1

    found = setting.found("symmetric_kl", NEUMANN, slice(0, 0), all_sum=all_sum)
    assert sums == NEUMANN.terms + NEUMANN.power_iterations
    for name in NAMES:
        value, row = getattr(found.grads, name), getattr(setting.rows, name)
        assert value is None or (value == 0).all()
        assert (value is None) == (row is None)
        shared = augment == "shared" and name in ("gate_logit", "magnitude_logit")
        assert value is None or value.shape == (row.shape if shared else (0, *row.shape[1:]))


def test_validation_gradient_against_autograd() -> None:
    """Also over two ranks: each divides by the size of both, all_sum adds."""
    setting = Setting("none", False, False)

    def part(cut: slice, all_sum: hypergrad.Sum) -> torch.Tensor:
        encoder, images, labels = (
            hypergrad.frozen(setting.encoder),
            setting.valid_images[cut],
            setting.valid_labels[cut],
        )
        return hypergrad.validation_gradient(encoder, setting.head, images, labels, all_sum, 5)

    expected = setting.valid_grad()
    first = part(slice(0, 2), solvers.identity_sum)
    for found in (part(slice(None), solvers.identity_sum), part(slice(2, None), lambda value: value + first)):
        assert (found - expected).norm() <= 1e-13 * expected.norm()
        assert not found.requires_grad


@pytest.mark.parametrize("leaves_of_a_graph", [True, False])
@pytest.mark.parametrize("augment", get_args(Augment))
def test_a_step_leaves_no_trace(augment: Augment, leaves_of_a_graph: bool) -> None:
    """Weights, BatchNorm statistics, rows and all .grad stay as they were; so do the requires_grad flags."""
    setting = Setting(augment, True, True)
    setting.encoder[0].bias.requires_grad_(False)
    for value in vars(setting.rows).values():
        if value is not None:
            value.requires_grad_(leaves_of_a_graph)
    rows = copy.deepcopy(vars(setting.rows))
    modules = (setting.encoder, setting.head)
    tensors = [value for module in modules for value in module.state_dict(keep_vars=True).values()]
    before = [(value.detach().clone(), value.requires_grad) for value in tensors]
    valid_grad = setting.valid_grad()
    kept = valid_grad.clone()
    encoder = hypergrad.frozen(setting.encoder)
    hypergrad.validation_gradient(
        encoder, setting.head, setting.valid_images, setting.valid_labels, solvers.identity_sum, 5
    )
    found = hypergradient(
        encoder, setting.head, setting.images, setting.labels, setting.draws, setting.rows, valid_grad,
        loss="symmetric_kl", solve=NEUMANN, batch_size=SAMPLES, all_sum=solvers.identity_sum,
    )  # fmt: skip
    after = [value for module in modules for value in module.state_dict(keep_vars=True).values()]
    for now, tensor, (value, flag) in zip(after, tensors, before, strict=True):
        assert now is tensor
        assert torch.equal(now, value)
        assert now.requires_grad == flag
        assert now.grad is None
    assert torch.equal(valid_grad, kept)
    for name, value in vars(setting.rows).items():
        if value is not None:
            assert value.grad is None
            assert value.requires_grad == leaves_of_a_graph
            assert torch.equal(value, rows[name])
    for value in (*vars(found.grads).values(), found.cosine, found.eigenvalue):
        assert value is None or not value.requires_grad


def test_the_backward_is_activation_only() -> None:
    """A frozen encoder gives the module's own values and input gradients, and its graph ends at the input alone."""
    setting = Setting("none", False, False)
    encoder = hypergrad.frozen(setting.encoder)
    assert torch.equal(encoder(setting.images), setting.encoder(setting.images))
    assert not encoder(setting.images).requires_grad
    ours, theirs = (setting.images.clone().requires_grad_() for _ in range(2))
    out = encoder(ours)
    assert ends(out.grad_fn) == {id(ours)}
    out.square().sum().backward()
    setting.encoder(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("augment", get_args(Augment))
def test_a_graph_is_kept_for_learnt_augmentation_alone(augment: Augment) -> None:
    """The validation forward and, where there is no warp to learn, the train forward keep no activations."""
    setting = Setting(augment, True, True)
    recorded: list[bool] = []

    def encoder(images: torch.Tensor) -> torch.Tensor:
        recorded.append(torch.is_grad_enabled())
        return setting.encoder(images)

    valid_grad = hypergrad.validation_gradient(
        encoder, setting.head, setting.valid_images, setting.valid_labels, solvers.identity_sum, 5
    )
    hypergradient(
        encoder, setting.head, setting.images, setting.labels, setting.draws, setting.rows, valid_grad,
        loss="kl", solve=IDENTITY, batch_size=SAMPLES, all_sum=solvers.identity_sum,
    )  # fmt: skip
    assert recorded == [False, augment != "none"]
    assert all(parameter.grad is None for parameter in setting.encoder.parameters())  # though it was not frozen


def ends(node: Any) -> set[int]:
    """The tensors at which a graph ends."""
    if hasattr(node, "variable"):
        return {id(node.variable)}
    return set().union(*(ends(following) for following, _ in node.next_functions if following is not None))


def test_a_frozen_encoder_follows_the_weights() -> None:
    """Made once, it must see later updates in place."""
    setting = Setting("none", False, False)
    encoder = hypergrad.frozen(setting.encoder)
    with torch.no_grad():
        setting.encoder[0].weight.mul_(2)
    assert torch.equal(encoder(setting.images), setting.encoder(setting.images))


@pytest.mark.parametrize("solve", [IDENTITY, NEUMANN], ids=lambda solve: solve.solver)
def test_nothing_learnt_gives_no_rows(solve: Solve) -> None:
    found = Setting("none", False, False).found("cross_entropy", solve)
    assert found.grads == Rows()
    assert found.cosine.isfinite()


@pytest.mark.parametrize("loss", get_args(Loss))
def test_no_validation_gradient_gives_no_row_gradient(loss: Loss) -> None:
    setting = Setting("per_sample", True, True)
    setting.valid_grad = lambda: torch.zeros(CLASSES, FEATURES + 1, dtype=torch.float64)  # type: ignore[method-assign]
    found = setting.found(loss, NEUMANN)
    assert all((value == 0).all() for value in vars(found.grads).values())
    assert found.eigenvalue == 0


@pytest.mark.parametrize("solve", [IDENTITY, NEUMANN], ids=lambda solve: solve.solver)
def test_float32_is_close_to_float64(solve: Solve) -> None:
    """With the stream's draws in float64 for both."""
    single, double = (Setting("per_sample", True, True, dtype).found("symmetric_kl", solve).grads
                      for dtype in (torch.float32, torch.float64))  # fmt: skip
    for name in NAMES:
        value, expected = getattr(single, name), getattr(double, name)
        assert value.dtype == torch.float32
        assert (value - expected).norm() <= 1e-4 * expected.norm()


# ------------------------------------------------------------------------------------------------------- small parts


def test_weights_are_one_and_pictures_unchanged_where_not_learnt() -> None:
    setting = Setting("none", False, False)
    assert hypergrad.augmented(setting.images, setting.rows, setting.draws) is setting.images
    assert hypergrad.sample_weights(setting.rows, setting.draws[:, 0]).tolist() == [1.0] * SAMPLES


def test_augmented_pictures_share_or_own_their_gates() -> None:
    """Shared gates: the same logits for all samples, each with its own draws; pictures keep their precision."""
    setting = Setting("shared", True, True)
    assert setting.rows.gate_logit is not None
    assert setting.rows.magnitude_logit is not None
    repeated = replace(
        setting.rows,
        gate_logit=setting.rows.gate_logit.repeat(SAMPLES, 1),
        magnitude_logit=setting.rows.magnitude_logit.repeat(SAMPLES, 1),
    )
    shared = hypergrad.augmented(setting.images, setting.rows, setting.draws)
    assert torch.equal(shared, hypergrad.augmented(setting.images, repeated, setting.draws))
    assert not torch.equal(shared, setting.images)
    assert hypergrad.augmented(setting.images.float(), setting.rows, setting.draws).dtype == torch.float32

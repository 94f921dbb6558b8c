"""A whole hyper step through encoder, gates, warp and head, against double backward and a dense Hessian."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from dataclasses import fields, replace
from typing import Any, Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from threads import ThreadRanks, over_threads
from torch import nn

from autodo_dist.method import hypergrad, warp
from autodo_dist.method.direction import Alone, Group, Solve
from autodo_dist.method.hypergrad import Hypergradient, Objective, Pictures, Rows, hypergradient
from autodo_dist.method.losses import Loss
from autodo_dist.method.solvers import Solver

SAMPLES, CLASSES, FEATURES, GLOBAL = 6, 4, 3, 10  # GLOBAL: the batch of all ranks, over which the loss is a mean
Augment = Literal["none", "per_sample", "shared"]
NAMES = tuple(field.name for field in fields(Rows))
IDENTITY, NEUMANN = Solve("identity"), Solve("neumann", terms=5, power_iterations=4)
ALONE = Alone()
SOLVES = {
    "identity": IDENTITY,
    "neumann": NEUMANN,
    "cg": Solve("cg", damping=0.1, cg_iterations=100, cg_tolerance=1e-13),
    "fisher": Solve("fisher", damping=0.1),
}
EACH = pytest.mark.parametrize("loss", get_args(Loss))
EACH_SOLVER = pytest.mark.parametrize("solver", get_args(Solver))
MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.25)
PICTURES = Pictures(functools.partial(warp.augment, mean=MEAN, std=STD))


class Setting:
    """A small convolutional encoder with BatchNorm in eval mode, a head, a train and a validation batch, and rows."""

    def __init__(
        self,
        augment: Augment,
        weight: bool,
        soft: bool,
        dtype: torch.dtype = torch.float64,
        operations: tuple[str, ...] = warp.AFFINE,
    ) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.encoder = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.CELU(), nn.Conv2d(5, FEATURES, 3, stride=2),
            nn.CELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ).to(dtype).eval()  # fmt: skip
        self.head = nn.Linear(FEATURES, CLASSES).to(dtype)
        with torch.no_grad():
            for parameter in (*self.encoder.parameters(), *self.head.parameters()):
                parameter.copy_(0.7 * normal(*parameter.shape))
            self.encoder[1].running_mean.copy_(normal(5))
            self.encoder[1].running_var.copy_(normal(5).square() + 0.5)
        self.images, self.valid_images = normal(SAMPLES, 3, 8, 8), normal(5, 3, 8, 8)
        self.labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        self.valid_labels = torch.randint(CLASSES, (5,), generator=generator)
        count = len(operations)
        self.draws = torch.rand(SAMPLES, 2 * count, generator=generator, dtype=torch.float64)
        gates = {"none": None, "per_sample": normal(2, SAMPLES, count), "shared": normal(2, count)}[augment]
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

    @property
    def shared(self) -> bool:
        """Whether all samples share their gates and magnitudes."""
        return self.rows.gate_logit is not None and self.rows.gate_logit.dim() == 1

    def part(self, cut: slice) -> Rows:
        """The rows of a part of the batch."""
        own = {"weight_logit", "soft_logit"} if self.shared else set(NAMES)
        rows = {
            name: value[cut] if value is not None and name in own else value for name, value in vars(self.rows).items()
        }
        return Rows(**rows)

    def found(
        self, loss: Loss, solve: Solve, cut: slice = slice(None), group: Group = ALONE, **changes: Any
    ) -> tuple[Rows, Hypergradient]:
        """The gradients of a part of the batch, put together as a hyper step does it, and what the head gave."""
        objective = Objective(**({"loss": loss, "batch_size": GLOBAL} | changes))
        images, draws = self.images[cut], self.draws[cut]
        rows, leaves = self.part(cut).with_leaves(len(images))
        features = hypergrad.frozen(self.encoder)(hypergrad.augmented(images, rows, draws, PICTURES))
        labels, valid_grad = self.labels[cut], self.valid_grad()
        found = hypergradient(features.detach(), self.head, labels, rows, valid_grad, objective, solve, group)
        gates = torch.autograd.grad(features, leaves, grad_outputs=found.feature_grad_BD) if leaves else ()
        return found.rows([gate.sum(0) if self.shared else gate for gate in gates]), found


def reference(
    setting: Setting,
    loss: Loss,
    solve: Solve,
    eigenvalue: torch.Tensor,
    normalise: bool = False,
    bias: bool = True,
    smoothing: float = 0.0,
    adjustment: torch.Tensor | None = None,
) -> tuple[Rows, torch.Tensor]:
    """By double backward: L(θ, λ) as a graph, V by a dense solve, then the gradient of ⟨∂L/∂θ, V⟩ for each row.

    For `fisher` by appendix C's product of first derivatives. Also H⁻¹g_v.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in vars(setting.rows).items() if value is not None}
    images = setting.images
    if "gate_logit" in leaves:
        gate, magnitude = (leaves[name].expand(SAMPLES, -1) for name in ("gate_logit", "magnitude_logit"))
        images = PICTURES.augment(images, warp.strengths(gate, magnitude, setting.draws))
    features = setting.encoder(images)

    def each(theta: torch.Tensor, features: torch.Tensor = features, loss: Loss = loss) -> torch.Tensor:
        """w_i l_i."""
        theta = theta.view(CLASSES, -1)
        logits = F.linear(features, theta[:, :FEATURES], theta[:, -1] if bias else setting.head.bias.detach())
        logits = logits if adjustment is None else logits + adjustment
        value = F.cross_entropy(logits, setting.labels, reduction="none", label_smoothing=smoothing)
        if "soft_logit" in leaves and loss != "cross_entropy":
            log_p, log_q = F.log_softmax(logits, 1), F.log_softmax(leaves["soft_logit"], 1)
            value = (log_q.exp() * (log_q - log_p)).sum(1)
            if loss == "symmetric_kl":
                value = (value + (log_p.exp() * (log_p - log_q)).sum(1)) / 2
        if "weight_logit" in leaves:
            weight = F.softplus(leaves["weight_logit"]) / math.log(2)
            value = value * (weight * GLOBAL / weight.sum() if normalise else weight)
        return value

    def total(theta: torch.Tensor, loss: Loss = loss) -> torch.Tensor:
        return each(theta, features.detach(), loss).sum() / GLOBAL

    columns = FEATURES + bias
    theta = torch.cat([setting.head.weight, setting.head.bias[:, None]], 1)[:, :columns].detach().flatten()
    theta.requires_grad_()
    valid_grad = setting.valid_grad()[:, :columns].flatten()
    eye = torch.eye(len(theta), dtype=torch.float64)
    inverse = valid_grad
    if solve.solver == "neumann":
        inverted: Loss = loss if solve.hessian == "exact" else "cross_entropy"
        dense = torch.autograd.functional.hessian(functools.partial(total, loss=inverted), theta.detach())
        powers = [torch.linalg.matrix_power(eye - dense / eigenvalue, j) for j in range(solve.terms + 1)]
        inverse = sum(powers) @ valid_grad / eigenvalue
        vectors = [torch.linalg.matrix_power(dense, n) @ valid_grad for n in range(solve.power_iterations + 1)]
        assert float(eigenvalue) == pytest.approx(float(vectors[-1].norm() / vectors[-2].norm()), rel=1e-12)
    if solve.solver == "cg":  # cross entropy's Hessian is the Gauss-Newton matrix of all three losses
        gauss_newton = torch.autograd.functional.hessian(functools.partial(total, loss="cross_entropy"), theta.detach())
        inverse = torch.linalg.solve(gauss_newton + solve.damping * eye, valid_grad)
    if solve.solver == "fisher":
        scores = torch.autograd.functional.jacobian(each, theta.detach())
        inverse = torch.linalg.solve(scores.T @ scores / GLOBAL + solve.damping * eye, valid_grad)
        factor = -(scores.detach() @ inverse) / GLOBAL
        scalar = (factor.detach() * each(theta.detach())).sum()
    elif leaves:
        (train_grad,) = torch.autograd.grad(each(theta).sum() / GLOBAL, theta, create_graph=True)
        scalar = (train_grad * -inverse).sum()
    if not leaves:
        return Rows(), inverse
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


@EACH_SOLVER
@pytest.mark.parametrize("augment", get_args(Augment))
@EACH
def test_row_gradients_against_double_backward(loss: Loss, augment: Augment, solver: Solver) -> None:
    """Every group of rows, learnt or not, and a global batch larger than this rank's."""
    solve = SOLVES[solver]
    for weight, soft in itertools.product([False, True], repeat=2):
        setting = Setting(augment, weight, soft)
        grads, found = setting.found(loss, solve)
        expected, inverse = reference(setting, loss, solve, found.eigenvalue)
        compare(grads, expected)
        cosine = F.cosine_similarity(inverse, setting.valid_grad().flatten(), dim=0)
        assert float(found.cosine) == pytest.approx(float(cosine), rel=1e-11)
        assert bool(found.eigenvalue.isnan()) == (solver != "neumann")
        if solver == "identity":
            assert float(found.cosine) == pytest.approx(1, rel=1e-14)
        else:
            assert found.cosine < 0.999  # the solver does something
        for name in NAMES:  # nothing passes for being zero
            value = getattr(grads, name)
            assert value is None or bool(value.any()) == (name != "soft_logit" or loss != "cross_entropy")


def test_neumann_on_gauss_newton_against_double_backward() -> None:
    """The row gradients are still the exact mixed derivative along that direction."""
    setting, solve = Setting("per_sample", True, True), replace(NEUMANN, hessian="gauss_newton")
    grads, found = setting.found("symmetric_kl", solve)
    compare(grads, reference(setting, "symmetric_kl", solve, found.eigenvalue)[0])
    exact = setting.found("symmetric_kl", NEUMANN)[0].soft_logit
    assert grads.soft_logit is not None
    assert exact is not None
    assert (grads.soft_logit - exact).norm() > 1e-3 * exact.norm()


@EACH_SOLVER
@EACH
def test_normalised_weights_against_double_backward(loss: Loss, solver: Solver) -> None:
    """The mean of the weights is part of the graph there."""
    setting = Setting("per_sample", True, True)
    grads, found = setting.found(loss, SOLVES[solver], normalise=True)
    compare(grads, reference(setting, loss, SOLVES[solver], found.eigenvalue, normalise=True)[0])
    plain = setting.found(loss, SOLVES[solver])[0]
    assert plain.weight_logit is not None
    assert grads.weight_logit is not None
    assert (plain.weight_logit - grads.weight_logit).norm() > 0.01 * plain.weight_logit.norm()


@EACH_SOLVER
def test_label_smoothing_against_double_backward(solver: Solver) -> None:
    """Of the loss that is trained on; the validation loss has none."""
    setting = Setting("per_sample", True, False)
    grads, found = setting.found("cross_entropy", SOLVES[solver], smoothing=0.2)
    compare(grads, reference(setting, "cross_entropy", SOLVES[solver], found.eigenvalue, smoothing=0.2)[0])
    plain = setting.found("cross_entropy", SOLVES[solver])[0]
    assert plain.weight_logit is not None
    assert grads.weight_logit is not None
    assert (plain.weight_logit - grads.weight_logit).norm() > 0.01 * plain.weight_logit.norm()


@EACH_SOLVER
@EACH
def test_logit_adjustment_against_double_backward(loss: Loss, solver: Solver) -> None:
    """Of the logits that are trained on; those of validation have none."""
    setting, adjustment = Setting("per_sample", True, True), torch.tensor([0.1, 0.6, 0.05, 0.25]).double().log()
    grads, found = setting.found(loss, SOLVES[solver], adjustment_C=adjustment)
    compare(grads, reference(setting, loss, SOLVES[solver], found.eigenvalue, adjustment=adjustment)[0])
    plain = setting.found(loss, SOLVES[solver])[0]
    assert plain.weight_logit is not None
    assert grads.weight_logit is not None
    assert (plain.weight_logit - grads.weight_logit).norm() > 0.01 * plain.weight_logit.norm()


@EACH_SOLVER
@pytest.mark.parametrize("augment", ["per_sample", "shared"])
def test_color_against_double_backward(augment: Augment, solver: Solver) -> None:
    setting = Setting(augment, True, True, operations=(*warp.AFFINE, *warp.COLOR))
    grads, found = setting.found("symmetric_kl", SOLVES[solver])
    compare(grads, reference(setting, "symmetric_kl", SOLVES[solver], found.eigenvalue)[0])
    assert grads.gate_logit is not None
    assert (grads.gate_logit[..., len(warp.AFFINE) :] != 0).any()


@EACH_SOLVER
def test_without_bias_theta_is_the_weights(solver: Solver) -> None:
    setting = Setting("per_sample", True, True)
    with_bias = setting.found("symmetric_kl", SOLVES[solver])[0].soft_logit
    valid_grad = setting.valid_grad()
    valid_grad[:, -1] = 0
    setting.valid_grad = lambda: valid_grad  # type: ignore[method-assign]
    grads, found = setting.found("symmetric_kl", SOLVES[solver], bias=False)
    compare(grads, reference(setting, "symmetric_kl", SOLVES[solver], found.eigenvalue, bias=False)[0])
    assert grads.soft_logit is not None
    assert with_bias is not None
    assert (grads.soft_logit - with_bias).norm() > 1e-3 * with_bias.norm()


@pytest.mark.parametrize("solver", ["identity", "neumann"])
def test_the_mean_is_over_the_global_batch(solver: Solver) -> None:
    """Identity: gradients go as 1/batch_size. Neumann with the step 1/μ: H, μ and so H⁻¹ undo it."""
    setting = Setting("per_sample", True, True)
    small, large = (setting.found("symmetric_kl", SOLVES[solver], batch_size=size)[0] for size in (6, 18))
    share = 3 if solver == "identity" else 1
    compare(Rows(*(share * getattr(large, name) for name in NAMES)), small)


@EACH_SOLVER
@pytest.mark.parametrize("space", ["parameter", "sample"])
@pytest.mark.parametrize("normalise", [False, True])
def test_two_ranks_give_what_one_gives(normalise: bool, space: Any, solver: Solver) -> None:
    """Threads as ranks, with uneven parts; a shared gradient is the sum of the ranks' own."""
    solve = replace(SOLVES[solver], space=space)
    for augment in ("per_sample", "shared"):
        setting = Setting(augment, True, True)

        def one(group: ThreadRanks, setting=setting) -> tuple[Rows, Hypergradient]:
            part = (slice(0, 2), slice(2, None))[group.rank]
            return setting.found("symmetric_kl", solve, part, group, normalise=normalise)

        halves = over_threads(2, one)
        grads, whole = setting.found("symmetric_kl", solve, normalise=normalise)
        joined = {}
        for name in NAMES:
            parts = [getattr(half, name) for half, _ in halves]
            shared = augment == "shared" and name in ("gate_logit", "magnitude_logit")
            joined[name] = sum(parts) if shared else torch.cat(parts)
        compare(Rows(**joined), grads)
        for _, half in halves:
            assert float(half.eigenvalue) == pytest.approx(float(whole.eigenvalue), rel=1e-12, nan_ok=True)
            assert float(half.cosine) == pytest.approx(float(whole.cosine), rel=1e-12)


@pytest.mark.parametrize("augment", get_args(Augment))
def test_a_rank_without_samples_takes_part(augment: Augment) -> None:
    """The last batch of a pass may leave a rank's piece empty; its sums over ranks still run."""
    setting = Setting(augment, True, True)

    class Counting(Alone):
        sums = 0

        def sum(self, value: torch.Tensor) -> torch.Tensor:
            Counting.sums += 1
            return value + 1

    grads, _ = setting.found("symmetric_kl", NEUMANN, slice(0, 0), Counting())
    assert Counting.sums == NEUMANN.terms + NEUMANN.power_iterations
    for name in NAMES:
        value, row = getattr(grads, name), getattr(setting.rows, name)
        assert value is None or (value == 0).all()
        assert (value is None) == (row is None)
        shared = augment == "shared" and name in ("gate_logit", "magnitude_logit")
        assert value is None or value.shape == (row.shape if shared else (0, *row.shape[1:]))


def test_validation_gradient_against_autograd() -> None:
    """Also over two ranks: each divides by the size of both, the group adds. Without bias its column is zero."""
    setting = Setting("none", False, False)

    def part(cut: slice, other: torch.Tensor | float = 0.0, bias: bool = True) -> torch.Tensor:
        class Other(Alone):
            def sum(self, value: torch.Tensor) -> torch.Tensor:
                return value + other

        images, labels = setting.valid_images[cut], setting.valid_labels[cut]
        features = setting.encoder(images)
        found = features, setting.head(features)
        return hypergrad.validation_gradient(lambda _: found, images, labels, size=5, bias=bias, group=Other())

    expected = setting.valid_grad()
    first = part(slice(0, 2))
    for found in (part(slice(None)), part(slice(2, None), first)):
        assert (found - expected).norm() <= 1e-13 * expected.norm()
        assert not found.requires_grad
    without = part(slice(None), bias=False)
    assert torch.equal(without[:, :-1], part(slice(None))[:, :-1])
    assert (without[:, -1] == 0).all()


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
    setting.valid_grad = lambda: valid_grad  # type: ignore[method-assign]
    grads, found = setting.found("symmetric_kl", NEUMANN)
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
    for value in (*vars(grads).values(), *vars(found).values()):
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


@EACH_SOLVER
def test_nothing_learnt_gives_no_rows(solver: Solver) -> None:
    grads, found = Setting("none", False, False).found("cross_entropy", SOLVES[solver])
    assert grads == Rows()
    assert found.cosine.isfinite()


@EACH_SOLVER
@EACH
def test_no_validation_gradient_gives_no_row_gradient(loss: Loss, solver: Solver) -> None:
    setting = Setting("per_sample", True, True)
    setting.valid_grad = lambda: torch.zeros(CLASSES, FEATURES + 1, dtype=torch.float64)  # type: ignore[method-assign]
    grads, found = setting.found(loss, SOLVES[solver])
    assert all((value == 0).all() for value in vars(grads).values())
    assert found.eigenvalue.isnan() if solver != "neumann" else found.eigenvalue == 0


@EACH_SOLVER
def test_float32_is_close_to_float64(solver: Solver) -> None:
    """With the stream's draws in float64 for both."""
    solve = replace(SOLVES[solver], cg_tolerance=1e-6)
    single, double = (Setting("per_sample", True, True, dtype).found("symmetric_kl", solve)[0]
                      for dtype in (torch.float32, torch.float64))  # fmt: skip
    for name in NAMES:
        value, expected = getattr(single, name), getattr(double, name)
        assert value.dtype == torch.float32
        assert (value - expected).norm() <= 1e-4 * expected.norm()


# ------------------------------------------------------------------------------------------------------- small parts


def test_weights_are_one_and_pictures_unchanged_where_not_learnt() -> None:
    setting = Setting("none", False, False)
    assert hypergrad.augmented(setting.images, setting.rows, setting.draws, PICTURES) is setting.images
    objective = Objective("kl", GLOBAL, normalise=True)
    assert hypergrad.sample_weights(setting.rows, setting.draws[:, 0], objective, Alone()).tolist() == [1.0] * SAMPLES


def test_normalised_weights_have_mean_one() -> None:
    setting = Setting("none", True, False)
    weights = hypergrad.sample_weights(setting.rows, setting.draws[:, 0], Objective("kl", GLOBAL, True), Alone())
    assert float(weights.sum()) == pytest.approx(GLOBAL, rel=1e-14)


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
    shared = hypergrad.augmented(setting.images, setting.rows, setting.draws, PICTURES)
    assert torch.equal(shared, hypergrad.augmented(setting.images, repeated, setting.draws, PICTURES))
    assert not torch.equal(shared, setting.images)
    assert hypergrad.augmented(setting.images.float(), setting.rows, setting.draws, PICTURES).dtype == torch.float32

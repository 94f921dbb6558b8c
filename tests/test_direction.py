"""H⁻¹g_v as a hyper step asks for it: whose samples, which space, how large a step. Against dense matrices."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from threads import over_threads

from autodo_dist.errors import AutodoError
from autodo_dist.method import direction, losses
from autodo_dist.method.direction import Alone, Group, HeadBatch, Inverse, Solve, inverse_product
from autodo_dist.method.losses import Loss
from autodo_dist.method.solvers import Solver

EACH = pytest.mark.parametrize("loss", get_args(Loss))
SOLVERS = pytest.mark.parametrize("solver", get_args(Solver))
SPACES = pytest.mark.parametrize("space", ["parameter", "sample"])
PARTS = (slice(0, 2), slice(2, 2), slice(2, 7), slice(7, 10))  # of four ranks, one of them without samples


class Problem:
    """A batch at the last layer, a validation gradient, and the dense Hessian of (1/B) Σ w_i l_i."""

    def __init__(self, loss: Loss, samples: int = 10, classes: int = 3, features: int = 5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.theta, self.valid_grad = normal(classes, features + 1), normal(classes, features + 1)
        h = torch.cat([normal(samples, features), torch.ones(samples, 1, dtype=torch.float64)], 1)
        self.batch = HeadBatch(
            loss=loss,
            h_BD=h,
            logits_BC=h @ self.theta.T,
            weight_B=torch.rand(samples, generator=generator, dtype=torch.float64) + 0.1,
            labels_B=torch.randint(classes, (samples,), generator=generator),
            soft_logit_BC=None if loss == "cross_entropy" else 2 * normal(samples, classes),
        )

    def part(self, cut: slice) -> HeadBatch:
        """Some of its samples."""
        values = {field.name: getattr(self.batch, field.name) for field in fields(HeadBatch)}
        return HeadBatch(**{name: value[cut] if torch.is_tensor(value) else value for name, value in values.items()})

    def dense(self) -> torch.Tensor:
        """By double backward; θ as one vector, row after row."""
        batch = self.batch

        def value(theta: torch.Tensor) -> torch.Tensor:
            logits = batch.h_BD @ theta.view_as(self.theta).T
            each = losses.sample_loss(batch.loss, logits, batch.labels_B, batch.soft_logit_BC)
            return (batch.weight_B * each).mean()

        return torch.autograd.functional.hessian(value, self.theta.flatten())

    def found(self, solve: Solve) -> Inverse:
        """On one rank."""
        return inverse_product(self.batch, self.valid_grad, solve, len(self.batch.h_BD), Alone())


class Nobody:
    """A group that must not be asked."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    join = sum


def over_ranks(function: Callable[[int, Group], Inverse], ranks: int = len(PARTS)) -> list[Inverse]:
    """What each rank's call gives."""
    return over_threads(ranks, lambda group: function(group.rank, group))


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm()


def series(dense: torch.Tensor, start: torch.Tensor, step: float, terms: int) -> list[torch.Tensor]:
    """The summands (I − αH)^j g_v."""
    factor = torch.eye(len(dense), dtype=torch.float64) - step * dense
    return [torch.linalg.matrix_power(factor, j) @ start.flatten() for j in range(terms + 1)]


def solve_of(solver: Solver, **changes: object) -> Solve:
    return replace(
        Solve(solver, terms=7, power_iterations=3, damping=0.1, cg_iterations=60, cg_tolerance=1e-12), **changes
    )


# ------------------------------------------------------------------------------------------------------------ one rank


@EACH
@SPACES
@SOLVERS
def test_each_solver_against_the_dense_matrix(loss: Loss, space: str, solver: Solver) -> None:
    """Neumann of the whole Hessian, cg of Gauss-Newton, which is that of cross entropy, Fisher of the scores."""
    problem = Problem(loss)
    found = problem.found(solve_of(solver, space=space))
    start, dense = problem.valid_grad.flatten(), problem.dense()
    damping = 0.1 * torch.eye(len(dense), dtype=torch.float64)
    if solver == "identity":
        assert found.value_CD is problem.valid_grad
    elif solver == "neumann":
        vectors = [torch.linalg.matrix_power(dense, n) @ start for n in (2, 3)]
        eigenvalue = vectors[1].norm() / vectors[0].norm()
        near(found.eigenvalue, eigenvalue)
        near(found.value_CD.flatten(), sum(series(dense, start, 1 / eigenvalue, 7)) / eigenvalue)
    elif solver == "cg":
        problem.batch = replace(problem.batch, loss="cross_entropy")
        near(found.value_CD.flatten(), torch.linalg.solve(problem.dense() + damping, start), 1e-11)
    else:
        scores = (problem.batch.weight_B[:, None] * problem.batch.delta_BC)[:, :, None] * problem.batch.h_BD[:, None]
        fisher = scores.flatten(1).T @ scores.flatten(1) / 10
        near(found.value_CD.flatten(), torch.linalg.solve(fisher + damping, start))
    assert bool(found.eigenvalue.isnan()) == (solver != "neumann")


@SPACES
@pytest.mark.parametrize("step", [None, 0.01])
def test_the_original_sum_has_no_factor(space: str, step: float | None) -> None:
    problem = Problem("symmetric_kl")
    found = problem.found(solve_of("neumann", space=space, step=step, factor=False))
    alpha = step or float(1 / found.eigenvalue)
    near(found.value_CD.flatten(), sum(series(problem.dense(), problem.valid_grad, alpha, 7)))


@SPACES
@pytest.mark.parametrize(
    "factor",
    [True, False],
)
def test_nothing_to_invert_moves_nothing(space: str, factor: bool) -> None:
    """All weights 0."""
    problem = Problem("symmetric_kl")
    problem.batch = replace(problem.batch, weight_B=torch.zeros(10, dtype=torch.float64))
    found = problem.found(solve_of("neumann", space=space, factor=factor))
    assert (found.value_CD == 0).all()
    assert found.eigenvalue == 0


# ---------------------------------------------------------------------------------------------------------------- ranks


@EACH
@SPACES
@SOLVERS
def test_ranks_give_what_one_gives(loss: Loss, space: str, solver: Solver) -> None:
    """Uneven parts, one of them empty: every rank finds the direction of the global batch."""
    problem, solve = Problem(loss), solve_of(solver, space=space)
    expected = problem.found(solve)
    results = over_ranks(
        lambda rank, group: inverse_product(problem.part(PARTS[rank]), problem.valid_grad, solve, 10, group)
    )
    for found in results:
        near(found.value_CD, expected.value_CD, 1e-11 if solver == "cg" else 1e-12)
        if solver == "neumann":
            near(found.eigenvalue, expected.eigenvalue)


@EACH
@SPACES
@SOLVERS
def test_per_rank_asks_nobody(loss: Loss, space: str, solver: Solver) -> None:
    """A rank's own samples are all there is, and their number is the batch size."""
    problem, solve = Problem(loss), solve_of(solver, space=space)
    for cut in PARTS:
        part = problem.part(cut)
        found = inverse_product(part, problem.valid_grad, replace(solve, curvature="per_rank"), 10, Nobody())
        size = max(1, len(part.h_BD))
        expected = inverse_product(part, problem.valid_grad, replace(solve, curvature="global"), size, Alone())
        assert torch.equal(found.value_CD, expected.value_CD)
        assert torch.equal(found.eigenvalue, expected.eigenvalue) or solver != "neumann"


@SPACES
def test_a_rank_without_samples_has_no_curvature(space: str) -> None:
    """Nothing but the damping, where there is one."""
    problem = Problem("kl")
    for solver, share in {"identity": 1, "neumann": 0, "cg": 10, "fisher": 10}.items():
        solve = solve_of(solver, space=space, curvature="per_rank")
        found = inverse_product(problem.part(slice(0, 0)), problem.valid_grad, solve, 10, Nobody())
        torch.testing.assert_close(found.value_CD, share * problem.valid_grad, rtol=1e-14, atol=0)


@EACH
def test_joined_batches_are_the_whole(loss: Loss) -> None:
    """What curvature reads, in the order of ranks; labels stay."""
    problem = Problem(loss)

    def one(rank: int, group: Group) -> HeadBatch:
        return problem.part(PARTS[rank]).join(group)

    for cut, joined in zip(PARTS, over_ranks(one), strict=True):
        for name in ("h_BD", "logits_BC", "weight_B", "soft_logit_BC"):
            whole = getattr(problem.batch, name)
            assert getattr(joined, name) is None if whole is None else torch.equal(getattr(joined, name), whole)
        assert torch.equal(joined.labels_B, problem.batch.labels_B[cut])


# ------------------------------------------------------------------------------------------------------ step too large


def hidden() -> tuple[Problem, torch.Tensor]:
    """A g_v nearly orthogonal to the eigenvector of the largest eigenvalue, so that one power iteration misses it.

    Nearly all of it has a fiftieth of that eigenvalue. The share of the largest is far above rounding, which the
    series magnifies as much. Also the dense Hessian.
    """
    problem = Problem("cross_entropy")
    dense = problem.dense()
    values, vectors = torch.linalg.eigh(dense)
    start = vectors[:, int((values - values[-1] / 50).abs().argmin())] + 1e-4 * vectors[:, -1]
    problem.valid_grad = start.view_as(problem.theta)
    return problem, dense


@SPACES
@pytest.mark.parametrize("terms", [5, 20])
def test_a_diverging_series_is_made_again(space: str, terms: int, caplog: pytest.LogCaptureFixture) -> None:
    """With the step of the largest eigenvalue that it met; said once in a process."""
    problem, dense = hidden()
    start = problem.valid_grad.flatten()
    estimate = (dense @ start).norm() / start.norm()
    met = max(float((dense @ v).norm() / v.norm()) for v in series(dense, start, 1 / estimate, terms)[:-1])
    assert met > 2 * estimate
    direction._say_shrunk.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = problem.found(Solve("neumann", terms=terms, power_iterations=1, space=space))
            near(found.value_CD.flatten(), sum(series(dense, start, 1 / met, terms)) / met, 1e-9)
    assert [record.name for record in caplog.records] == ["autodo_dist.method.direction"]
    assert "hyper.power_iterations" in caplog.text


@SPACES
@pytest.mark.parametrize(("power_iterations", "excess"), [(1, 4.0), (30, 1.01)])
def test_a_given_step_that_is_too_large_is_refused(space: str, power_iterations: int, excess: float) -> None:
    """By the eigenvalue that the series met, or the power iterations found; just below the bound it is taken."""
    problem, dense = hidden()
    bound = 2 / float(torch.linalg.matrix_norm(dense, 2))
    too_large = Solve("neumann", 20, power_iterations, step=excess * bound, space=space)
    with pytest.raises(AutodoError) as error:
        problem.found(too_large)
    words = re.fullmatch(
        r"hyper.neumann_step = (\S+): the series diverges, the largest eigenvalue is at least (\S+); "
        r"in another run.name set it below (\S+), or to null",
        str(error.value),
    )
    assert words is not None
    step, eigenvalue, below = (float(word) for word in words.groups())
    assert step == pytest.approx(excess * bound, rel=1e-5)
    assert eigenvalue == pytest.approx(2 / bound, rel=1e-2)
    assert below == pytest.approx(bound, rel=1e-2)
    just = 0.99 * bound
    found = problem.found(replace(too_large, step=just)).value_CD.flatten()
    near(found, just * sum(series(dense, problem.valid_grad, just, 20)), 1e-11)


def test_a_series_that_has_converged_does_not_pass_for_diverging(caplog: pytest.LogCaptureFixture) -> None:
    """One sample, two classes and g_v its own gradient: one step ends the series, and only rounding is left."""
    direction._say_shrunk.cache_clear()
    for seed in range(20):
        problem = Problem("cross_entropy", 1, 2, 6, seed)
        problem.valid_grad = problem.batch.delta_BC.T @ problem.batch.h_BD
        in_theta, in_samples = (problem.found(solve_of("neumann", space=space)) for space in ("parameter", "sample"))
        near(in_samples.value_CD, in_theta.value_CD)
    assert not caplog.records

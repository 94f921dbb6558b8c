"""Hessian-vector products and solvers at the last layer, against dense matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from autodo_dist.method import losses, solvers
from autodo_dist.method.losses import Loss
from autodo_dist.method.solvers import Product

SAMPLES, CLASSES, FEATURES = 7, 4, 5
EACH = pytest.mark.parametrize("loss", get_args(Loss))


class Problem:
    """Σ c_i l_i as a function of θ = (W, b) on random features, its dense Hessian and the product under test."""

    def __init__(self, loss: Loss, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.loss: Loss = loss
        self.weight, self.bias, self.direction = (
            normal(CLASSES, FEATURES),
            normal(CLASSES),
            normal(CLASSES, FEATURES + 1),
        )
        self.features, self.soft = normal(SAMPLES, FEATURES), 2 * normal(SAMPLES, CLASSES)
        self.labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        self.coefficient = torch.rand(SAMPLES, generator=generator, dtype=torch.float64) / 11

    def value(self, theta: torch.Tensor) -> torch.Tensor:
        """The loss at θ, W before b in one vector."""
        weight, bias = theta[: CLASSES * FEATURES].view(CLASSES, FEATURES), theta[CLASSES * FEATURES :]
        logits = torch.nn.functional.linear(self.features, weight, bias)
        return (self.coefficient * losses.sample_loss(self.loss, logits, self.labels, self.soft)).sum()

    def dense(self) -> torch.Tensor:
        return torch.autograd.functional.hessian(self.value, torch.cat([self.weight.flatten(), self.bias]))

    def product(
        self, part: slice = slice(None), all_sum: Callable[[torch.Tensor], torch.Tensor] = solvers.identity_sum
    ) -> Product:
        features, soft = self.features[part], self.soft[part]
        curve = functools.partial(losses.curvature, self.loss, features @ self.weight.T + self.bias, soft)
        ones = torch.ones(len(features), 1, dtype=torch.float64)
        return solvers.hessian_product(torch.cat([features, ones], 1), self.coefficient[part], curve, all_sum)


def flat(direction: torch.Tensor) -> torch.Tensor:
    """A C × (D + 1) direction as a vector, W before b."""
    return torch.cat([direction[:, :-1].flatten(), direction[:, -1]])


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


def spd(seed: int, size: int = 6) -> torch.Tensor:
    """Eigenvalues between 1/2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.linspace(0.5, 3.0, size, dtype=torch.float64)) @ basis.T


def vector(size: int = 6, seed: int = 9) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- product


@EACH
def test_product_is_the_dense_hessians(loss: Loss) -> None:
    """Of the loss over all of (W, b), by double backward."""
    problem = Problem(loss)
    near(flat(problem.product()(problem.direction)), problem.dense() @ flat(problem.direction))


@EACH
def test_products_of_parts_add_up(loss: Loss) -> None:
    """What a sum over ranks relies on; a part may be empty."""
    problem = Problem(loss)
    cuts = [slice(0, 3), slice(3, 3), slice(3, None)]
    near(sum(problem.product(cut)(problem.direction) for cut in cuts), problem.product()(problem.direction))
    rest = problem.product(slice(3, None))(problem.direction)
    first = problem.product(slice(0, 3), lambda value: value + rest)
    near(first(problem.direction), problem.product()(problem.direction))


# ------------------------------------------------------------------------------------------------------------- Neumann


@EACH
@pytest.mark.parametrize("terms", [0, 1, 5, 20])
def test_neumann_is_its_own_definition(loss: Loss, terms: int) -> None:
    """α Σ_{j=0..T} (I − αH)^j v by powers of the dense matrix: T products, T + 1 summands."""
    problem = Problem(loss)
    dense = problem.dense()
    step = 0.7 / torch.linalg.matrix_norm(dense, 2)
    factor = torch.eye(len(dense), dtype=torch.float64) - step * dense
    expected = step * sum(torch.linalg.matrix_power(factor, j) for j in range(terms + 1)) @ flat(problem.direction)
    calls = 0

    def product(direction: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return problem.product()(direction)

    near(flat(solvers.neumann(product, problem.direction, step, terms)), expected)
    assert calls == terms


def test_neumann_tends_to_the_solution() -> None:
    """The error is (I − αH)^(T+1) of it: after 400 terms with α = 1/3, (5/6)^401 = 2e-32."""
    matrix, right = spd(0), vector()
    solution = torch.linalg.solve(matrix, right)
    near(solvers.neumann(lambda v: matrix @ v, right, 1 / 3, 400), solution)
    rest = torch.linalg.matrix_power(torch.eye(6, dtype=torch.float64) - matrix / 3, 6) @ solution
    near(solution - solvers.neumann(lambda v: matrix @ v, right, 1 / 3, 5), rest)


# --------------------------------------------------------------------------------------------------- largest eigenvalue


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("iterations", [1, 2, 5, 30])
def test_power_iterations_are_those_of_the_dense_matrix(sign: int, iterations: int) -> None:
    matrix, start = sign * spd(1), vector()
    before, after = (torch.linalg.matrix_power(matrix, n) @ start for n in (iterations - 1, iterations))
    found = solvers.largest_eigenvalue(lambda v: matrix @ v, start, iterations)
    near(found, after.norm() / before.norm())


@EACH
def test_largest_eigenvalue_is_reached_from_below(loss: Loss) -> None:
    problem = Problem(loss)
    norm = torch.linalg.matrix_norm(problem.dense(), 2)
    found = [solvers.largest_eigenvalue(problem.product(), problem.direction, n) for n in (1, 2, 3, 5, 8, 20, 500)]
    assert all(a <= b + 1e-12 for a, b in zip(found, [*found[1:], norm], strict=True))
    assert found[0] < 0.99 * norm
    near(found[-1], norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_iterate_on_gives_zero(dtype: torch.dtype) -> None:
    zero, start = torch.zeros(3, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    for product, begin in ((lambda v: 2 * v, zero), (lambda v: 0 * v, start), (lambda v: 0 * v, zero)):
        found = solvers.largest_eigenvalue(product, begin, 5)
        assert found == 0
        assert found.dtype == dtype
    assert solvers.largest_eigenvalue(lambda v: 2 * v, start, 0).dtype == dtype
    assert solvers.largest_eigenvalue(lambda v: 2 * v, 1e12 * start, 5) == pytest.approx(2)

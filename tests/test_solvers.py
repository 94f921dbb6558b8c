"""Products with H and solvers at the last layer, in both spaces, against dense matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autodo_dist.method import losses, solvers
from autodo_dist.method.losses import Loss
from autodo_dist.method.solvers import Space

EACH = pytest.mark.parametrize("loss", get_args(Loss))
SHAPES = pytest.mark.parametrize(  # B, C, D: fewer samples than features, and more
    ("samples", "classes", "features"), [(4, 3, 6), (9, 4, 3)], ids=["B<D", "B>D"]
)
ZEROS = pytest.mark.parametrize("zeros", [False, True], ids=["all_weights", "some_zero"])
CURVES = pytest.mark.parametrize("gauss_newton", [False, True], ids=["full", "gauss_newton"])
SPACES = pytest.mark.parametrize("space", ["parameter", "sample"])
DAMPINGS = (1e-4, 1e-2, 0.3, 10)


class Problem:
    """Σ c_i l_i as a function of θ = (W, b) on random features, its dense Hessian, and both spaces.

    zeros: every third sample weighs nothing. agree: the soft labels are the predictions.
    """

    def __init__(
        self,
        loss: Loss,
        samples: int = 7,
        classes: int = 4,
        features: int = 5,
        zeros: bool = False,
        agree: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.loss: Loss = loss
        self.theta, self.valid_grad = normal(classes, features + 1), normal(classes, features + 1)
        self.h = torch.cat([normal(samples, features), torch.ones(samples, 1, dtype=torch.float64)], 1)
        self.logits = self.h @ self.theta.T
        self.soft = self.logits.clone() if agree else 2 * normal(samples, classes)
        self.labels = torch.randint(classes, (samples,), generator=generator)
        self.weight = torch.rand(samples, generator=generator, dtype=torch.float64) + 0.1
        if zeros:
            self.weight[::3] = 0
        self.coefficient = self.weight / 11

    def losses_at(self, theta: torch.Tensor) -> torch.Tensor:
        """Each sample's l_i at θ."""
        logits = torch.nn.functional.linear(self.h[:, :-1], theta[:, :-1], theta[:, -1])
        return losses.sample_loss(self.loss, logits, self.labels, self.soft)

    def dense(self) -> torch.Tensor:
        """The Hessian of Σ c_i l_i by double backward; θ as one vector, row after row."""

        def value(theta: torch.Tensor) -> torch.Tensor:
            return (self.coefficient * self.losses_at(theta.view_as(self.theta))).sum()

        return torch.autograd.functional.hessian(value, self.theta.flatten())

    def curve(self, gauss_newton: bool = False, part: slice = slice(None)) -> Callable[[torch.Tensor], torch.Tensor]:
        if gauss_newton:
            return functools.partial(losses.spread, torch.softmax(self.logits[part], 1))
        return functools.partial(losses.curvature, self.loss, self.logits[part], self.soft[part])

    def parameter(self, gauss_newton: bool = False) -> Space:
        return solvers.parameter_space(self.h, self.coefficient, self.curve(gauss_newton), self.valid_grad)

    def sample(self, gauss_newton: bool = False) -> Space:
        return solvers.sample_space(self.h, self.coefficient, self.curve(gauss_newton), self.valid_grad)

    def space(self, name: str, gauss_newton: bool = False) -> Space:
        return {"parameter": self.parameter, "sample": self.sample}[name](gauss_newton)

    def scores(self) -> torch.Tensor:
        """w_i·∂l_i/∂θ by autograd, one row a sample."""
        jacobian = torch.autograd.functional.jacobian(self.losses_at, self.theta)
        return self.weight[:, None] * jacobian.flatten(1)


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm()


def counted(space: Space) -> tuple[Space, list[None]]:
    """The space, and a list that grows by one with each product."""
    calls: list[None] = []

    def product(vector: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return space.product(vector)

    return Space(space.start, product, space.dot, space.direction), calls


def plain(matrix: torch.Tensor, start: torch.Tensor) -> Space:
    """A dense matrix's own space."""
    return Space(start, lambda v: matrix @ v, lambda v, w: (v * w).sum(), lambda v: v)


def eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def spd(seed: int, size: int = 6) -> torch.Tensor:
    """Eigenvalues between 1/2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.linspace(0.5, 3.0, size, dtype=torch.float64)) @ basis.T


def vector(size: int = 6, seed: int = 9) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- product


@EACH
@SHAPES
@ZEROS
def test_product_is_the_dense_hessians(loss: Loss, samples: int, classes: int, features: int, zeros: bool) -> None:
    """Of the loss over all of (W, b), by double backward."""
    problem = Problem(loss, samples, classes, features, zeros)
    space = problem.parameter()
    assert space.start is problem.valid_grad
    near(space.product(space.start).flatten(), problem.dense() @ problem.valid_grad.flatten())


@EACH
def test_products_of_parts_add_up(loss: Loss) -> None:
    """What a sum over ranks relies on; a part may be empty."""
    problem = Problem(loss)

    def product(part: slice, **arguments: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        coefficient, curve = problem.coefficient[part], problem.curve(part=part)
        space = solvers.parameter_space(problem.h[part], coefficient, curve, problem.valid_grad, **arguments)
        return space.product(problem.valid_grad)

    whole, rest = product(slice(None)), product(slice(3, None))
    near(sum(product(part) for part in (slice(0, 3), slice(3, 3), slice(3, None))), whole)
    near(product(slice(0, 3), all_sum=lambda value: value + rest), whole)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
@ZEROS
def test_gauss_newton_is_the_hessian_of_cross_entropy_and_kl(loss: Loss, zeros: bool) -> None:
    problem = Problem(loss, zeros=zeros)
    product = problem.parameter(gauss_newton=True).product(problem.valid_grad)
    near(product.flatten(), problem.dense() @ problem.valid_grad.flatten())


def test_gauss_newton_is_the_symmetric_kls_hessian_where_label_and_prediction_agree() -> None:
    for agree in (True, False):
        problem = Problem("symmetric_kl", agree=agree)
        product = problem.parameter(gauss_newton=True).product(problem.valid_grad).flatten()
        expected = problem.dense() @ problem.valid_grad.flatten()
        assert bool((product - expected).norm() <= 1e-12 * expected.norm()) == agree
        lowest = torch.linalg.eigvalsh(problem.dense())[0]
        assert bool(lowest > -1e-12) == agree  # away from p = q the Hessian is not positive semidefinite


# --------------------------------------------------------------------------------------------------------- both spaces


@EACH
@SHAPES
@ZEROS
@CURVES
def test_sample_space_is_parameter_space(
    loss: Loss, samples: int, classes: int, features: int, zeros: bool, gauss_newton: bool
) -> None:
    """Vectors of the form a·g_v + Yᵀh: their direction, products and inner products are those in θ."""
    problem = Problem(loss, samples, classes, features, zeros)
    theirs, ours = problem.parameter(gauss_newton), problem.sample(gauss_newton)
    pairs = []
    for space in (ours, theirs):
        once = space.product(space.start)
        twice = space.product(once)
        pairs.append((space.start, once, twice, 0.3 * space.start - 1.7 * once + 0.9 * twice))
    assert torch.equal(ours.direction(ours.start), problem.valid_grad)
    for own, v in zip(*pairs, strict=True):
        near(ours.direction(own), v)
        near(ours.direction(ours.product(own)), theirs.product(v))
        near(solvers.norm(ours, own), v.norm())
        for other, w in zip(*pairs, strict=True):
            assert abs(ours.dot(own, other) - (v * w).sum()) <= 1e-12 * v.norm() * w.norm()
    for terms in (0, 1, 5, 20):
        step = 0.7 / torch.linalg.matrix_norm(problem.dense(), 2)
        (found, seen), (expected, bound) = (solvers.neumann(space, step, terms) for space in (ours, theirs))
        near(ours.direction(found), expected)
        near(seen, bound, 1e-11)
    for iterations in (1, 2, 5, 30):
        near(solvers.largest_eigenvalue(ours, iterations), solvers.largest_eigenvalue(theirs, iterations))
    if gauss_newton:
        for iterations in (1, 2, 4):
            found, expected = (solvers.conjugate_gradients(space, 0.05, iterations, 0)[0] for space in (ours, theirs))
            near(ours.direction(found), expected, 1e-10)


# ------------------------------------------------------------------------------------------------------------- Neumann


@EACH
@SPACES
@ZEROS
def test_neumann_is_its_own_definition(loss: Loss, space: str, zeros: bool) -> None:
    """α Σ_{j=0..T} (I − αH)^j g_v by powers of the dense matrix: T products, T + 1 summands; and the largest ratio."""
    problem = Problem(loss, zeros=zeros)
    dense, start = problem.dense(), problem.valid_grad.flatten()
    step = 0.7 / torch.linalg.matrix_norm(dense, 2)
    summands = [torch.linalg.matrix_power(eye(len(dense)) - step * dense, j) @ start for j in range(21)]
    ratios = [float((dense @ v).norm() / v.norm()) for v in summands]
    for terms in (0, 1, 5, 20):
        own, calls = counted(problem.space(space))
        found, seen = solvers.neumann(own, step, terms)
        near(own.direction(found).flatten(), step * sum(summands[: terms + 1]))
        assert len(calls) == terms
        assert float(seen) == pytest.approx(max(ratios[:terms], default=0.0), rel=1e-11)


def test_neumann_tends_to_the_solution() -> None:
    """The error is (I − αH)^(T+1) of it: after 400 terms with α = 1/3, (5/6)^401 = 2e-32."""
    matrix, right = spd(0), vector()
    solution = torch.linalg.solve(matrix, right)
    near(solvers.neumann(plain(matrix, right), 1 / 3, 400)[0], solution)
    rest = torch.linalg.matrix_power(eye(6) - matrix / 3, 6) @ solution
    near(solution - solvers.neumann(plain(matrix, right), 1 / 3, 5)[0], rest)


def test_neumann_sees_the_largest_eigenvalue_where_it_diverges() -> None:
    """The summands turn towards it: their ratio tends to it from below, until 5^600 leaves the numbers' range."""
    matrix, right = spd(0), vector()
    bounds = [float(solvers.neumann(plain(matrix, right), 2.0, terms)[1]) for terms in (1, 2, 5, 200, 600)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(3, rel=1e-12)


@SPACES
def test_neumann_of_nothing_is_nothing(space: str) -> None:
    problem = Problem("kl")
    problem.valid_grad = torch.zeros_like(problem.valid_grad)
    own = problem.space(space)
    found, seen = solvers.neumann(own, 0.1, 5)
    assert (own.direction(found) == 0).all()
    assert seen == 0


# --------------------------------------------------------------------------------------------------- largest eigenvalue


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("iterations", [1, 2, 5, 30])
def test_power_iterations_are_those_of_the_dense_matrix(sign: int, iterations: int) -> None:
    matrix, start = sign * spd(1), vector()
    before, after = (torch.linalg.matrix_power(matrix, n) @ start for n in (iterations - 1, iterations))
    space, calls = counted(plain(matrix, start))
    near(solvers.largest_eigenvalue(space, iterations), after.norm() / before.norm())
    assert len(calls) == iterations


@EACH
@SPACES
def test_largest_eigenvalue_is_reached_from_below(loss: Loss, space: str) -> None:
    problem = Problem(loss)
    norm = torch.linalg.matrix_norm(problem.dense(), 2)
    found = [solvers.largest_eigenvalue(problem.space(space), n) for n in (1, 2, 3, 5, 8, 20, 500)]
    assert all(a <= b + 1e-12 for a, b in zip(found, [*found[1:], norm], strict=True))
    assert found[0] < 0.99 * norm
    near(found[-1], norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_iterate_on_gives_zero(dtype: torch.dtype) -> None:
    zero, ones = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    double, nothing = 2 * torch.eye(3, dtype=dtype), torch.zeros(3, 3, dtype=dtype)
    for matrix, start in ((double, zero), (nothing, ones), (nothing, zero)):
        found = solvers.largest_eigenvalue(plain(matrix, start), 5)
        assert found == 0
        assert found.dtype == dtype
    assert solvers.largest_eigenvalue(plain(double, 1e12 * ones), 5) == pytest.approx(2)


# -------------------------------------------------------------------------------------------------- conjugate gradients


@EACH
@SHAPES
@ZEROS
def test_conjugate_gradients_solve(loss: Loss, samples: int, classes: int, features: int, zeros: bool) -> None:
    """(H_GN + μI)⁻¹g_v by a dense solve; H_GN is the Hessian of cross entropy, whatever the loss."""
    problem = Problem(loss, samples, classes, features, zeros)
    dense = Problem("cross_entropy", samples, classes, features, zeros).dense()
    for space in (problem.parameter(gauss_newton=True), problem.sample(gauss_newton=True)):
        for damping in DAMPINGS:
            expected = torch.linalg.solve(dense + damping * eye(len(dense)), problem.valid_grad.flatten())
            found = solvers.conjugate_gradients(space, damping, 100, 1e-12)[0]
            near(space.direction(found).flatten(), expected, 1e-11)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_conjugate_gradients_are_the_best_in_the_krylov_space(iterations: int) -> None:
    """After n products: the solution of the system projected on the span of g, …, A^(n−1)g."""
    matrix, start, damping = spd(2), vector(), 0.2
    system = matrix + damping * eye(6)
    powers = torch.stack([torch.linalg.matrix_power(system, n) @ start for n in range(iterations)], 1)
    basis = torch.linalg.qr(powers)[0]
    expected = basis @ torch.linalg.solve(basis.T @ system @ basis, basis.T @ start)
    near(solvers.conjugate_gradients(plain(matrix, start), damping, iterations, 0)[0], expected, 1e-11)


@SPACES
@pytest.mark.parametrize("tolerance", [0.5, 1e-1, 1e-3, 1e-6])
def test_conjugate_gradients_end_at_the_tolerance(space: str, tolerance: float) -> None:
    """At the first residual whose norm, of the dense system, is below its share of the right side's."""
    problem, damping = Problem("kl", 9, 4, 3), 0.05
    own, calls = counted(problem.space(space, gauss_newton=True))
    found = solvers.conjugate_gradients(own, damping, 100, tolerance)[0]
    products, start = len(calls), problem.valid_grad.flatten()
    system = problem.dense() + damping * eye(len(start))
    sizes = []
    for n in range(products + 1):
        solution = own.direction(solvers.conjugate_gradients(own, damping, n, 0)[0]).flatten()
        sizes.append(float((start - system @ solution).norm() / start.norm()))
    assert all(size > tolerance for size in sizes[:-1])
    assert sizes[-1] <= tolerance
    assert torch.equal(found, solvers.conjugate_gradients(own, damping, products, 0)[0])


@SPACES
def test_conjugate_gradients_of_nothing_are_nothing(space: str) -> None:
    problem = Problem("kl")
    problem.valid_grad = torch.zeros_like(problem.valid_grad)
    own, calls = counted(problem.space(space, gauss_newton=True))
    assert (own.direction(solvers.conjugate_gradients(own, 0.1, 5, 1e-3)[0]) == 0).all()
    assert not calls


@pytest.mark.parametrize("curvature", [0.0, -0.5])
def test_conjugate_gradients_end_where_rounding_leaves_no_curvature(curvature: float) -> None:
    """In sample space small inner products may come out at 0 or below; the solution so far is what there is."""
    space = plain((curvature - 0.5) * eye(3), vector(3))
    assert (solvers.conjugate_gradients(space, 0.5, 10, 1e-12)[0] == 0).all()


# -------------------------------------------------------------------------------------------------------------- Fisher


def fisher(problem: Problem, damping: float, batch_size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    delta = losses.logit_grad(problem.loss, problem.logits, problem.labels, problem.soft)
    parts = (problem.h, problem.weight[:, None] * delta, problem.valid_grad)
    return solvers.fisher(*(part.to(dtype) for part in parts), damping, batch_size)


@EACH
@ZEROS
@pytest.mark.parametrize(
    ("samples", "classes", "features", "batch_size"), [(4, 3, 6, 4), (30, 3, 3, 30), (7, 4, 5, 20)], ids=str
)
def test_fisher_against_a_dense_solve(
    loss: Loss, zeros: bool, samples: int, classes: int, features: int, batch_size: int
) -> None:
    """(F + μI)⁻¹g_v, F = (1/B) Σ u_i u_iᵀ; fewer samples than parameters (4 to 21), and more (30 to 12)."""
    problem = Problem(loss, samples, classes, features, zeros)
    scores = problem.scores()
    matrix = scores.T @ scores / batch_size
    for damping in DAMPINGS:
        expected = torch.linalg.solve(matrix + damping * eye(len(matrix)), problem.valid_grad.flatten())
        near(fisher(problem, damping, batch_size).flatten(), expected, 1e-12 * max(1, 0.1 / damping))


@EACH
@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_fisher_in_float32_is_close_to_float64(loss: Loss, damping: float) -> None:
    problem = Problem(loss, 30, 3, 3)
    found = fisher(problem, damping, 30, torch.float32)
    assert found.dtype == torch.float32
    near(found.double(), fisher(problem, damping, 30), 1e-4)


# ------------------------------------------------------------------------------------------------------- cheaper space


def operations(build: Callable[[], Space], products: int) -> int:
    """Those of matrix products, counted, of a Neumann sum in the space."""
    with FlopCounterMode(display=False) as counter:
        space = build()
        eigenvalue = solvers.largest_eigenvalue(space, 1)
        space.direction(solvers.neumann(space, 1 / eigenvalue, products - 1)[0])
    return counter.get_total_flops()


def test_the_cheaper_space_has_fewer_operations() -> None:
    """On each rank, with the batch spread evenly; more ranks never turn the choice towards sample space."""
    named = []
    for samples in (4, 8):
        for classes, features, products in [(2, 3, 1), (3, 20, 2), (10, 6, 5)]:
            problem = Problem("kl", samples, classes, features - 1)
            sample = operations(problem.sample, products)
            choices = []
            for ranks in (1, 2, 4):
                part = Problem("kl", samples // ranks, classes, features - 1)
                parameter = operations(part.parameter, products)
                choices.append(solvers.cheaper_space(samples, ranks, classes, features, products))
                assert choices[-1] == ("sample" if sample < parameter else "parameter")
            assert choices == sorted(choices, reverse=True)  # "sample" before "parameter"
            named += choices
    assert set(named) == {"sample", "parameter"}


@pytest.mark.parametrize(
    ("batch", "classes", "features", "alone"),
    [(256, 1000, 513, "sample"), (256, 10, 641, "parameter"), (4096, 1000, 2049, "parameter")],
    ids=str,
)
def test_more_ranks_favour_parameter_space(batch: int, classes: int, features: int, alone: str) -> None:
    """ImageNet's head of ResNet-18, the head of WRN-28-10, and ResNet-50's with a batch above twice its features."""
    choices = [solvers.cheaper_space(batch, 2**n, classes, features, 10) for n in range(12)]
    assert choices == sorted(choices, reverse=True)
    assert choices[0] == alone
    assert choices[-1] == "parameter"

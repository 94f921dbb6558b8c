"""H⁻¹g_v by the solver asked for: whose samples H is made of, and in which space the solver iterates.

Shapes: B samples of this rank, C classes, D features; a direction in θ is C × (D + 1), the bias last.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from autodo_dist.errors import AutodoError
from autodo_dist.method import losses, solvers
from autodo_dist.method.losses import Loss
from autodo_dist.method.solvers import Solver, Space

log = logging.getLogger(__name__)
Curvature = Literal["global", "per_rank"]
Hessian = Literal["exact", "gauss_newton"]


class Group(Protocol):
    """What the method needs of the ranks. Both are collectives: every rank must call them, in the same order."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        ...

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in the order of ranks."""
        ...


class Alone:
    """One rank."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The value itself."""
        return value

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows themselves."""
        return rows


@dataclass(frozen=True)
class Solve:
    """How H⁻¹g_v is found; the fields are those of `config.Hyper`.

    terms, power_iterations, step: of the Neumann series, α Σ_{j=0..terms} (I − αH)^j g_v with α = `step`, or 1/μ_max
    by power iterations where that is None; `factor` is its leading α (the original code has none). hessian: what the
    series inverts; the symmetric KL's own Hessian is indefinite away from p = q, where a long series grows. damping: μ
    of cg and fisher. curvature: H over the global batch, or each rank's own. space: see solvers.Space.
    """

    solver: Solver
    terms: int = 5
    power_iterations: int = 5
    step: float | None = None
    factor: bool = True
    hessian: Hessian = "exact"
    damping: float = 1e-3
    cg_iterations: int = 20
    cg_tolerance: float = 1e-3
    curvature: Curvature = "global"
    space: Literal["parameter", "sample"] = "parameter"


@dataclass(frozen=True)
class HeadBatch:
    """What the last layer sees of a batch. h: features with a last column of ones; weight: w_i; smoothing: α."""

    loss: Loss
    h_BD: torch.Tensor
    logits_BC: torch.Tensor
    weight_B: torch.Tensor
    labels_B: torch.Tensor
    soft_logit_BC: torch.Tensor | None
    smoothing: float = 0.0

    @functools.cached_property
    def delta_BC(self) -> torch.Tensor:
        """δ_i = ∂l_i/∂z_i."""
        return losses.logit_grad(self.loss, self.logits_BC, self.labels_B, self.soft_logit_BC, self.smoothing)

    def curve(self, zeta_BC: torch.Tensor) -> torch.Tensor:
        """A_iζ_i."""
        return losses.curvature(self.loss, self.logits_BC, self.soft_logit_BC, zeta_BC)

    def gauss_newton(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """ζ -> S(p)ζ: the Hessian at p = q, positive semidefinite everywhere."""
        return functools.partial(losses.spread, torch.softmax(self.logits_BC, 1))

    def join(self, group: Group) -> HeadBatch:
        """The batch of all ranks, for curvature alone: labels stay behind."""
        soft = self.soft_logit_BC
        parts = [self.h_BD, self.weight_B[:, None], self.logits_BC, *([] if soft is None else [soft])]
        joined = group.join(torch.cat(parts, 1)).split([part.shape[1] for part in parts], 1)
        return replace(
            self,
            h_BD=joined[0],
            weight_B=joined[1][:, 0],
            logits_BC=joined[2],
            soft_logit_BC=None if soft is None else joined[3],
        )


@dataclass(frozen=True)
class Inverse:
    """H⁻¹g_v, and the estimate of H's largest eigenvalue (nan where the solver needs none)."""

    value_CD: torch.Tensor
    eigenvalue: torch.Tensor


def inverse_product(
    batch: HeadBatch, valid_grad_CD: torch.Tensor, solve: Solve, batch_size: int, group: Group
) -> Inverse:
    """H⁻¹g_v for the loss (1/B) Σ w_i l_i over the `batch_size` samples of all ranks, or over this rank's own.

    Every rank must call this, unless curvature is per rank.
    """
    nothing = torch.full((), torch.nan, dtype=valid_grad_CD.dtype, device=valid_grad_CD.device)
    if solve.solver == "identity":
        return Inverse(valid_grad_CD, nothing)
    if solve.curvature == "per_rank":
        group, batch_size = Alone(), max(1, len(batch.h_BD))
    if solve.solver == "fisher":
        own = torch.cat([batch.h_BD, batch.weight_B[:, None] * batch.delta_BC], 1)
        h, score = group.join(own).split([batch.h_BD.shape[1], batch.logits_BC.shape[1]], 1)
        return Inverse(solvers.fisher(h, score, valid_grad_CD, solve.damping, batch_size), nothing)
    space = space_of(batch, valid_grad_CD, solve, batch_size, group)
    if solve.solver == "cg":
        found, converged = solvers.conjugate_gradients(space, solve.damping, solve.cg_iterations, solve.cg_tolerance)
        if not converged:
            _say_unconverged()
        return Inverse(space.direction(found), nothing)
    total, eigenvalue = neumann(space, solvers.largest_eigenvalue(space, solve.power_iterations), solve)
    return Inverse(space.direction(total), eigenvalue)


def space_of(batch: HeadBatch, valid_grad_CD: torch.Tensor, solve: Solve, batch_size: int, group: Group) -> Space:
    """The space to iterate in, with H or the Gauss-Newton matrix, which is always cg's."""
    if solve.space == "sample":
        batch = batch.join(group)
    exact = solve.solver == "neumann" and solve.hessian == "exact"
    curve = batch.curve if exact else batch.gauss_newton()
    coefficient_B = batch.weight_B / batch_size
    if solve.space == "sample":
        return solvers.sample_space(batch.h_BD, coefficient_B, curve, valid_grad_CD)
    return solvers.parameter_space(batch.h_BD, coefficient_B, curve, valid_grad_CD, group.sum)


def neumann(space: Space, eigenvalue: torch.Tensor, solve: Solve) -> tuple[torch.Tensor, torch.Tensor]:
    """The Neumann sum with α = `solve.step`, or else 1/`eigenvalue`; and the largest eigenvalue that came up.

    The estimate of the eigenvalue may be too small. If the sum meets a larger one that makes it diverge, it is made
    again with the α of that one, with a warning; AutodoError where α was given.
    """
    # Without curvature (all weights near 0) there is nothing to invert, and rows stay where they are.
    flat = eigenvalue <= torch.finfo(eigenvalue.dtype).eps
    step = torch.where(flat, 0.0, 1 / eigenvalue) if solve.step is None else torch.full_like(eigenvalue, solve.step)
    total, seen = solvers.neumann(space, step, solve.terms)
    largest = torch.maximum(seen, eigenvalue)
    while step * largest >= 2:
        if solve.step is not None:
            raise AutodoError(
                f"hyper.neumann_step = {solve.step:g}: the series diverges, the largest eigenvalue is at least "
                f"{largest:.3g}; in another run.name set it below {1.99 / largest:.3g}, or to null"
            )
        _say_shrunk()
        step = 1 / largest
        total, seen = solvers.neumann(space, step, solve.terms)
        largest = torch.maximum(seen, largest)
    return (total if solve.factor else torch.where(step > 0, total / step, total)), largest


@functools.cache
def _say_shrunk() -> None:
    """Once in a process."""
    log.warning(
        "Neumann step: power iterations found too small an eigenvalue and the series diverged; made again with a "
        "smaller step. Raise hyper.power_iterations"
    )


@functools.cache
def _say_unconverged() -> None:
    """Once in a process."""
    log.warning(
        "conjugate gradients ended before hyper.cg_tolerance: the direction is that of a truncated solve. "
        "Raise hyper.cg_iterations or hyper.damping for more of one"
    )

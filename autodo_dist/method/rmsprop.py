"""RMSprop on the rows that a step touches, equal to dense RMSprop fed zeros for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autodo_dist.method.rounding import random_words, to_bfloat16


@dataclass(frozen=True)
class Rmsprop:
    """Decay ρ of the second moment and the ε below it; momentum 0, not centred, no weight decay."""

    decay: float = 0.99
    eps: float = 1e-8


def computed_in(stored: torch.dtype) -> torch.dtype:
    """The type in which rows of a table are computed."""
    return torch.float32 if stored == torch.bfloat16 else stored


def touch(
    value_nP: torch.Tensor,
    second_nP: torch.Tensor,
    touched_n: torch.Tensor,
    rows_B: torch.Tensor,
    ids_B: torch.Tensor,
    grads_BP: torch.Tensor,
    *,
    lr: float,
    step: int,
    rule: Rmsprop,
) -> None:
    """Update rows_B (no row twice) of the table in place at step t = `step` (counted from 1).

    With τ_i the step that touched row i last (0: none did):
    v_i ← ρ^(t−τ_i) v_i + (1−ρ) g_i², λ_i ← λ_i − lr·g_i/(√v_i + ε), τ_i ← t. Rows that are left out need nothing: a
    zero gradient only decays v (Tieleman & Hinton 2012; torch.optim.RMSprop's arithmetic). A bfloat16 table is computed
    in float32 and rounded stochastically; ids_B, the rows' names on any number of ranks, are for that.
    """
    dtype = computed_in(value_nP.dtype)
    age = (step - touched_n[rows_B]).to(torch.float64)
    decay = torch.pow(torch.full_like(age, rule.decay), age).to(dtype)
    # In place, and by index_select: on the CPU that is several times faster than indexing and new tensors.
    second = second_nP.index_select(0, rows_B).to(dtype).mul_(decay[:, None])
    second.addcmul_(grads_BP, grads_BP, value=1 - rule.decay)
    value = value_nP.index_select(0, rows_B).to(dtype).addcdiv_(grads_BP, second.sqrt().add_(rule.eps), value=-lr)
    if value_nP.dtype == torch.bfloat16:
        words = random_words(step, ids_B, value.shape[1])
        value, second = to_bfloat16(value, words), to_bfloat16(second, words >> 16)
    value_nP.index_copy_(0, rows_B, value)
    second_nP.index_copy_(0, rows_B, second)
    touched_n[rows_B] = step


def sum_duplicates(rows_B: torch.Tensor, grads_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row once, sorted, with the sum of its gradients in the order in which they came."""
    rows, where = torch.unique(rows_B, return_inverse=True)
    total = grads_BP.new_zeros(len(rows), grads_BP.shape[1])
    return rows, total.index_add_(0, where, grads_BP)

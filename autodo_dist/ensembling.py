"""Soft labels that follow what the network says: temporal ensembling, by Bayes' rule.

A network tells wrong labels from right ones before it memorises them. So a running mean of its predictions of each
sample is kept (Laine & Aila, "Temporal ensembling for semi-supervised learning", ICLR 2017; its first one whole),

    p̄_i ← β·p̄_i + (1 − β)·softmax(z_i + τ·log π),

with the class prior π of logit adjustment (class_prior.py), and what a soft label starts from is, in place of the given
label y_i alone, the posterior of the true one by both:

    P_i(c) ∝ p̄_i(c)·P(y_i | c),    P(y | c) = Q_yc / Σ_y' Q_y'c,    Q_yc = Σ_{i: y_i = y} p̄_i(c)

P(y | c) is the label transition matrix (Patrini et al., CVPR 2017): how often a picture of class c is given as y. It is
estimated anew when an epoch begins. FLOOR is added to p̄, PSEUDOCOUNT to Q. λ^S_i moves by as much as
log[(1 − α)·P_i + α/C] does, α = learn.smoothing; what hypergradients have added to it stays on top. Shapes: n rows of
this rank, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autodo_dist.method.rmsprop import computed_in
from autodo_dist.parallel.row_table import RowTable

FLOOR = 1e-4  # of a mean prediction, so that what follows from P(y | c) can overrule a network that is certain
PSEUDOCOUNT = 0.01  # samples, for every pair of a given and a true label
BLOCK = 1 << 22  # values that are looked at together


def posterior(mean_nC: torch.Tensor, log_transition_nC: torch.Tensor) -> torch.Tensor:
    """P_i of mean predictions and log P(y_i | ·)."""
    return torch.softmax((mean_nC + FLOOR).log() + log_transition_nC, 1)


def log_transition(sum_CC: torch.Tensor) -> torch.Tensor:
    """The logarithm of P(y | c), given × true, by the sums Q of mean predictions by given label."""
    counts_CC = sum_CC + PSEUDOCOUNT
    return (counts_CC / counts_CC.sum(0)).log()


class Ensemble:
    """The mean predictions of this rank's rows of a table, and what they make soft labels start from.

    Soft labels do not follow before the first `renew` that finds predictions; they are gathered from the beginning.
    """

    def __init__(
        self, table: RowTable, given_n: npt.NDArray[np.int32], classes: int, momentum: float, smoothing: float
    ) -> None:
        """For the rows of `table` on this rank, which have these given labels."""
        self.table, self.momentum, self.smoothing = table, momentum, smoothing
        self.given_n = torch.from_numpy(given_n).long().to(table.device)
        self.mean_nC = table.value_nP.new_zeros(len(given_n), classes)  # 0 throughout: not seen yet
        self.log_transition_CC: torch.Tensor | None = None  # soft labels do not follow yet

    def base(self, rows: torch.Tensor, log_transition_CC: torch.Tensor | None) -> torch.Tensor:
        """log[(1 − α)·P_i + α/C] of rows by that matrix; P_i is the given label as long as nothing else is known."""
        given_n, classes = self.given_n[rows], self.mean_nC.shape[1]
        mean_nC = self.mean_nC[rows].to(computed_in(self.mean_nC.dtype))
        share_nC = torch.zeros_like(mean_nC).scatter_(1, given_n[:, None], 1.0)
        if log_transition_CC is not None:
            seen_n1 = mean_nC.sum(1, keepdim=True) > 0
            share_nC = torch.where(seen_n1, posterior(mean_nC, log_transition_CC[given_n]), share_nC)
        return ((1 - self.smoothing) * share_nC + self.smoothing / classes).log()

    def note(self, rows: torch.Tensor, share_nC: torch.Tensor, step: int) -> torch.Tensor:
        """Take in new predictions of rows, no row twice, from task step `step`; what their soft logits move by."""
        before_nC, old_nC = self.base(rows, self.log_transition_CC), self.mean_nC[rows].to(share_nC)
        seen_n1 = old_nC.sum(1, keepdim=True) > 0
        mean_nC = torch.where(seen_n1, self.momentum * old_nC + (1 - self.momentum) * share_nC, share_nC)
        self.mean_nC[rows] = self.table.rounded(rows, mean_nC, step, 48)
        return self.base(rows, self.log_transition_CC) - before_nC

    def renew(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Estimate P(y | c) anew from the rows of all ranks: rows, in blocks, and what their soft logits move by.

        Every rank must call this, and take all blocks.
        """
        classes, ranks = self.mean_nC.shape[1], self.table.ranks
        sum_CC = torch.zeros(classes, classes, dtype=torch.float64, device=self.table.device)
        blocks = torch.arange(len(self.given_n), device=self.table.device).split(max(1, BLOCK // classes))
        for rows in blocks:
            sum_CC.index_add_(0, self.given_n[rows], self.mean_nC[rows].double())
        total_CC = ranks.sum(sum_CC.to(ranks.device))
        if not total_CC.any():
            return
        before_CC = self.log_transition_CC
        self.log_transition_CC = log_transition(total_CC).to(self.table.device, computed_in(self.mean_nC.dtype))
        for rows in blocks:
            yield rows, self.base(rows, self.log_transition_CC) - self.base(rows, before_CC)

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs, the mean predictions sharded over the ranks. Every rank must call this."""
        transition_CC, classes = self.log_transition_CC, self.mean_nC.shape[1]
        follows = transition_CC is not None
        if transition_CC is None:
            transition_CC = self.mean_nC.new_zeros(classes, classes, dtype=computed_in(self.mean_nC.dtype))
        mean_NC = self.table.sharded(self.mean_nC)
        return {"mean": mean_NC, "log_transition": transition_CC, "follows": torch.tensor(follows)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, from any number of ranks."""
        self.mean_nC = state["mean"].to_local()
        self.log_transition_CC = state["log_transition"] if state["follows"] else None

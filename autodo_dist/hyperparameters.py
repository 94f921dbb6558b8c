"""What AutoDO learns: per sample in a sharded table, or shared by all samples, behind one fetch and one step.

A sample's row holds, as far as they are learnt, K gate logits, K magnitude logits, one weight logit and C soft logits.
Shared gates and magnitudes are one row of 2K values that every rank keeps, its gradient summed over samples and ranks.
As every batch has its part in that row, it is stepped only where the validation gradient is new, which saves the
backward for λ^A elsewhere. RMSprop's second moment takes the steps between for gradients of 0. Where one step in E is
made it is the E-th part of the mean square, the step √E times as long, and √E times the rate makes it as long as E
steps, as if every one had had that gradient.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from autodo_dist.ensembling import BLOCK, Ensemble
from autodo_dist.errors import AutodoError
from autodo_dist.method import losses, warp
from autodo_dist.method.hypergrad import Rows
from autodo_dist.method.rmsprop import Rmsprop, computed_in, touch
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.row_queue import RowQueue
from autodo_dist.parallel.row_table import Ids, RowTable

log = logging.getLogger(__name__)
Augment = Literal["none", "shared", "per_sample"]


@dataclass(frozen=True)
class Layout:
    """Which columns of a row hold what; a group that is not learnt has none. `start` has a value per column, the soft
    logits' being that of the labels which were not given.
    """

    augment: Augment
    operations: tuple[str, ...]
    weight: bool
    classes: int  # 0 where soft labels are not learnt
    smoothing: float

    @property
    def widths(self) -> dict[str, int]:
        """Columns of each group, in their order."""
        gates = len(self.operations) if self.augment == "per_sample" else 0
        return {
            "gate_logit": gates,
            "magnitude_logit": gates,
            "weight_logit": int(self.weight),
            "soft_logit": self.classes,
        }

    @property
    def width(self) -> int:
        """P, the values of a row."""
        return sum(self.widths.values())

    def split(self, values_BP: torch.Tensor) -> dict[str, torch.Tensor]:
        """The groups of rows; the weight logit as a vector."""
        parts = zip(self.widths, values_BP.split(list(self.widths.values()), dim=1), strict=True)
        return {name: part.squeeze(1) if name == "weight_logit" else part for name, part in parts if self.widths[name]}

    def join(self, grads: Rows, ids_B: torch.Tensor) -> torch.Tensor:
        """Gradients of the groups as rows (B × P), for the samples with these ids."""
        parts = [getattr(grads, name).reshape(len(ids_B), width) for name, width in self.widths.items() if width]
        return torch.cat(parts, 1) if parts else torch.empty(len(ids_B), 0, device=ids_B.device)

    def start(self, labels_n: npt.NDArray[np.int32], dtype: torch.dtype) -> torch.Tensor:
        """Start values (n × P) of samples with these given labels: each column filled, then one entry a sample."""
        gate, magnitude = warp.start_logits()
        values = torch.empty(len(labels_n), self.width, dtype=dtype)
        for name, part in self.split(values).items():
            part.fill_({"gate_logit": gate, "magnitude_logit": magnitude}.get(name, 0.0))
        if self.classes:
            soft = losses.soft_logit_start(self.classes, self.smoothing)
            values[:, -self.classes :] = -soft
            values[torch.arange(len(labels_n)), self.width - self.classes + torch.from_numpy(labels_n).long()] = soft
        return values


def class_mass(groups: dict[str, torch.Tensor], labels_n: torch.Tensor, classes: int) -> torch.Tensor:
    """Σ_i w_i q_ic (C, float64) of samples with these labels; `groups` are those of their rows that are learnt."""
    weight_n = torch.ones(len(labels_n), dtype=torch.float64)
    if "weight_logit" in groups:
        weight_n = losses.weight(groups["weight_logit"]).double().cpu()
    if "soft_logit" in groups:
        return weight_n @ groups["soft_logit"].softmax(1).double().cpu()
    return torch.zeros(classes, dtype=torch.float64).index_add_(0, labels_n, weight_n)


class Hyperparameters:
    """The learnt hyperparameters of a run's train samples. Every method is a collective: every rank must call it.

    Rows travel on a thread of their own (RowQueue): those of the next batch while this one's step computes, gradients
    while the next one's does. The numbers are those of the plain order, fetch, step, apply, fetch, …, as long as the
    next batch shares no id with this one; so `fetch` may be told of the next batch of the same pass, in which no id
    comes twice, and the first batch of a pass is fetched after the last gradients of the pass before.

    With `guests` a sample of another part may come, too: it has no row, is fetched as one would start, with the label
    of label_N, and stays so.
    """

    def __init__(
        self,
        layout: Layout,
        ids: Ids,
        label_N: npt.NDArray[np.int32],
        ranks: Ranks,
        rule: Rmsprop,
        dtype: torch.dtype,
        most_bad_rows: int,
        table_dtype: torch.dtype | None = None,
        table_device: torch.device | None = None,
        *,
        guests: bool = False,
        ensembling: float = 0.0,
        shared_every: float = 1.0,
    ) -> None:
        """Start values for the sorted train `ids`; label_N are the given labels by id. The table's type and place are
        by default `dtype`, in which steps compute, and the ranks' device. ensembling: β of ensembling.py, 0 for none.
        shared_every: E, hyper steps for each step of the shared row.
        """
        table_dtype = dtype if table_dtype is None else table_dtype
        self.layout, self.label_N, self.most_bad_rows, self.guests = layout, label_N, most_bad_rows, guests
        self.ranks = ranks.twin()  # for the thread; others use them only while it rests
        self.queue = RowQueue(ranks.device)
        self._coming: tuple[torch.Tensor, Future[torch.Tensor]] | None = None  # the next batch's ids and values
        self.table = RowTable(
            ids, lambda mine: layout.start(label_N[mine], table_dtype), self.ranks, rule, table_device
        )
        gate, magnitude = warp.start_logits()
        operations = len(layout.operations)
        shared = torch.tensor([gate] * operations + [magnitude] * operations, dtype=dtype)
        self._shared_moves = False  # a step of the shared row may be under way
        self.shared, self.shared_every = SharedRow(shared, self.ranks, rule), shared_every
        self.ensemble = None
        if ensembling:
            given_n = label_N[self.table.my_ids]
            self.ensemble = Ensemble(self.table, given_n, layout.classes, ensembling, layout.smoothing)
        self.bad_rows = 0
        self._last_bad: tuple[int, list[int]] = 0, []  # hyper step and ids

    @property
    def shares(self) -> bool:
        """Whether all samples share gates and magnitudes."""
        return self.layout.augment == "shared"

    def fetch(self, ids_B: torch.Tensor, next_ids_B: torch.Tensor | None = None) -> Rows:
        """The hyperparameters of this rank's batch. `next_ids_B`: those of the fetch that comes next, which then begins
        now; no rank's may be among the ids that are stepped before it.
        """
        expected_B, now = self._coming or (ids_B, self.queue.submit(lambda: self._fetch(ids_B)))
        assert torch.equal(expected_B, ids_B), "the batch that was announced did not come"
        self._coming = None if next_ids_B is None else (next_ids_B, self.queue.submit(lambda: self._fetch(next_ids_B)))
        values_BP = now.result()
        self.queue.check()
        if values_BP.is_cuda:  # it was allocated on the other stream
            values_BP.record_stream(torch.cuda.current_stream())
        groups = self.layout.split(values_BP)
        if self.shares:
            if self._shared_moves:
                self.queue.drain()  # the one row is in every batch
                self._shared_moves = False
            groups["gate_logit"], groups["magnitude_logit"] = self.shared.value_P.chunk(2)
        return Rows(**groups)

    def rest(self) -> None:
        """Wait until the thread has nothing to do, so that the table and the group are this thread's to use.

        AutodoError on every rank if more than most_bad_rows were left out.
        """
        self.queue.drain()
        if self._coming is not None:
            wait([self._coming[1]])
        if self.bad_rows > self.most_bad_rows:
            step, named = self._last_bad
            raise AutodoError(
                f"hyper step {step}: {self.bad_rows} row gradients were not finite, last of ids {named}; "
                "lower hyper.lr or optim.lr, or raise hyper.most_bad_rows"
            )

    def _fetch(self, ids_B: torch.Tensor) -> torch.Tensor:
        if not self.layout.width:
            return torch.empty(len(ids_B), 0, device=self.ranks.device)
        if not self.guests:
            return self.table.fetch(ids_B)
        mine_B = self._have_rows(ids_B)
        values_BP = self.table.fetch(ids_B[mine_B])
        if len(values_BP) == len(ids_B):
            return values_BP
        whole_BP = self.layout.start(self.label_N[ids_B.cpu().numpy()], values_BP.dtype).to(values_BP.device)
        whole_BP[mine_B] = values_BP
        return whole_BP

    def _have_rows(self, ids_B: torch.Tensor) -> torch.Tensor:
        ids = self.table.ids
        wanted_B = ids_B.cpu().numpy()
        return torch.from_numpy(ids[np.searchsorted(ids, wanted_B).clip(max=len(ids) - 1)] == wanted_B).to(ids_B.device)

    def apply_grads(self, ids_B: torch.Tensor, grads: Rows, *, lr: float, step: int) -> None:
        """One RMSprop step, number `step` counted from 1; it may still be going on when this returns.

        A row whose gradient is not finite is left as it is, named in the log and counted; see `rest`.
        """
        self._shared_moves |= grads.gate_logit is not None
        self.queue.push(lambda: self._apply_grads(ids_B, grads, lr, step))

    def _apply_grads(self, ids_B: torch.Tensor, grads: Rows, lr: float, step: int) -> None:
        rows_BP = self.layout.join(grads, ids_B)
        finite_B = rows_BP.isfinite().all(1)
        gates = [part for part in (grads.gate_logit, grads.magnitude_logit) if part is not None]
        for part in gates:  # shared ones have no columns in a row
            finite_B &= part.isfinite().all(1)
        self._count_bad(ids_B[~finite_B], step)
        if self.layout.width:
            stepped_B = finite_B & self._have_rows(ids_B) if self.guests else finite_B
            self.table.apply_grads(ids_B[stepped_B], rows_BP[stepped_B], lr=lr, step=step)
        if self.shares and gates:
            self.shared.apply_grad(
                torch.cat(gates, 1)[finite_B].sum(0), lr=lr * math.sqrt(self.shared_every), step=step
            )

    def note_predictions(self, ids_B: torch.Tensor, logits_BC: torch.Tensor, step: int) -> None:
        """Have soft labels follow the predictions softmax(logits) of this rank's batch, made by task step `step`;
        nothing without ensembling. It may still be going on when this returns.
        """
        if self.ensemble is not None:
            share_BC = logits_BC.softmax(1).to(computed_in(self.table.value_nP.dtype))
            self.queue.push(lambda: self._note_predictions(ids_B, share_BC, step))

    def _note_predictions(self, ids_B: torch.Tensor, share_BC: torch.Tensor, step: int) -> None:
        assert self.ensemble is not None
        taken_B = share_BC.isfinite().all(1)
        if self.guests:
            taken_B &= self._have_rows(ids_B)
        rows, share_nC = self.table.deliver(ids_B[taken_B], share_BC[taken_B])
        self.table.add(rows, self._soft(self.ensemble.note(rows, share_nC, step)), step)

    def follow_predictions(self, step: int) -> None:
        """Have all soft labels follow from here on, by a new estimate of how labels are mistaken, before task step
        `step`; nothing without ensembling.
        """
        self.rest()
        if self.ensemble is not None:
            for rows, by_nC in self.ensemble.renew():
                self.table.add(rows, self._soft(by_nC), step)

    def _soft(self, by_nC: torch.Tensor) -> torch.Tensor:
        """Rows (n × P) that are 0 but for the soft logits."""
        return F.pad(by_nC, (self.layout.width - self.layout.classes, 0))

    def _count_bad(self, ids: torch.Tensor, step: int) -> None:
        bad = int(self.ranks.sum(torch.tensor(len(ids), device=self.ranks.device)))
        if not bad:
            return
        named = [id_ for part in self.ranks.gather(ids.tolist()) for id_ in part][:10]
        self.bad_rows += bad
        log.warning("hyper step %d: %d row gradients are not finite and left out, ids %s", step, bad, named)
        self._last_bad = step, named

    def facts(self) -> dict[str, float]:
        """Share of samples whose weight is below 1/2, and of those whose likeliest label is not the given one."""
        self.rest()
        weight_n, label_n = self._suggestions()
        given_n = torch.from_numpy(self.label_N[self.table.my_ids]).to(label_n)
        counts = torch.stack([(weight_n < 0.5).sum(), (label_n != given_n).sum()]).double().to(self.ranks.device)
        small, changed = (self.ranks.sum(counts) / max(1, len(self.table.ids))).tolist()
        return {"weights_below_half": small, "changed_labels": changed}

    def class_mass(self, classes: int) -> torch.Tensor:
        """Σ_i w_i q_ic (C, float64) of all train samples between two steps, of their given labels where λ^S is not
        learnt; on the CPU.
        """
        self.rest()
        mass_C = torch.zeros(classes, dtype=torch.float64)
        label_n = torch.from_numpy(self.label_N[self.table.my_ids]).to(torch.int64)
        for part, groups in self._blocks():
            mass_C += class_mass(groups, label_n[part], classes)
        return self.ranks.sum(mass_C.to(self.ranks.device)).cpu()

    def start_mass(self, ids_n: Ids, classes: int) -> torch.Tensor:
        """The same of samples without rows, at the start values that they keep: those of one class are all alike."""
        count_C = torch.from_numpy(np.bincount(self.label_N[ids_n], minlength=classes)).double()
        one = self.layout.split(self.layout.start(np.zeros(1, np.int32), torch.float64))
        mass_C = class_mass(one, torch.zeros(1, dtype=torch.int64), classes)
        return (mass_C[0] - mass_C[1]) * count_C + mass_C[1] * count_C.sum()

    def look_up(self, ids_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows (n × P) of some samples between two steps, and the hyper step that last changed each; on the CPU."""
        self.rest()
        return self._fetch(ids_n).cpu(), self.table.last_updates(ids_n).cpu()

    def _suggestions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and likeliest label of this rank's rows; 1 and the given label where not learnt."""
        label_n = torch.from_numpy(self.label_N[self.table.my_ids]).to(torch.int64)
        weight_n = torch.ones(len(label_n), dtype=torch.float64)
        for part, groups in self._blocks():
            if "weight_logit" in groups:
                weight_n[part] = losses.weight(groups["weight_logit"]).cpu()
            if "soft_logit" in groups:
                label_n[part] = groups["soft_logit"].argmax(1).cpu()
        return weight_n, label_n

    def _blocks(self) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """This rank's rows in blocks, each with its place and groups."""
        value_nP = self.table.value_nP
        rows = max(1, BLOCK // max(1, self.layout.width))
        for start in range(0, len(value_nP), rows):
            part = slice(start, start + rows)
            yield part, self.layout.split(value_nP[part].to(computed_in(value_nP.dtype)))

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs."""
        self.rest()
        bad_rows, ids = torch.tensor(self.bad_rows), digest(self.table.ids)
        state = {"rows": self.table.state(), "shared": self.shared.state(), "bad_rows": bad_rows, "ids": ids}
        return state if self.ensemble is None else state | {"ensemble": self.ensemble.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, on any number of ranks. AutodoError if its rows are of other samples."""
        if not torch.equal(state["ids"], digest(self.table.ids)):
            raise AutodoError(
                "checkpoint: its rows are of other samples than the train part of this run; take the checkpoints, "
                "data set and split of one run"
            )
        self.table.restore(state["rows"])
        self.shared.restore(state["shared"])
        if self.ensemble is not None:
            self.ensemble.restore(state["ensemble"])
        self.bad_rows = int(state["bad_rows"])


def digest(ids: Ids) -> torch.Tensor:
    """SHA-256 of the ids, 32 bytes: a table's rows are known by their ids alone."""
    found = hashlib.sha256(ids.astype("<i8").tobytes()).digest()
    return torch.tensor(list(found), dtype=torch.uint8)


class SharedRow:
    """One row that every rank keeps, updated alike on all by the sum of their gradients."""

    def __init__(self, value_P: torch.Tensor, ranks: Ranks, rule: Rmsprop) -> None:
        self.value_P, self.ranks, self.rule = value_P.to(ranks.device), ranks, rule
        self.second_P = torch.zeros_like(self.value_P)
        self.touched = torch.zeros(1, dtype=torch.int64, device=ranks.device)

    def apply_grad(self, grad_P: torch.Tensor, *, lr: float, step: int) -> None:
        """One RMSprop step with the sum over ranks of `grad_P`; left out if that is not finite."""
        total = self.ranks.sum(grad_P)
        if total.isfinite().all():
            table, row = (self.value_P[None], self.second_P[None], self.touched), torch.zeros_like(self.touched)
            touch(*table, row, row, total[None], lr=lr, step=step, rule=self.rule)

    def state(self) -> dict[str, torch.Tensor]:
        """Value, second moment and step of the last update."""
        return {"value": self.value_P, "second_moment": self.second_P, "touched": self.touched}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        self.value_P, self.second_P, self.touched = state["value"], state["second_moment"], state["touched"]

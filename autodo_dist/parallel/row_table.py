"""The sharded table: P values for each of N ids, every row on one rank, fetched and updated by all-to-all.

    fetch(ids):              ids -> their owners; values back, in the order of the ids
    apply_grads(ids, grads): ids and gradients -> their owners; duplicates summed; exact lazy RMSprop on those rows

Row i of the sorted ids belongs to rank i // ceil(N/R), the blocks of DTensor's Shard(0): so the state is saved and
loaded on any number of ranks. No rank ever holds the whole table, and a step costs the same whatever N is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from autodo_dist.errors import AutodoError
from autodo_dist.method.rmsprop import Rmsprop, computed_in, sum_duplicates, touch
from autodo_dist.method.rounding import random_words, to_bfloat16
from autodo_dist.parallel.comm import Ranks

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Route:
    """How one batch of ids travels: the order that sorts it by owner, the lengths of what this rank sends to and gets
    from each rank, and the rows of this rank's block that were asked for.
    """

    order_B: torch.Tensor
    sent: list[int]
    received: list[int]
    rows: torch.Tensor


class RowTable:
    """N rows of P values and their second moments; see the module."""

    def __init__(
        self,
        ids: Ids,
        start: Callable[[Ids], torch.Tensor],
        ranks: Ranks,
        rule: Rmsprop,
        device: torch.device | None = None,
    ) -> None:
        """A table for the sorted `ids`. `start` gives the start values (n × P) of the ids that it is asked for: this
        rank's block alone. They lie on `device`, by default the ranks'; main memory beside a GPU is pinned.
        """
        self.ids, self.ranks, self.rule = ids, ranks, rule
        self.block = max(1, -(-len(ids) // ranks.ranks))
        self.device = ranks.device if device is None else device
        pinned = self.device.type == "cpu" and ranks.device.type == "cuda"
        values = start(self.my_ids)
        self.value_nP = values.pin_memory() if pinned else values.to(self.device)
        self.second_nP = torch.zeros_like(self.value_nP, pin_memory=pinned)
        self.touched_n = torch.zeros(len(values), dtype=torch.int64, device=self.device)

    @property
    def my_ids(self) -> Ids:
        """The ids of this rank's rows, in the rows' order."""
        return self.ids[self.ranks.rank * self.block : (self.ranks.rank + 1) * self.block]

    def fetch(self, ids_B: torch.Tensor) -> torch.Tensor:
        """The values (B × P) of a batch's ids, on the ranks' device. Every rank must call this, each with its own ids.

        AutodoError for an id that has no row.
        """
        values_BP = self._collect(self.value_nP, self._route(ids_B))
        return values_BP.to(self.ranks.device, computed_in(values_BP.dtype))

    def last_updates(self, ids_B: torch.Tensor) -> torch.Tensor:
        """The number of the hyper step that last changed each id's row, 0 for none; otherwise as `fetch`."""
        return self._collect(self.touched_n, self._route(ids_B)).to(self.ranks.device)

    def apply_grads(self, ids_B: torch.Tensor, grads_BP: torch.Tensor, *, lr: float, step: int) -> None:
        """One RMSprop step, number `step` counted from 1, on the rows of all ranks' ids. Every rank must call this."""
        rows, grads = sum_duplicates(*self.deliver(ids_B, grads_BP.to(computed_in(self.value_nP.dtype))))
        ids = torch.from_numpy(self.my_ids[rows.cpu().numpy()]).to(self.device)
        table = self.value_nP, self.second_nP, self.touched_n
        touch(*table, rows, ids, grads, lr=lr, step=step, rule=self.rule)

    def add(self, rows: torch.Tensor, by_nP: torch.Tensor, step: int) -> None:
        """Add to the values of rows of this rank, no row twice, beside RMSprop: second moment and last update stay."""
        value_nP = self.value_nP.index_select(0, rows).to(by_nP.dtype) + by_nP
        self.value_nP.index_copy_(0, rows, self.rounded(rows, value_nP, step, 32))

    def rounded(self, rows: torch.Tensor, values_nP: torch.Tensor, step: int, shift: int) -> torch.Tensor:
        """Numbers of rows of this rank in the table's type; to bfloat16 stochastically, by bits of the words of (step,
        id) from `shift` on, of which RMSprop takes the lowest 32.
        """
        if self.value_nP.dtype != torch.bfloat16:
            return values_nP
        ids = torch.from_numpy(self.my_ids[rows.cpu().numpy()]).to(self.device)
        return to_bfloat16(values_nP, random_words(step, ids, values_nP.shape[1]) >> shift)

    def deliver(self, ids_B: torch.Tensor, values_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Send what belongs to each id to the rank that has its row: this rank's rows, and what came for them.

        A row comes as often as its id was sent. Every rank must call this.
        """
        route = self._route(ids_B)
        sent = values_BP.to(self.device).index_select(0, route.order_B)
        return route.rows, self.ranks.exchange(sent, route.sent, route.received)

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs, each tensor sharded over the ranks. Every rank must call this."""
        local = {"value": self.value_nP, "second_moment": self.second_nP, "touched": self.touched_n}
        return {name: self.sharded(tensor) for name, tensor in local.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, from any number of ranks."""
        self.value_nP, self.second_nP, self.touched_n = (
            state[name].to_local() for name in ("value", "second_moment", "touched")
        )

    @functools.cached_property
    def _mesh(self) -> DeviceMesh:
        return DeviceMesh(self.device.type, torch.arange(self.ranks.ranks))

    def sharded(self, local: torch.Tensor) -> DTensor:
        """A tensor that has an entry for each of this rank's rows, as its part of one for all. Every rank must call
        this.
        """
        shape = torch.Size((len(self.ids), *local.shape[1:]))
        stride = (local.shape[1], 1) if local.dim() == 2 else (1,)
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _collect(self, stored_n: torch.Tensor, route: Route) -> torch.Tensor:
        """What every rank asked for of a stored column or table, in the order of its ids."""
        found = self.ranks.exchange(stored_n.index_select(0, route.rows), route.received, route.sent)
        return torch.empty_like(found).index_copy_(0, route.order_B, found)

    def _route(self, ids_B: torch.Tensor) -> Route:
        rows = find(self.ids, ids_B.cpu().numpy())
        owners = rows // self.block
        order = np.argsort(owners, kind="stable")
        sent = torch.from_numpy(np.bincount(owners, minlength=self.ranks.ranks)).to(self.device)
        received = self.ranks.exchange(sent, [1] * self.ranks.ranks, [1] * self.ranks.ranks)
        asked = torch.from_numpy((rows % self.block)[order]).to(self.device)
        counts = sent.tolist(), received.tolist()
        return Route(torch.from_numpy(order).to(self.device), *counts, self.ranks.exchange(asked, *counts))


def find(ids: Ids, wanted_B: Ids) -> Ids:
    """Rows of the wanted ids among the sorted ids. AutodoError for an id that is not there."""
    rows = np.searchsorted(ids, wanted_B)
    missing = np.searchsorted(ids, wanted_B, side="right") == rows
    if missing.any():
        raise AutodoError(
            f"row table: id {wanted_B[missing][0]} has no row; only the {len(ids)} train ids of this run have one"
        )
    return rows

"""Ranks as threads of this process: what a function over ranks asks of its group, without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class ThreadRanks:
    """One of `ranks` threads that make the same calls in the same order; `sum`, `join` and `exchange` as in Ranks."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.ranks, self.device = rank, len(slots), torch.device("cpu")
        self._slots, self._barrier = slots, barrier

    def _all(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(value)).sum(0)

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(rows))

    def exchange(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        arrived = [pieces[self.rank] for pieces in self._all(rows.split(sent))]
        assert [len(piece) for piece in arrived] == received
        return torch.cat(arrived)


def over_threads(ranks: int, function: Callable[[ThreadRanks], T]) -> list[T]:
    """What `function` gives on each rank."""
    slots, barrier = [None] * ranks, threading.Barrier(ranks, timeout=60)
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(lambda rank: function(ThreadRanks(rank, slots, barrier)), range(ranks)))

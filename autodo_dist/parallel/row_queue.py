"""Row exchanges one after another on a thread of their own, so that they go on while a step computes.

The thread has its own process group, and takes its work in the order in which it was submitted: so the collectives are
in the same order on every rank as long as every rank submits in the same order. On a GPU it has its own stream too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class RowQueue:
    """A thread and, on a GPU, a stream for the exchange of rows."""

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._unwatched: deque[Future[Any]] = deque()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Do `work` after all that was submitted before; it sees what this thread's stream has computed up to now."""
        ready = torch.cuda.current_stream().record_event() if self._stream is not None else None
        return self._thread.submit(self._run, work, ready)

    def push(self, work: Callable[[], None]) -> None:
        """Submit work whose errors come up at a later `check` or `drain`."""
        self._unwatched.append(self.submit(work))

    def check(self) -> None:
        """Raise the error of pushed work that is done."""
        while self._unwatched and self._unwatched[0].done():
            self._unwatched.popleft().result()

    def drain(self) -> None:
        """Wait until all pushed work is done, and raise its error."""
        while self._unwatched:
            self._unwatched.popleft().result()

    def _run(self, work: Callable[[], T], ready: torch.cuda.Event | None) -> T:
        if self._stream is None or ready is None:
            return work()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            result = work()
            self._stream.synchronize()  # this thread waits, the training thread does not
        return result

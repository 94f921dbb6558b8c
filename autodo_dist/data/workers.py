"""Worker processes that share out jobs: each job is done whole by one of them, in whatever order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from autodo_dist.errors import AutodoError

T = TypeVar("T")


class Workers:
    """`count` processes; one is this process itself. As a context it ends them, after the jobs that have begun."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Not forked: DALI and the progress bar have threads, and a fork would copy their locks in whatever state.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, initializer=_follow_parent) if count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, work: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yield `work(*job)` of each job as they get done, in any order. The first exception of a job is raised.

        AutodoError if a worker was killed.
        """
        if self._pool is None:
            yield from (work(*job) for job in jobs)
            return
        try:
            for future in as_completed([self._pool.submit(work, *job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise AutodoError(
                "pack: a worker process was killed, perhaps for want of memory; run the same command again, "
                "with fewer --workers: finished work is kept"
            ) from error


def _follow_parent() -> None:
    """End with the parent, however it ends: a pool's workers would outlive a parent that was killed, and write on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)

"""Real ranks for tests: worker processes that live as long as the pytest session, so that torch is imported once.

`pool.run(n, function, *args)` calls the same importable function on n ranks with the environment that srun would set,
and gives their results in the order of ranks. Process groups are made anew in every call; Python is not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import stat
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 240.0


class RankError(AssertionError):
    """A rank raised: its traceback."""


class RankPool:
    """Up to `size` ranks, each with one thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on ranks 0..ranks-1; RankError with the first rank's traceback if any raises."""
        while len(self._workers) < ranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._workers.append((process, ours))
        port = free_port()
        for rank in range(ranks):
            environment = {
                "SLURM_PROCID": str(rank),
                "SLURM_NTASKS": str(ranks),
                "SLURM_LOCALID": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self._workers[rank][1].send((environment, function, args))
        answers = []
        for rank in range(ranks):
            if not self._workers[rank][1].poll(TIMEOUT):
                self.close()
                raise RankError(f"rank {rank} of {ranks} gave no answer in {TIMEOUT} s")
            answers.append(self._workers[rank][1].recv())
        errors = [(when, text) for failed, when, text in answers if failed]
        if errors:
            raise RankError(min(errors)[1])
        return [value for _, _, value in answers]

    def close(self) -> None:
        """End the workers."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _serve(connection: Connection) -> None:
    import time

    import torch

    torch.set_num_threads(1)
    while True:
        environment, function, args = connection.recv()
        os.environ.update(environment)
        try:
            connection.send((False, 0.0, function(*args)))
        except BaseException:
            connection.send((True, time.time(), traceback.format_exc()))
            hang_up()  # as DCP may hold the process group, whose end the peers wait for
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def hang_up() -> None:
    """What the end of this process would do: its connections end, and its save with them."""
    for name in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the descriptor of the list itself; sockets that only listen
            if stat.S_ISSOCK(os.fstat(name).st_mode):
                with socket.socket(fileno=os.dup(name)) as link:
                    if link.family in (socket.AF_INET, socket.AF_INET6) and link.getpeername():
                        link.shutdown(socket.SHUT_RDWR)
    for thread in threading.enumerate():
        if thread.name.startswith("save"):
            thread.join(60)
            assert not thread.is_alive()

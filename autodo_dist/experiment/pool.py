"""Jobs of trials dealt out to processes of this machine; one that dies takes no more than its job with it."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from autodo_dist.experiment.plan import Trial
from autodo_dist.experiment.worker import NOT_TRIED, Job, Place, Said, serve

GRACE_S = 5.0  # for a process to end when it is asked to


@dataclass
class Worker:
    """A process with its present job, empty: none. open: its trials of which it has not said what became."""

    process: SpawnProcess
    connection: Connection
    job: Job = ()
    open: list[Trial] = field(default_factory=list)

    def give(self, job: Job) -> None:
        """Have it make a job."""
        self.job, self.open = job, list(job)
        with suppress(OSError):  # it died meanwhile, which is heard when it is listened to
            self.connection.send(job)


def run(jobs: Sequence[Job], place: Place, count: int, say: Callable[[Said], None]) -> None:
    """Have up to `count` processes make the jobs, in their order; `say` hears what becomes of each trial.

    Where this raises, as at Ctrl-C, all processes are ended first.
    """
    waiting, team = deque(jobs), list[Worker]()
    try:
        while True:
            idle = [worker for worker in team if not worker.job]
            while waiting and (idle or len(team) < count):
                if not idle:
                    team.append(_start(place))
                    idle.append(team[-1])
                idle.pop().give(waiting.popleft())
            busy = {worker.connection: worker for worker in team if worker.job}
            if not busy:
                return
            for worker in [busy[connection] for connection in wait(list(busy)) if isinstance(connection, Connection)]:
                if not _listen(worker, say):
                    team.remove(worker)
                    _end([worker])
    finally:
        _end(team)


def _start(place: Place) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, place), daemon=True)
    process.start()
    theirs.close()  # so that its end is heard
    return Worker(process, ours)


def _listen(worker: Worker, say: Callable[[Said], None]) -> bool:
    """Pass on what a worker says next; False once it is gone."""
    try:
        said: Said | None = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(GRACE_S)
        for lost in _lost(worker):
            say(lost)
        return False
    if said is None:
        worker.job = ()
        return True
    if said.kind != "begun":
        worker.open = [trial for trial in worker.open if trial.key != said.trial.key]
    say(said)
    return True


def _lost(worker: Worker) -> Iterator[Said]:
    """What became of the trials that a process leaves behind."""
    why = f"its process {_how(worker.process.exitcode)}; see its log"
    for number, trial in enumerate(worker.open):
        yield Said("failed", trial, text=NOT_TRIED if number else why)


def _how(status: int | None) -> str:
    if status is None:
        return "hangs"
    if status >= 0:
        return f"exited with status {status}"
    hint = ", perhaps as memory ran out: set fewer --jobs" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


def _end(team: Sequence[Worker]) -> None:
    """End processes, with the patience that a line which is being written needs."""
    for worker in team:
        worker.process.terminate()
    for worker in team:
        worker.process.join(GRACE_S)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()

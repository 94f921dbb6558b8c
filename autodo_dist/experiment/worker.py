"""A process that makes trials one after another, so that torch is imported once, and writes their results.

It takes jobs from a connection and tells what became of each trial. It ends when the connection closes, at SIGTERM
(not while a line is being written), after an error that is no user's, as that may leave anything behind, and with the
process that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from autodo_dist.errors import AutodoError
from autodo_dist.experiment import results
from autodo_dist.experiment.plan import Trial
from autodo_dist.experiment.results import Line

Job = tuple[Trial, ...]  # a run and its forks, or a single trial
NOT_TRIED = "not tried, as a trial before it failed"


@dataclass(frozen=True)
class Place:
    """Where runs and results are. file: that is written to; found in: `results` and what belongs to it.

    data: checksum of each data.root; commit: of the code.
    """

    root: Path
    results: Path
    file: Path
    keep: bool
    data: Mapping[str, str]
    commit: str | None


@dataclass(frozen=True)
class Said:
    """What became of a trial. elsewhere: another runner has it; text: of a failure, with the place of its log; bug:
    whether the process ends after it.
    """

    kind: Literal["begun", "done", "found", "elsewhere", "failed"]
    trial: Trial
    line: Line | None = None
    text: str = ""
    bug: bool = False


def serve(connection: Connection, place: Place) -> None:
    """Make jobs until there are no more; None is said at the end of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.enable()  # a segmentation fault leaves its stack in the trial's log
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("SLURM_PROCID", None)  # each trial is a rank alone (parallel/comm.py)
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            job: Job = connection.recv()
            came = []
            for said in make(job, place):
                connection.send(said)
                came.append(said)
            if any(said.bug for said in came):
                return
            connection.send(None)


def make(job: Job, place: Place) -> Iterator[Said]:
    """Make those trials of a job that are not done yet, and say what becomes of each; none after one that failed."""
    left = {trial.key: trial for trial in job}
    try:
        with results.claimed(place.results, job[0].name) as mine:
            for said in _make(job, place) if mine else (Said("elsewhere", trial) for trial in job):
                if said.kind != "begun":
                    del left[said.trial.key]
                yield said
    except AutodoError as error:
        for number, trial in enumerate(left.values()):
            yield Said("failed", trial, text=NOT_TRIED if number else str(error))


def _make(job: Job, place: Place) -> Iterator[Said]:
    known = results.read_all(place.results)
    done = results.standing(job, known, place.data).done
    yield from (Said("found", trial) for trial in job if trial.key in done)
    source = next((trial.source for trial in job if trial.source is not None), None)
    first = min((trial.epoch for trial in job if trial.source is not None), default=0)
    todo = [trial for trial in job if trial.key not in done]
    for trial in todo:
        yield Said("begun", trial)
        said = _attempt(trial, source, first, place, known)
        gc.collect()  # a run's process groups, with their threads and sockets, are in cycles
        yield said
        if said.kind == "failed":
            yield from (Said("failed", it, text=NOT_TRIED) for it in todo[todo.index(trial) + 1 :])
            return
    if source is not None and not place.keep:
        _forget(source, place)


def _attempt(trial: Trial, source: Trial | None, first: int, place: Place, known: Sequence[Line]) -> Said:
    """Make a trial, what it prints going to a file beside its run folder, and write its line.

    source: the run that trials of this job fork, from epoch `first` on. known: lines of finished trials.
    """
    from autodo_dist.experiment import measure  # imports torch

    log = measure.log_file(trial, place.root)
    try:
        place.root.mkdir(parents=True, exist_ok=True)
        with _output_to(log):
            if source is not None:
                measure.train_source(source, first, place.root)
            data = place.data[trial.config.data.root]
            line = measure.as_at_equal_epochs(trial, known, data)
            if line is None:
                line = measure.measure(trial, source is not None, place.root, data, place.commit)
        with _undisturbed():
            results.append(place.file, line)
            if not place.keep and (source is None or trial.key != source.key):
                _forget(trial, place)
    except AutodoError as error:
        _leave_group()
        return Said("failed", trial, text=f"{error}; see {log}")
    except BaseException as error:  # CheckpointException of torch.distributed.checkpoint is no Exception
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Said("failed", trial, text=f"{what}; see {log}", bug=True)
    return Said("done", trial, line)


def _leave_group() -> None:
    """Leave the process group that a failed run is still in."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _forget(trial: Trial, place: Place) -> None:
    from autodo_dist.experiment import measure

    measure.forget(trial, place.root)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Have all that this process prints, and the traceback of an error, go to a file for the block."""
    kept = os.dup(1), os.dup(2)
    with log.open("a") as file:
        _flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=file)
            raise
        finally:
            _flush()
            for number, before in enumerate(kept, start=1):
                os.dup2(before, number)
                os.close(before)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _leave(number: int, _: object) -> None:
    os._exit(128 + number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put SIGTERM off to the end of the block."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

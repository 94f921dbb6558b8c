"""Processes in place of an experiment's workers: they train nothing, and import no torch."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from autodo_dist.experiment import results
from autodo_dist.experiment.plan import Trial
from autodo_dist.experiment.results import Line
from autodo_dist.experiment.worker import Job, Place, Said


def line_of(trial: Trial, **changes: object) -> Line:
    """A result of a trial, all of it made up."""
    made_up = {
        "experiment": trial.experiment,
        "method": trial.method,
        "cell": trial.cell,
        "seed": trial.seed,
        "budget": trial.budget,
        "epochs": trial.config.train.epochs,
        "settings": trial.words,
        "digest": trial.digest,
        "data": "0123456789abcdef",
        "commit": None,
        "test_error": 10.0,
        "best_test_error": 9.0,
        "seconds": 2.0,
        "flops": 1e9,
    }
    return Line.model_validate(made_up | changes)


def killed_at_the_second(connection: Connection, place: Place) -> None:
    """Finish each job's first trial, and die in its second."""
    while True:
        job: Job = connection.recv()
        connection.send(Said("begun", job[0]))
        connection.send(Said("done", job[0], line_of(job[0])))
        if len(job) > 1:
            connection.send(Said("begun", job[1]))
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send(None)


def sleeping(connection: Connection, place: Place) -> None:
    """Take a job and work on it for ever."""
    connection.recv()
    time.sleep(600)


def hold_claim(results_file: str, name: str, ready: str) -> None:
    """Claim a job and keep it."""
    with results.claimed(Path(results_file), name) as mine:
        Path(ready).write_text(str(mine))
        time.sleep(600)

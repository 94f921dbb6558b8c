"""Jobs of a real Slurm that are asked to stop: saved, requeued, and equal to one that nothing happened to."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable

import pytest
from scenarios import Stage

from autodo_dist import ledger

# Python's own start, before a line of ours, takes seconds at a job's first start.
SLOW_START = """
import os, time
if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    time.sleep(5)
"""


def usr2(stage: Stage) -> None:
    """What Slurm sends before a time limit, sent by hand: before there is a handler, which ends the task, and later."""
    slow = stage.root / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW_START)
    job = stage.submit("usr2", setup=[f"export PYTHONPATH={slow}:$PYTHONPATH"])
    job.await_(lambda: job.rank(0), "about to start", pause=0.01)
    job.scancel("--signal=USR2")
    job.await_(lambda: len(job.ends()) == 1, "requeued")
    job.await_step(4)
    job.scancel("--signal=USR2")
    (_, stopped, _) = job.finish("failed", "stopped")
    assert stopped["why"] == f"asked to; saved at step {stopped['step']}"
    told = ledger.goodput(ledger.read(job.folder), time.time())
    assert told["lost_steps"] == 0
    assert told["seconds"]["between"] > 0  # in the queue


def time_limit(stage: Stage) -> None:
    """Slurm itself sends the signal, 90 s before. It looks at limits twice a minute: the run is held up until then."""
    job, begun = stage.submit("limit"), time.monotonic()
    job.await_step(4)
    for pid in job.rank(1):  # with its warden, as by a machine that stands still; Slurm sends SIGCONT before a signal
        os.kill(pid, signal.SIGSTOP)
    change = ("scontrol", "update", f"JobId={job.number}")
    stage.cluster.run(*change, f"TimeLimit={math.ceil((time.monotonic() - begun + 45) / 60)}")
    job.await_(job.ends, "told of its limit", seconds=90)
    stage.cluster.run(*change, "TimeLimit=20")  # for the next start
    (stopped, _) = job.finish("stopped")
    assert stopped["step"] < 40


def elastic(stage: Stage) -> None:
    """On 4 nodes, then 2, then 3: cancelled in between, which saves and does not come back."""
    with stage.last_node:
        job = stage.submit("elastic", nodes=4, exclude=None)
        job.await_step(4)
        job.scancel()
        job.await_state("CANCELLED")
    first = job
    for nodes, steps in ((2, 60), (3, None)):
        (*_, stopped) = job.ends()
        assert stopped["cause"] == "stopped"
        job = stage.submit("elastic", nodes=nodes)
        if steps:
            job.await_step(steps)
            job.scancel()
            job.await_state("CANCELLED")
        else:
            job.await_state("COMPLETED")
        starts = [it for it in ledger.read(job.folder) if it["event"] == "start"]
        assert (starts[-1]["ranks"], starts[-1]["step"]) == (nodes, stopped["step"])
    assert job.ends()[-1]["cause"] == "finished"
    assert (job.folder / "summary.json").is_file()
    found = stage.cluster.job(first.number)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")


SCENARIOS = (elastic, time_limit, usr2)


@pytest.mark.slow(reason="27 starts of a rank; Slurm looks at time limits twice a minute")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda it: it.__name__)
def test_a_job_that_is_asked_to_stop(scenario: Callable[[Stage], None], side_by_side: Callable[..., None]) -> None:
    side_by_side(scenario)

"""Jobs of a real Slurm with a rank that is killed, stands still or does not come, or a node that dies: started again,
and equal to one that nothing happened to.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import pytest
from scenarios import LAST, Stage


def hung(stage: Stage) -> None:
    """SIGSTOP of rank 2 inside a collective: it is made to wait there for rank 1 first."""
    job = stage.submit("hung", hang_after=5.0)
    ranks = job.await_step(8)
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(ranks[2], signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGCONT)
    (failed, _) = job.finish("failed")
    assert failed["kind"] == "hang"
    assert failed["why"].startswith("rank 2 on ")
    assert "stopped (SIGSTOP)" in failed["why"]
    stack = job.log(2)
    assert "most recent call first" in stack
    assert "torch/distributed" in stack or "_engine_run_backward" in stack, stack  # it was in a collective
    assert "train.py" in stack


def dead_node(stage: Stage) -> None:
    """A node's slurmd, step daemons and tasks are killed with kill -9; the job needs it, and waits for its return."""
    with stage.last_node:
        cluster = stage.cluster
        job = stage.submit("node", exclude="node0")
        job.await_step(8)
        cluster.kill_node(LAST)
        job.await_(lambda: "by peer" in job.log(0) + job.log(1), "left alone")  # closed or reset
        cluster.start_node(LAST)
        (failed, _) = job.finish("failed")
        assert re.match(r"no word from rank (\d, )*2: is a node dead\? rank \d on ", failed["why"])


def missing_and_killed(stage: Stage) -> None:
    """A rank that stands still before it has come to the others is named within a minute. Later rank 1 is killed."""
    job = stage.submit("missing")
    job.await_(lambda: len(job.rank(2)) == 2, "started", pause=0.01)
    held = job.rank(2)  # with its warden, as by a machine that stands still
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    job.await_((job.folder / "logs").is_dir, "at the rendezvous")
    job.await_(lambda: "rendezvous: rank 2 of 3 has not come, on node2" in job.log(0), "named", seconds=60)
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    os.kill(job.await_step(8)[1], signal.SIGKILL)
    (failed, _) = job.finish("failed")
    assert failed["kind"] == "death"
    assert failed["why"].startswith("rank 1 on ")
    assert "ended without a word" in failed["why"]
    assert int(failed["at"].partition(":")[2]) >= 8


SCENARIOS = (missing_and_killed, dead_node, hung)


@pytest.mark.slow(reason="18 starts of a rank; waits until one counts as missing or hung, and for Slurm's queue")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda it: it.__name__)
def test_a_job_that_fails(scenario: Callable[[Stage], None], side_by_side: Callable[..., None]) -> None:
    side_by_side(scenario)

"""Whether a run that failed is started again: not twice at the same place, nor more often than launch.max_restarts.

The place is the step of the rank that failed first, in its own record or its warden's. Where none left a word, as after
a node's death, it is the newest line of metrics.jsonl, so to the precision of train.log_every; before there is a step,
it is "start". Counted are the failures of one job, however many stops and requeues lie between. What Slurm did by
itself (a preemption without enough time, a cancelled job) is no failure; a node's death counts for the place alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from autodo_dist import ledger
from autodo_dist.errors import AutodoError
from launcher.failures import read_failures


def refusal(failed: Sequence[ledger.Event], most: int) -> str:
    """Why a job that failed is not started again; empty if it is. `failed`: its failures, the newest last."""
    if failed[-1]["kind"] == "user":
        return "this is to be mended first"
    ours = [it for it in failed if it["kind"] != "slurm"]
    newest = [place(it["at"]) for it in ours[-2:]]
    if len(newest) == 2 and newest[0] == newest[1] != "":
        return f"it failed at the same place before ({ours[-1]['at']})"
    if sum(it["kind"] != "lost" for it in ours) > most:
        return f"launch.max_restarts = {most} restarts were made"
    return ""


def place(at: str) -> str:
    """What of `task:1200`, `metrics:1200` or `start` is compared; empty where it says too little."""
    phase, _, step = at.partition(":")
    if phase == "metrics" or not step:
        return at if step or phase == "start" else ""
    return step


def note_failure(folder: Path, which: str, why: str, kind: str, at: str) -> list[ledger.Event]:
    """Add a failed end to the ledger; the failures of its job so far, this one last."""
    end = {"event": "end", "attempt": which, "time": time.time(), "cause": "failed", "why": why, "kind": kind, "at": at}
    ledger.add(folder, end)
    found = ledger.failures(ledger.read(folder), which.partition("/")[0])
    return found or [end]  # a full disk takes no line


def first_cause(folder: Path, which: str) -> tuple[str, str, str]:
    """Why an attempt failed, of what kind, and where, from what its ranks and their wardens left; "" where none did."""
    failures = read_failures(folder, which)
    if not failures:
        return "", "bug", newest_line(folder, which)
    first = failures[0]
    why = f"rank {first.rank} on {first.host}: {first.message}"
    silent = sorted(set(range(int(os.environ.get("SLURM_NTASKS", "0")))) - {it.rank for it in failures})
    if first.kind == "peer" and silent:
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        why = f"no word from rank {', '.join(map(str, silent[:3]))}{more}: is a node dead? {why}"
    return why, first.kind, first.at


def newest_line(folder: Path, which: str) -> str:
    """The place of an attempt by metrics.jsonl; empty if it had not come to its first step."""
    start = ledger.started(ledger.read(folder), which)
    if start is None:
        return ""
    steps, _ = ledger.lost(folder / "metrics.jsonl", start["step"])
    return f"metrics:{start['step'] + steps}"


def check_start(folder: Path, most: int) -> None:
    """Note the end of the attempt before, if its node died and nobody did. AutodoError if the job is to end now.

    Slurm has then requeued the job by itself, without the trap (restart.py).
    """
    job, _, count = ledger.attempt().partition("/")
    if not job or count == "0":
        return
    events, before = ledger.read(folder), f"{job}/{int(count) - 1}"
    if ledger.started(events, before) is None or ledger.ended(events, before) is not None:
        return
    why, _, at = first_cause(folder, before)
    failed = note_failure(folder, before, why or "no word from any rank: the first node died?", "lost", at)
    if reason := refusal(failed, most):
        raise AutodoError(f"run {folder}: {reason}, and its job is not to go on; look at its logs, submit it again")

"""RUN/ledger.jsonl: every start of a run and how it ended, over requeues; and what became of the time.

    {"event": "start", "attempt": "1234/0", "begun": …, "time": …, "step": …, "ranks": …, "kept": {…}, …}
    {"event": "end", "attempt": "1234/0", "time": …, "cause": "finished" | "stopped" | "failed", "why": …, "at": …, …}

Rank 0 writes starts, and the ends that a run comes to by itself; whoever sees a run die (local launcher, exit trap of a
Slurm job) writes that end. A start whose end is missing died with its node. Times are seconds since 1970.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json_lines

NAME = "ledger.jsonl"
START = ("imports", "rendezvous", "build", "restore")
USEFUL = ("task", "hyper", "evaluation")

Event = dict[str, Any]


def attempt(environment: Mapping[str, str] = os.environ) -> str:
    """This start among all: the job's number and how often it was started anew; empty for a process alone."""
    job = environment.get("SLURM_JOB_ID", "")
    return f"{job}/{environment.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def add(folder: Path, event: Event) -> None:
    """Add a line. A disk that does not take it does no harm to the run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / NAME).open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            broken_off = size and file.read(1) != b"\n"
            file.write(b"\n" * bool(broken_off) + json.dumps(event).encode() + b"\n")
    except OSError:
        pass


def read(folder: Path) -> list[Event]:
    """All events, oldest first; a line that was broken off is passed over. Empty where there is no ledger."""
    return read_json_lines(folder / NAME)


def started(events: Sequence[Event], which: str) -> Event | None:
    """The start of an attempt; None if it has not come to its first step."""
    return next((it for it in reversed(events) if it["event"] == "start" and it["attempt"] == which), None)


def ended(events: Sequence[Event], which: str) -> Event | None:
    """The end of an attempt; None if it has none so far."""
    return next((it for it in reversed(events) if it["event"] == "end" and it["attempt"] == which), None)


def failures(events: Sequence[Event], job: str) -> list[Event]:
    """The failed ends of a job's attempts, oldest first."""
    return [it for it in events if it.get("cause") == "failed" and it["attempt"].partition("/")[0] == job]


def lost(metrics: Path, step: int) -> tuple[int, float]:
    """Steps after `step`, and their seconds, that metrics.jsonl tells of: a resume from there does them again.

    To the precision of train.log_every. A line counts the steps since the last one.
    """
    try:
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return 0, 0.0
    again = [row for row in rows if row.get("step", 0) > step and "seconds" in row]
    return max((row["step"] for row in again), default=step) - step, sum(row["seconds"] for row in again)


def goodput(events: Sequence[Event], now: float) -> dict[str, Any]:
    """Where the time of a run went, from its first process to its newest end, or until `now` if it goes on.

    Gives "seconds" by what for, their "total", and "attempts" with cause. AutodoError if there was no start.
    """
    starts = [it for it in events if it["event"] == "start"]
    if not starts:
        raise AutodoError(f"{NAME}: tells of no start; look at the run's logs")
    rows = [_row(events, at, starts, now) for at in range(len(starts))]
    seconds = dict.fromkeys(("useful", "data", "save", "start", "lost", "between", "other"), 0.0)
    newest = ended(events, starts[-1]["attempt"]) or {}
    work: Mapping[str, float] = newest.get("seconds") or starts[-1]["kept"]
    seconds["useful"] = sum(work.get(phase, 0.0) for phase in USEFUL)
    seconds["data"], seconds["save"] = work.get("data", 0.0), work.get("save", 0.0)
    seconds["start"] = sum(sum(it["seconds"].values()) for it in starts)
    seconds["lost"] = sum(it["lost_seconds"] for it in starts)
    seconds["between"] = sum(max(0.0, b["begun"] - a["ended"]) for a, b in itertools.pairwise(rows))
    total = rows[-1]["ended"] - rows[0]["begun"]
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    return {
        "total": total,
        "seconds": seconds,
        "steps": newest.get("step", starts[-1]["step"]),
        "lost_steps": sum(it["lost_steps"] for it in starts),
        "attempts": rows,
    }


def _row(events: Sequence[Event], at: int, starts: Sequence[Event], now: float) -> dict[str, Any]:
    """One attempt: from when to when, from which step, and why it ended."""
    start, later = starts[at], starts[at + 1 :]
    end = ended(events, start["attempt"])
    if end is None and not later:
        end = {"time": now, "cause": "running", "why": ""}
    elif end is None:
        end = {"time": later[0]["silent_since"], "cause": "lost", "why": "no word: its node or its launcher died"}
    return {
        "attempt": start["attempt"],
        "begun": start["begun"],
        "ended": max(end["time"], start["begun"]),
        "ranks": start["ranks"],
        "step": start["step"],
        "cause": end["cause"],
        "why": end["why"],
    }

"""How a run stands, from the files of its folder alone, on whatever machine: read only, no lock, torch not loaded.

Any file may be missing, half written or gone a moment later; what is not to be seen is None. Ages compare this
machine's clock with the file server's.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autodo_dist import ledger, run_folder, run_lock
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError

Row = dict[str, Any]
State = Literal["not started", "queued", "starting", "running", "silent", "stopped", "failed", "finished"]
SILENT_S = 15.0  # without a word of a rank, or three times the interval in which it gives one
RECENT = 20  # lines of metrics from which rates are taken


@dataclass(frozen=True)
class Rank:
    """What a rank's warden last said. age: seconds since; seconds: in its phase, without progress, at that time."""

    rank: int
    ranks: int
    host: str
    pid: int
    phase: str
    step: int
    seconds: float
    memory_bytes: int
    every: float
    attempt: str
    age: float

    @property
    def silent(self) -> bool:
        """Whether it should have said more by now."""
        return self.age > max(SILENT_S, 3 * self.every)


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint: its step, when it was written, and the seconds by phase up to it."""

    step: int
    time: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Standing:
    """How a run stands. why: of its state, in words. step, total: done and in all. epoch: the present one, from 1.

    evaluations: all lines of them; task, hyper: the newest lines. left: seconds to the end. goodput: of the time up to
    the newest checkpoint or end.
    """

    state: State
    why: str
    config: Config | None
    step: int
    total: int | None
    epoch: int | None
    pass_: str
    rows: Sequence[Row]
    ranks: Sequence[Rank]
    saved: Saved | None
    starts: int
    left: float | None
    goodput: float | None

    def newest(self, kind: str, name: str | None = None) -> Row:
        """The last line of a kind, or the last that has that number; empty if there is none."""
        found = (row for row in reversed(self.rows) if row["kind"] == kind and (name is None or name in row))
        return next(found, {})

    @property
    def evaluations(self) -> list[Row]:
        """All lines of evaluations."""
        return [row for row in self.rows if row["kind"] == "evaluation"]


@dataclass
class Lines:
    """The whole lines of a metrics.jsonl that grows; from its start again where a resume has put another in place."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    _inode: int = -1
    _read: int = 0

    def look(self) -> list[Row]:
        """All rows so far; those of before while the file is not to be read."""
        with suppress(OSError), self.path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._read:
                self._inode, self._read, self.rows = stat.st_ino, 0, []
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
            self._read += len(whole + newline)
            for line in whole.splitlines():
                with suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict) and {"kind", "step", "epoch"} <= row.keys():
                        self.rows.append(row)
        return self.rows


class Looker:
    """Looks at a run again and again. ask: what a queue says of a job's number, e.g. "PENDING Priority", or empty."""

    def __init__(self, run: Path, ask: Callable[[str], str]) -> None:
        self.run, self.ask = run, ask
        self._lines = Lines(run / "metrics.jsonl")

    def look(self) -> Standing:
        """How it stands now."""
        now, run = time.time(), self.run
        config, events, saved = read_config(run), read_events(run), read_saved(run)
        ranks = heard_of(run, events, now)
        rows = list(self._lines.look())
        starts = [it for it in events if it["event"] == "start"]
        newest = starts[-1] if starts else {}
        state, why = state_of(run, events, ranks, now, self.ask)
        words = [rank.step for rank in ranks if rank.rank == 0]
        step = max([newest.get("step", 0), *words, rows[-1]["step"] if rows else 0])
        total = newest.get("total_steps")
        epoch = epoch_of(rows, config) if starts else None
        left = None
        if config is not None and total is not None and rows and state in ("running", "starting", "silent"):
            left = time_left(rows, config, newest["pass_steps"], total, step, saved)
        return Standing(
            state, why, config, step, total, epoch, pass_of(ranks, rows), rows, ranks, saved, len(starts), left,
            useful_share(events, saved, now),
        )  # fmt: skip


def state_now(run: Path, now: float) -> tuple[State, str]:
    """The state and why, without asking a queue."""
    events = read_events(run)
    return state_of(run, events, heard_of(run, events, now), now)


def state_of(
    run: Path, events: Sequence[Row], ranks: Sequence[Rank], now: float, ask: Callable[[str], str] = lambda _: ""
) -> tuple[State, str]:
    """The state and why, by what is surest: the summary, words of ranks, the ledger's end, lock and queue."""
    if run_folder.finished(run):
        return "finished", ""
    starts = [it for it in events if it["event"] == "start"]
    newest = starts[-1] if starts else {"attempt": None, "time": 0.0}
    if any(not rank.silent for rank in ranks):
        begun = ranks[0].attempt == newest["attempt"] and any(rank.step >= 0 for rank in ranks)
        late = [rank for rank in ranks if rank.silent]
        silent = f"no word of {len(late)} of {ranks[0].ranks} ranks" if late else ""
        return ("running" if begun else "starting"), silent
    end = next((it for it in reversed(events) if it["event"] == "end"), None)
    if end is not None and end["time"] >= newest["time"]:
        asked = queue_of(run, ask)
        if asked.startswith("PENDING"):
            return "queued", f"{asked}; before: {end['cause']}, {end['why']}"
        at = f" at {end['at']}" if end.get("at") else ""
        return ("failed" if end["cause"] == "failed" else "stopped"), f"{end['why']}{at}"
    locks = [age_of(path, now) for path in run.glob("lock.*.json")]
    if any(age is not None and age < run_lock.SILENCE for age in locks):
        return ("running" if starts else "starting"), ""
    asked = queue_of(run, ask)
    if asked:
        return ("queued" if asked.startswith("PENDING") else "starting"), asked
    if starts:
        return "silent", "no word of it, and no end: its node or its launcher died, or its files are not seen here"
    return "not started", "" if run.is_dir() else "no such folder yet"


def queue_of(run: Path, ask: Callable[[str], str]) -> str:
    """What the queue says of the run's job, with its number; empty where it has none that waits or runs."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        job = str(json.loads((run / "slurm.json").read_text())["job"])
        said = ask(job)
        return f"{said}, job {job}" if said else ""
    return ""


def heard_of(run: Path, events: Sequence[Row], now: float) -> list[Rank]:
    """The ranks whose last words are of a start that has not ended: a word may outlive it."""
    return [it for it in read_ranks(run, now) if ledger.ended(events, it.attempt) is None]


def read_config(run: Path) -> Config | None:
    """The run's settings; None where they are not to be read."""
    with suppress(AutodoError, OSError, ValueError):
        return run_folder.read_config(run)
    return None


def read_events(run: Path) -> list[Row]:
    """The ledger's events, as far as they can be read."""
    with suppress(AutodoError):
        return [event for event in ledger.read(run) if "event" in event]
    return []


def read_ranks(run: Path, now: float) -> list[Rank]:
    """What the wardens of the newest start last said, by rank."""
    found = []
    for path in (run / "ranks").glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):  # taken away just now
            age = now - path.stat().st_mtime
            found.append(Rank(**json.loads(path.read_text()), age=max(0.0, age)))
    newest = min(found, key=lambda it: it.age).attempt if found else ""
    return sorted((it for it in found if it.attempt == newest), key=lambda it: it.rank)


def read_saved(run: Path) -> Saved | None:
    """The newest checkpoint."""
    for path in sorted((run / "checkpoints").glob("step-*/checkpoint.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # pruned just now
            header = json.loads(path.read_text())
            return Saved(int(header["step"]), path.stat().st_mtime, dict(header["progress"]["seconds"]))
    return None


def age_of(path: Path, now: float) -> float | None:
    """Seconds since a file was written; None if it is gone."""
    try:
        return now - path.stat().st_mtime
    except OSError:
        return None


def epoch_of(rows: Sequence[Row], config: Config | None) -> int:
    """The present epoch, from 1: that of the newest line, or the one after an evaluation."""
    if not rows:
        return 1
    row = rows[-1]
    epoch = int(row["epoch"]) + 1 if row["kind"] == "evaluation" else math.ceil(row["epoch"])
    return max(1, epoch if config is None else min(epoch, config.train.epochs))


def pass_of(ranks: Sequence[Rank], rows: Sequence[Row]) -> str:
    """What rank 0 does: its phase, or the pass of the newest line."""
    phase = next((rank.phase for rank in ranks if rank.rank == 0), "")
    pass_ = rows[-1]["kind"] if rows else ""
    return pass_ if phase in ("", "data") else phase


def time_left(
    rows: Sequence[Row], config: Config, pass_steps: int, total: int, step: int, saved: Saved | None
) -> float | None:
    """Seconds to the end: steps of both kinds at their newest rates, evaluations and saves as they took so far.

    None before there is a rate.
    """
    batch, hyper = config.train.batch_size, config.hyper
    seconds = {kind: seconds_a_step(rows, kind, batch) for kind in ("task", "hyper")}
    known = next((it for it in seconds.values() if it is not None), None)
    if known is None:
        return None
    done, inside = divmod(rows[-1]["epoch"], 1.0)  # epochs done, and the share of the present pass
    if rows[-1]["kind"] != "evaluation" and not inside:
        done, inside = done - 1, 1.0
    passes = 0.0
    if config.learn.anything and hyper.way == "separate":
        passes = config.train.epochs - max(hyper.start_epoch, done)
        if done >= hyper.start_epoch and rows[-1]["kind"] != "evaluation":
            passes -= inside if rows[-1]["kind"] == "hyper" else 1.0
    left = max(0, total - step)
    hyper_steps = min(left, passes * pass_steps)
    steps = (left - hyper_steps) * (seconds["task"] or known) + hyper_steps * (seconds["hyper"] or known)
    spent, evaluated = (saved.seconds, saved.step) if saved is not None else ({}, -1)
    before = sum(row["kind"] == "evaluation" and row["step"] <= evaluated for row in rows)
    each = spent.get("evaluation", 0.0) / before if before else 0.0
    every, epochs = config.train.evaluate_every, config.train.epochs
    to_come = sum(number % every == 0 or number == epochs for number in range(int(done) + 1, epochs + 1))
    saves = spent.get("save", 0.0) / max(1, evaluated) * left
    return float(steps + to_come * each + saves)


def seconds_a_step(rows: Sequence[Row], kind: str, batch_size: int) -> float | None:
    """Mean seconds of a step of this kind over the newest lines; None before there is one."""
    recent = [row for row in rows if row["kind"] == kind][-RECENT:]
    steps = sum(row["images_per_second"] * row["seconds"] / batch_size for row in recent)
    return sum(row["seconds"] for row in recent) / steps if steps else None


def useful_share(events: Sequence[Row], saved: Saved | None, now: float) -> float | None:
    """Goodput: the share of useful time, up to the newest end, or to the newest checkpoint while the run goes on.

    None before there is either.
    """
    starts = [it for it in events if it["event"] == "start"]
    if not starts:
        return None
    if ledger.ended(events, starts[-1]["attempt"]) is None:
        if saved is None or saved.time < starts[-1]["time"]:
            return None
        end = {"event": "end", "attempt": starts[-1]["attempt"], "time": saved.time, "cause": "running", "why": ""}
        events = [*events, end | {"step": saved.step, "seconds": saved.seconds}]
    found = ledger.goodput(events, now)
    return float(found["seconds"]["useful"] / found["total"]) if found["total"] > 0 else None

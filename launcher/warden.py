"""A small process beside every rank that sees it hang, says which rank it is, and has its stack written.

It is forked before torch is loaded, and knows the rank by what it writes into shared memory (autodo_dist/heartbeat.py)
and by /proc. Of a rank that ends without a word it records where that was. While the rank lives it says every few
seconds where it is, in RUN/ranks/rank-00002.json: `autodo watch` reads that, on whatever machine.

In a collective all ranks wait for the one that does not come, so when a rank's limit has passed each warden writes
RUN/errors/hang-00002.json, reads those of the others, and the rank that is stopped, or the least advanced, is the one
that hangs. Its warden records that as a failure and kills it; the launcher ends the others.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from autodo_dist import ledger
from autodo_dist.files import write_json
from autodo_dist.heartbeat import OVER, Heart
from launcher.failures import read_failures, record

POLL_S = 0.5
LOOK_S = 5.0  # in one phase, after which a warden looks whether others have found a hang
STOPPED_S = 10.0  # that a rank may be stopped; its warden's own stops do not count
GATHER_S = 5.0  # for all wardens to say where their ranks are
STACK_S = 1.0  # for a stack to be written
SIGN_S, SIGNS_A_SECOND = 5.0, 20  # between a rank's words in RUN/ranks, and at most those of all ranks on a shared disk
# At the same step, which comes first; a rank that is behind in this order keeps the others waiting.
_ORDER = {"evaluation": 0, "save": 1, "data": 2, "hyper": 3, "task": 3}


@dataclass(frozen=True)
class Position:
    """Where a rank is, as its warden saw it after `seconds` without progress."""

    attempt: str
    rank: int
    host: str
    phase: str
    step: int
    stopped: bool
    seconds: float

    def __str__(self) -> str:
        how = "stopped (SIGSTOP)" if self.stopped else "without progress"
        return f"hangs in {self.phase} at step {self.step}: {how} for {self.seconds:.0f} s on {self.host}"


def culprit(positions: Sequence[Position]) -> Position:
    """The rank that the others wait for: one that is stopped, else the least advanced, else the longest there."""
    return min(positions, key=lambda it: (not it.stopped, it.step, _ORDER.get(it.phase, 0), -it.seconds, it.rank))


def guard(heart: Heart, folder: Path, rank: int, ranks: int) -> None:
    """Fork a warden for this process, one of `ranks` of the run in `folder`; it ends with it."""
    parent, (end, ours) = os.getpid(), os.pipe()  # which comes to its end with this process
    if os.fork():
        os.close(end)
        return
    try:
        os.close(ours)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # they are meant for the rank, and it has longer to live
        Warden(heart, parent, end, folder, rank, ranks).watch()
    finally:
        os._exit(0)


class Warden:
    """Watches the process `pid`, which is `rank` of `ranks`. end: a pipe that nobody writes to, and it keeps open."""

    def __init__(self, heart: Heart, pid: int, end: int, folder: Path, rank: int, ranks: int) -> None:
        self.heart, self.pid, self.end, self.folder, self.rank, self.ranks = heart, pid, end, folder, rank, ranks
        self.errors = folder / "errors"
        self.attempt = ledger.attempt()
        self._last, self._count = time.monotonic(), -1
        self._sign, self._signed = folder / "ranks" / f"rank-{rank:05d}.json", -float("inf")
        self._inside = False  # of the loop, when it last said where the rank is
        self.every = max(SIGN_S, ranks / SIGNS_A_SECOND)
        self.here = self.stopped = 0.0  # seconds: in the present phase, and stopped in it

    def watch(self) -> None:
        """Look until the rank ends, hangs, or another is found to."""
        try:
            self._watch()
        finally:
            with suppress(OSError):
                self._sign.unlink()

    def _watch(self) -> None:
        while self.lives():
            limit = self.look()
            self.sign()
            late = self.here > limit or self.stopped > STOPPED_S
            if (late or (self.here > LOOK_S and limit < float("inf") and self.positions())) and self.tell():
                return
        self.note_death()

    def lives(self) -> bool:
        """Wait for POLL_S, or until the rank ends; whether it lives."""
        ended, _, _ = select.select([self.end], [], [], POLL_S)
        return not ended and os.getppid() == self.pid  # a process that it forked may hold the pipe

    def note_death(self) -> None:
        """Record that the rank has ended, if it ended by something of which it could leave no word."""
        when, beat = time.time(), self.heart.read()
        if beat.phase == OVER or any(it.rank == self.rank for it in read_failures(self.folder, self.attempt)):
            return
        what = "ended without a word: killed (for want of memory? dmesg there tells), or crashed; see its log"
        record(self.folder, "death", what, beat.at, when=when)

    def look(self) -> float:
        """Count the time since the last look; the limit of the present phase."""
        now, beat, state = time.monotonic(), self.heart.read(), state_of(self.pid)
        passed, self._last = min(now - self._last, 2 * POLL_S), now  # a warden that was stopped too counts no more
        if beat.count != self._count:
            self._count, self.here, self.stopped = beat.count, 0.0, 0.0
        self.here += passed
        self.stopped = self.stopped + passed if state == "T" else 0.0
        return beat.limit

    def sign(self) -> None:
        """Say where the rank is, if that is due, or it has come to its loop: a small file, renamed into place.

        No harm is done if the disk does not take it.
        """
        now, beat = time.monotonic(), self.heart.read()
        if now - self._signed < self.every and (beat.step >= 0) == self._inside:
            return
        self._signed, self._inside = now, beat.step >= 0
        word = {
            "attempt": self.attempt,
            "rank": self.rank,
            "ranks": self.ranks,
            "host": socket.gethostname(),
            "pid": self.pid,
            "phase": beat.phase,
            "step": beat.step,
            "seconds": self.here,
            "memory_bytes": memory_of(self.pid),
            "every": self.every,
        }
        with suppress(OSError):
            self._sign.parent.mkdir(parents=True, exist_ok=True)
            partial = self._sign.with_suffix(".partial")
            partial.write_text(json.dumps(word) + "\n")
            os.replace(partial, self._sign)

    def tell(self) -> bool:
        """Write where the rank is, and its stack, and kill it, after a record if it is the one that hangs.

        False if it goes on after all.
        """
        beat = self.heart.read()
        seconds = self.stopped or self.here
        mine = Position(self.attempt, self.rank, socket.gethostname(), beat.phase, beat.step, self.stopped > 0, seconds)
        self.errors.mkdir(parents=True, exist_ok=True)
        write_json(self.errors / f"hang-{self.rank:05d}.json", asdict(mine))
        deadline = time.monotonic() + GATHER_S
        while len(found := self.positions()) < self.ranks and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.heart.read().count != beat.count:  # it went on meanwhile
            with suppress(OSError):
                (self.errors / f"hang-{self.rank:05d}.json").unlink()
            return False
        hung = culprit(found)
        if hung.rank == self.rank:  # before it wakes up: it may come to the end of a short run
            record(self.folder, "hang", f"{hung}; its stack is in its log", beat.at)
        os.kill(self.pid, signal.SIGUSR1)  # faulthandler writes the stack; it may be stopped, and wakes up to do it
        os.kill(self.pid, signal.SIGCONT)
        time.sleep(STACK_S)
        if hung.rank != self.rank:
            time.sleep(GATHER_S + STACK_S)  # for the launcher to end this rank
        os.kill(self.pid, signal.SIGKILL)
        return True

    def positions(self) -> list[Position]:
        """What the wardens of this start have said so far."""
        found = []
        for path in self.errors.glob("hang-*.json"):
            with suppress(OSError, ValueError, TypeError):  # it is being taken away
                found.append(Position(**json.loads(path.read_text())))
        return [it for it in found if it.attempt == self.attempt]


def memory_of(pid: int) -> int:
    """Bytes of main memory that a process holds; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def state_of(pid: int) -> str:
    """The state of a process as proc(5) has it: T where it is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"

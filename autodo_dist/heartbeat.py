"""What a rank is doing and how long that may take, in memory that the process which watches it can read.

The watcher (launcher/warden.py) is another process, as a rank that is stopped, or holds Python's lock, runs no thread
of its own. Limits are learnt from the run: LENIENCE times the median of a phase, but no less than the floor.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import median

LENIENCE = 20.0  # times the median of a phase
UNKNOWN = 10.0  # times the floor: for a phase that was not seen KNOWN times, which may compile or warm up
KNOWN = 3
OVER = "over"  # the phase of a rank that is done, or has said why it ends
REMEMBERED = 50  # newest durations of a phase
_FORMAT = struct.Struct("<qdq16s")


@dataclass(frozen=True)
class Beat:
    """A sign of life. count: how many came before; limit: seconds until the next is due, infinite for no limit.

    step: steps done, -1 outside of the loop.
    """

    count: int
    limit: float
    step: int
    phase: str

    @property
    def at(self) -> str:
        """The place in a word: `task:1200`, `start`."""
        return f"{self.phase}:{self.step}" if self.step >= 0 else self.phase


class Heart:
    """The signs of life of one rank. floor: the least limit, seconds."""

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self._page = mmap.mmap(-1, _FORMAT.size)  # shared with children
        self._taken: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._phase, self._since, self._count = "", 0.0, 0
        self.pause("start")

    def beat(self, phase: str, step: int) -> None:
        """Begin a phase, or its next part; about 3 µs."""
        self._end_phase()
        self._phase = phase
        self._write(phase, self.limit(phase), step)

    def pause(self, phase: str) -> None:
        """Begin what may take as long as it likes, outside of the loop."""
        self._end_phase()
        self._phase = ""
        self._write(phase, float("inf"), -1)

    def rest(self) -> None:
        """Let what goes on take as long as it likes."""
        self._phase, beat = "", self.read()
        self._write(beat.phase, float("inf"), beat.step)

    def limit(self, phase: str) -> float:
        """Seconds that this phase may take."""
        taken = self._taken[phase]
        if len(taken) < KNOWN:
            return UNKNOWN * self.floor
        if LENIENCE * max(taken) <= self.floor:  # most phases: spares the median
            return self.floor
        return max(self.floor, LENIENCE * median(taken))

    def read(self) -> Beat:
        """The newest sign of life."""
        count, limit, step, phase = _FORMAT.unpack(self._page[:])
        return Beat(count, limit, step, phase.rstrip(b"\0").decode())

    def _end_phase(self) -> None:
        now = time.monotonic()
        if self._phase:
            self._taken[self._phase].append(now - self._since)
        self._since = now

    def _write(self, phase: str, limit: float, step: int) -> None:
        self._page[:] = _FORMAT.pack(self._count, limit, step, phase.encode())
        self._count += 1


_heart: Heart | None = None


def start(floor: float) -> Heart:
    """Let this process give signs of life from here on."""
    global _heart
    _heart = Heart(floor)
    return _heart


def beat(phase: str, step: int | None) -> None:
    """Heart.beat of this process; nothing where none watches it, or before there is a run."""
    if _heart is not None and step is not None:
        _heart.beat(phase, step)


def pause(phase: str) -> None:
    """Heart.pause of this process."""
    if _heart is not None:
        _heart.pause(phase)


def rest() -> None:
    """Heart.rest of this process."""
    if _heart is not None:
        _heart.rest()


def here() -> str:
    """What this process is doing, e.g. `task:1200`; empty where none watches it."""
    return _heart.read().at if _heart is not None else ""

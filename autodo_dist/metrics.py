"""What a run says of itself: metrics.jsonl, a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autodo_dist import heartbeat
from autodo_dist.files import write_text
from autodo_dist.thread_name import show

T = TypeVar("T")
log = logging.getLogger(__name__)


class LineFile:
    """A file of the run with one JSON object a line. `lines` counts them, so that a resume cuts off what came after.

    What a full disk does not take is kept and written with a later line.
    """

    def __init__(self, path: Path, keep: int) -> None:
        """Open for appending after the first `keep` lines; later ones belong to steps that will be done again."""
        kept = path.read_text().splitlines(keepends=True)[:keep] if path.is_file() else []
        self.lines = len(kept)
        write_text(path, "".join(kept))  # on the disk: a checkpoint counts these lines
        self._file, self._unwritten = path.open("ab", buffering=0), b""

    def write(self, row: dict[str, Any]) -> None:
        """Append a line."""
        self._unwritten += json.dumps(row, allow_nan=False).encode() + b"\n"
        self.lines += 1
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            log.warning("%s: %s; the next line tries again", self._file.name, error.strerror)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Clock:
    """Seconds spent in each phase of a run: those of START, data, task, hyper, evaluation, save.

    A start began at time `begun`; what earlier ones took comes from the checkpoint (`carry`). The main thread, on which
    it is used, is named by phase and `steps` done.
    """

    steps: Callable[[], int | None]

    def __init__(self, begun: float) -> None:
        self.seconds: dict[str, float] = {}
        self.steps = lambda: None  # until there is a run
        self._lap = begun

    def lap(self, phase: str) -> None:
        """Count what has gone by since the start began, or since the last lap, to `phase`."""
        now = time.time()
        self.add(phase, now - self._lap)
        self._lap = now

    def carry(self, seconds: dict[str, float]) -> None:
        """Add the seconds of earlier starts."""
        for phase, spent in seconds.items():
            self.add(phase, spent)

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block to phase `name`."""
        steps = self.steps()
        show(name, steps)
        heartbeat.beat(name, steps)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches through, counting the wait for each to phase `data`."""
        while True:
            with self.phase("data"):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


class Interval:
    """The steps between two lines of metrics: their number, their time, and the share of it spent on data.

    Saves and evaluations in between do not count.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begin anew, now."""
        self.steps = 0
        self._waited, self._worked = self._read()

    def read(self) -> tuple[float, float]:
        """Seconds of the steps so far, and the share of them spent waiting for data."""
        waited, worked = self._read()
        waited, worked = waited - self._waited, worked - self._worked
        return waited + worked, waited / (waited + worked)

    def _read(self) -> tuple[float, float]:
        seconds = self._clock.seconds
        return seconds.get("data", 0.0), seconds.get("task", 0.0) + seconds.get("hyper", 0.0)


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: the run goes on, and its lines are on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do without a line that the disk does not take, and without the traceback that logging would print."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def console(log_file: Path, main: bool) -> Iterator[Console | None]:
    """Log to a file on every rank, and on rank 0 to standard output; gives the terminal, where rank 0 has one."""
    file = LogFile(log_file)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file]
    screen = Console() if main and sys.stdout.isatty() else None
    if screen is not None:
        handlers.append(RichHandler(console=screen, show_path=False, show_level=False))
    elif main:
        handlers.append(logging.StreamHandler(sys.stdout))
    root = logging.getLogger("autodo_dist")
    root.setLevel(logging.INFO)
    root.handlers = handlers
    try:
        yield screen
    finally:
        root.handlers = []
        with suppress(OSError):  # it writes what is left over
            file.close()


class ProgressBar:
    """Steps done and time left, where there is a terminal."""

    def __init__(self, screen: Console | None, total: int, done: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=screen, disable=screen is None)
        self._task = self._bar.add_task("steps", total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, text: str) -> None:
        """One more step is done."""
        self._bar.update(self._task, advance=1, description=text)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: on its GPU where it has one, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

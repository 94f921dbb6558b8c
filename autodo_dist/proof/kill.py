"""A run started by the launcher, watched from outside, and a rank of it killed where a plan says: kill -9, no hook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from autodo_dist.errors import AutodoError
from autodo_dist.proof.plan import Aim

LOOK_S, GLANCE_S = 0.001, 0.01  # between two looks at a rank that is on its way to its death, and at others
END_S = 60.0  # for a launcher to end once a rank was killed; it needs two seconds
ORDER = {"evaluation": 0, "save": 1, "data": 2, "hyper": 3, "task": 3}  # what a rank passes at the same step, in turn


class Launcher(Protocol):
    """A launcher's process, as subprocess.Popen has it."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Its exit status; None while it lives."""

    def terminate(self) -> None:
        """Send SIGTERM: it ends its ranks and itself."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""


Start = Callable[[Path, Path], Launcher]  # starts the run of a yaml file; what it prints is added to a log file


@dataclass(frozen=True)
class Hit:
    """Where a kill fell. shown: what the rank showed when it was dead; saving: whether a save was broken off."""

    shown: str
    saving: bool


@dataclass(frozen=True)
class Ended:
    """How one start of a run went. hit: None where no kill fell.

    start: seconds until rank 0 was at work, where no kill was to fall; saves: seconds that each save took, about.
    """

    seconds: float
    start: float
    saves: tuple[float, ...]
    hit: Hit | None


def command(file: Path) -> list[str]:
    """The command that starts a run, and goes on with it."""
    return [sys.executable, "-m", "launcher.submit", "--config", str(file)]


def submit(file: Path, log: Path) -> Launcher:
    """Start a run by that command."""
    with log.open("ab") as out:
        return subprocess.Popen(command(file), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def run(
    start: Start,
    file: Path,
    folder: Path,
    ranks: int,
    aim: Aim | None = None,
    usual: Mapping[str, float] | None = None,
    limit: float | None = None,
) -> Ended:
    """Start the run of `file` in `folder`; to its end, or until a rank is killed. usual: seconds of each phase.

    AutodoError, with the last error of its log, if it fails on its own, or takes more than `limit` seconds.
    """
    log, left, begun = folder.with_name(f"{folder.name}.log"), partials(folder), time.monotonic()
    before = log.stat().st_size if log.is_file() else 0
    launcher = start(file, log)
    watch = Watch(launcher, folder, left, limit)
    shown = None
    try:
        if aim is None:
            watch.start(ranks)
        else:
            shown = watch.kill(aim, ranks, usual or {})
        status = watch.end(END_S if shown else limit)
    finally:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.wait()
    error = last_error(log, before)
    if status and (shown is None or "was killed by signal" not in error):
        raise AutodoError(f"run {folder}: failed ({error}); see {log}")
    hit = Hit(shown, bool(partials(folder).items() - left.items())) if shown and status else None
    return Ended(time.monotonic() - begun, watch.started, tuple(watch.saves), hit)


class Watch:
    """Looks at the ranks and saves of a run. left: `partials` from before it; limit: seconds that it may take."""

    def __init__(self, launcher: Launcher, folder: Path, left: Mapping[str, int], limit: float | None) -> None:
        self.launcher, self.folder, self.left, self.limit = launcher, folder, left, limit
        self.started = 0.0
        self.saves: list[float] = []
        self._saving: dict[str, float] = {}  # since when
        self._begun = time.monotonic()

    def kill(self, aim: Aim, ranks: int, usual: Mapping[str, float]) -> str | None:
        """Kill a rank where it is aimed at, or as soon as it is past that; what it showed, None if it ended before."""
        process = self._rank(aim.rank, ranks)
        while process is not None and self._goes_on(LOOK_S if shown(process.pid) != "start" else GLANCE_S):
            if self._reached(aim, process.pid):
                end = time.monotonic() + aim.late * usual.get(aim.place.phase, 0.0)
                while time.monotonic() < end and (aim.place.phase != "start" or shown(process.pid) == "start"):
                    time.sleep(LOOK_S)
                return strike(process)
        return None

    def start(self, ranks: int) -> None:
        """Take the time until rank 0 is at work."""
        process, begun = self._rank(0, ranks), time.monotonic()
        while process is not None and shown(process.pid) == "start" and self._goes_on(GLANCE_S):
            self.started = time.monotonic() - begun

    def end(self, limit: float | None) -> int:
        """Wait for the launcher's end, and no longer than `limit` seconds; its exit status."""
        self._begun, self.limit = time.monotonic(), limit
        while self._goes_on(GLANCE_S):
            pass
        return self.launcher.wait()

    def _goes_on(self, pause: float) -> bool:
        """Wait for a moment; whether the launcher lives. AutodoError if it does so for too long."""
        if self.limit is not None and time.monotonic() - self._begun > self.limit:
            raise AutodoError(f"run {self.folder}: has not ended after {self.limit:.0f} s; see {self.folder / 'logs'}")
        saving, now = self._partials(), time.monotonic()
        self.saves += [now - self._saving.pop(name) for name in self._saving.keys() - saving]
        self._saving = dict.fromkeys(saving, now) | self._saving
        time.sleep(pause)
        return self.launcher.poll() is None

    def _partials(self) -> set[str]:
        return {name for name, _ in partials(self.folder).items() - self.left.items()}

    def _rank(self, rank: int, ranks: int) -> psutil.Process | None:
        """The process of a rank, as soon as all of them are there; None if the launcher ends before."""
        while self._goes_on(GLANCE_S):
            with suppress(psutil.NoSuchProcess):
                found = psutil.Process(self.launcher.pid).children()
                if len(found) == ranks:  # it starts one after another
                    return sorted(found, key=lambda process: (process.create_time(), process.pid))[rank]
        return None

    def _reached(self, aim: Aim, pid: int) -> bool:
        """Whether a rank is where it is aimed at, or past that."""
        phase, steps = aim.place.phase, aim.place.steps
        if phase == "start" or (phase == "save" and f"step-{steps:08d}.partial" in self._partials()):
            return True
        name, done = parted(shown(pid))
        # A save goes on beside the step that follows, and may begin a little later.
        return name in ORDER and (done, ORDER[name]) >= (steps + (phase == "save"), ORDER[phase])


def strike(process: psutil.Process) -> str | None:
    """Kill -9 a rank; what it showed as it died, None if it had ended already.

    That is to be read until the launcher takes note of its death.
    """
    last = ""
    with suppress(psutil.NoSuchProcess):
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        last = shown(process.pid)
        process.kill()
        while process.status() != psutil.STATUS_ZOMBIE:
            last = shown(process.pid) or last
        last = shown(process.pid) or last
    return last or None


def shown(pid: int) -> str:
    """What a rank shows of its phase, e.g. `task:1200`; empty if it is gone."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/comm").read_text().strip()
        return text if parted(text)[0] in ORDER else "start"  # before that it is called after its program
    return ""


def parted(text: str) -> tuple[str, int]:
    """Phase and steps of what a rank shows; -1 where it does not say."""
    phase, _, steps = text.partition(":")
    return phase, int(steps) if re.fullmatch(r"\d+", steps) else -1


def partials(folder: Path) -> dict[str, int]:
    """The saves that are going on in a run's folder, or were broken off, each with the time of its last new file.

    An older checkpoint that is being deleted has such a name too.
    """
    found: dict[str, int] = {}
    newest = ""
    with suppress(FileNotFoundError), os.scandir(folder / "checkpoints") as entries:
        for entry in entries:
            name, suffix = os.path.splitext(entry.name)
            with suppress(FileNotFoundError):
                if suffix == ".partial":
                    found[entry.name] = entry.stat().st_mtime_ns
                elif not suffix:
                    newest = max(newest, name)
    return {name: stamp for name, stamp in found.items() if name > newest}


def last_error(log: Path, before: int) -> str:
    """The last line of a log, after its first bytes `before`, that tells of an error, or else its last line."""
    text = log.read_bytes()[before:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error: " in line), (lines or ["no output"])[-1])[:300]

"""One run at a time in a run folder. Rank 0 holds a lock file that says who it is, and stamps it while it lives.

    RUN/lock.1.json     host, process, Slurm job, since when; its modification time is the last sign of life

flock and fcntl are not used: Lustre has them only where it is mounted with them, and they may bind one node alone. This
needs no more than that a file is created by one process only (O_EXCL), and it compares stamps that one clock gave, the
file system's. A holder is dead if
- it ran on this machine (same boot, same process namespace) and that process, with that start time, is gone;
- or it is the same Slurm job before it was requeued: Slurm ends a job's processes before it starts it again;
- or its last sign of life is more than a minute old, and it gives none while we look.

Who takes over makes the file of the next number and only then removes the dead one's. So of two that find it dead one
is first, and none removes a lock that it did not judge. A holder that was thought dead (its machine was frozen, say)
finds the higher number, and saves no more.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from autodo_dist.errors import AutodoError

if TYPE_CHECKING:
    from autodo_dist.parallel.comm import Ranks  # imports torch, which the launcher does without

log = logging.getLogger(__name__)
BEAT = 10.0  # seconds between signs of life
SILENCE = 60.0  # seconds without one after which a holder elsewhere may be dead
PATIENCE = 15.0  # seconds in which such a holder may still give one: more than BEAT


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. machine: boot and process namespace, in which pid and `started` (clock ticks since boot) count.

    job: cluster and number of its Slurm job, None outside; restarts: how often that was requeued.
    """

    host: str
    pid: int
    since: str
    started: int
    machine: str
    job: str | None
    restarts: int


def myself(slurm: bool, environment: Mapping[str, str] = os.environ) -> Holder:
    """This process. `slurm`: whether SLURM_JOB_ID is Slurm's, and not the local launcher's."""
    number = environment.get("SLURM_JOB_ID") if slurm else None
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S%z"),
        started=start_of(os.getpid()),
        machine=machine(),
        job=None if number is None else f"{environment.get('SLURM_CLUSTER_NAME', '')}/{number}",
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


def machine() -> str:
    """This boot and process namespace; where they are not to be seen, a name that no other process has."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return str(uuid.uuid4())


def start_of(pid: int) -> int:
    """When a process of this machine started, in clock ticks since boot; 0 if it has ended. OSError if unknown."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])  # proc(5): state and starttime


def lives(holder: Holder) -> bool | None:
    """Whether a holder of this machine lives; None if its user hides it."""
    try:
        return start_of(holder.pid) == holder.started
    except OSError:
        return None if psutil.pid_exists(holder.pid) else False


def refuse_if_held(folder: Path) -> None:
    """AutodoError if a run that lives holds the folder; for who wants to know before it starts one."""
    found = numbers(folder)
    with suppress(OSError):  # rank 0 will say
        if found and why_dead(file(folder, found[-1]), myself(slurm=False)) is None:
            raise in_use(folder, found[-1])


def take(folder: Path, me: Holder) -> tuple[Path, Holder]:
    """Make `me` the folder's holder, and say whose lock was taken over; the lock's file, and `me`.

    AutodoError if a run that lives holds it, or the file system does not take the lock.
    """
    try:
        while True:
            found = numbers(folder)
            newest = found[-1] if found else 0
            why = None
            if newest:
                try:
                    why = why_dead(file(folder, newest), me)
                except FileNotFoundError:  # it has ended just now
                    continue
                if why is None:
                    raise in_use(folder, newest)
            if not create(folder, newest + 1, me):
                continue
            if why:
                log.warning("run %s: lock of %s taken over, as %s", folder, name(folder, newest), why)
            for number in found:
                file(folder, number).unlink(missing_ok=True)
            return file(folder, newest + 1), me
    except OSError as error:
        raise AutodoError(f"run folder {folder}: cannot be locked ({error.strerror}); mend its disk") from error


def create(folder: Path, number: int, me: Holder) -> bool:
    """Make the lock file of that number; False if someone else was first."""
    try:
        with file(folder, number).open("x", encoding="utf-8") as lock:
            lock.write(json.dumps(asdict(me)) + "\n")
    except FileExistsError:
        return False
    except OSError:
        file(folder, number).unlink(missing_ok=True)  # made, and empty
        raise
    if numbers(folder)[-1] > number:  # it was made from an old listing of the folder
        file(folder, number).unlink(missing_ok=True)
        return False
    return True


def file(folder: Path, number: int) -> Path:
    """The lock file of that number."""
    return folder / f"lock.{number}.json"


def numbers(folder: Path) -> list[int]:
    """The numbers of the lock files that are there, the present holder's last."""
    found = (path.name.split(".")[1] for path in folder.glob("lock.*.json"))
    return sorted(int(number) for number in found if number.isdigit())


def read(path: Path) -> Holder | None:
    """Who made a lock file; None if it does not say, as it is being written or its disk was full."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


def name(folder: Path, number: int) -> str:
    """A lock's holder in words."""
    holder = read(file(folder, number))
    return f"process {holder.pid} on {holder.host}, since {holder.since}" if holder else "a process unknown"


def in_use(folder: Path, number: int) -> AutodoError:
    """The refusal."""
    return AutodoError(
        f"run {folder}: in use by {name(folder, number)}; wait for its end or end it, or choose another run.name"
    )


def why_dead(path: Path, me: Holder) -> str | None:
    """Why the maker of a lock file is dead, in words; None if it may be alive. FileNotFoundError if that is gone."""
    holder = read(path)
    if holder is not None and holder.machine == me.machine and (living := lives(holder)) is not None:
        return None if living else "that process has ended"
    if holder is not None and holder.job is not None and holder.job == me.job and holder.restarts < me.restarts:
        return "that job was requeued"
    last = stamp(path)
    silent = now(path.parent) - last
    if silent <= SILENCE:
        return None
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE))
        if stamp(path) != last:
            return None
    return f"it has given no sign of life for {silent + PATIENCE:.0f} s"


def stamp(path: Path) -> float:
    """When a file was last touched, by its file system's clock. Opened, as NFS looks anew at a file only then."""
    with path.open("rb") as opened:
        return os.fstat(opened.fileno()).st_mtime


def now(folder: Path) -> float:
    """What the clock of the folder's file system says."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="clock.") as probe:
        os.utime(probe.name)
        return os.stat(probe.name).st_mtime


class Lock:
    """The folder's lock, as a run has it: `mine` on rank 0, where a thread stamps the file; None on other ranks."""

    def __init__(self, mine: tuple[Path, Holder] | None, ranks: Ranks) -> None:
        self.mine, self.ranks = mine, ranks
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._stamp, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """AutodoError if the folder is no longer this run's. Every rank must call this."""
        if fault := self.ranks.from_main(self._fault()):
            raise AutodoError(f"{fault}; this run stops and leaves the folder as it is")

    def release(self) -> None:
        """End the signs of life, and remove the file."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if self.mine is not None and read(self.mine[0]) == self.mine[1]:
                self.mine[0].unlink()

    def _stamp(self) -> None:
        while self.mine is not None and not self._ended.wait(BEAT):
            with suppress(OSError):  # a file system may be away for a while
                os.utime(self.mine[0])

    def _fault(self) -> str:
        """Why the folder is no longer this run's; empty if it is, or is not to be seen at the moment."""
        if self.mine is None:
            return ""
        path, me = self.mine
        try:
            found = numbers(path.parent)
            if not found:
                return f"run {path.parent}: its lock {path.name} was removed"
            if read(file(path.parent, found[-1])) != me:
                return f"run {path.parent}: taken over by {name(path.parent, found[-1])}"
        except OSError:
            pass
        return ""


@contextmanager
def held(folder: Path, slurm: bool, ranks: Ranks) -> Iterator[Lock]:
    """Hold the folder's lock for the block. Every rank must call this.

    AutodoError on every rank if a run that lives holds it. `slurm`: whether Slurm started this job.
    """
    mine, refusal = None, ""
    if ranks.main:
        try:
            mine = take(folder, myself(slurm))
        except AutodoError as error:
            refusal = str(error)
    if refusal := ranks.from_main(refusal):
        raise AutodoError(refusal)
    lock = Lock(mine, ranks)
    try:
        yield lock
    finally:
        lock.release()

"""Starts the ranks of a run as processes of this machine, ends them together, says which one failed first, and starts
them again where that is right (verdict.py).

Every rank gets the environment that srun would give it, plus MASTER_ADDR and MASTER_PORT. Rank 0 writes to the
terminal, so that its progress bar shows; rank 1 writes to RUN/logs/rank-00001.out, and so on.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from autodo_dist import ledger
from autodo_dist.ports import free_port
from launcher.failures import Kind, clear_failures, read_failures
from launcher.verdict import note_failure, refusal

_POLL_S = 0.05
_GRACE_S = 2.0  # from SIGTERM to SIGKILL, and then until a process that the kernel does not let go is left alone
_SAVE_S = 90.0  # from a request to stop until ranks that are still there are ended, saved or not: as Slurm gives
_STOPPED = 75  # exit status of a run that was asked to stop by other means than the launcher (sysexits.h: try again)
_PR_SET_PDEATHSIG = 1

Process = subprocess.Popen[bytes]
Codes = dict[int, int]  # rank -> exit status, or minus the number of the signal that ended it


@dataclass(frozen=True)
class Cause:
    """Why a run failed: in a line (empty: rank 0 has said it), of what kind, and where in the run: `task:12`."""

    text: str
    kind: Kind
    at: str


def launch(command: Sequence[str], folder: Path, nodes: int, ranks_per_node: int, max_restarts: int = 0) -> int:
    """Run `command` as nodes × ranks_per_node ranks; the exit status of the launcher.

    0: every rank ended with 0. 1: a rank failed, and the run was not or no more to be started again; the others are
    gone within five seconds and the cause is on stderr. 128 + its number: a signal came, and all ranks are gone, after
    a save where they were training; a second signal ends them at once. 75: they stopped after a save by other means.
    Should the launcher itself be killed, the kernel ends the ranks. Call it from the main thread: it handles signals,
    and ranks die with the thread that started them.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with _signals() as came:
        for attempt in itertools.count():
            clear_failures(folder)
            cause = _attempt(command, folder, nodes, ranks_per_node, attempt, came)
            if came:
                return 128 + came[0]
            if cause is None:
                return _STOPPED if _stopped(folder, attempt) else 0
            if not _again(folder, cause, attempt, max_restarts):
                return 1
    raise AssertionError


def _again(folder: Path, cause: Cause, attempt: int, most: int) -> bool:
    """Note and say why an attempt failed, and whether it is started again."""
    text = cause.text or "rank 0 failed, see its output"
    failed = note_failure(folder, f"{os.getpid()}/{attempt}", text, cause.kind, cause.at)
    reason = refusal(failed, most)
    if cause.text:
        print(f"error: {cause.text}", file=sys.stderr)
    if not reason:
        print(f"starting again ({len(failed)} of at most {most})", file=sys.stderr, flush=True)
    elif most and cause.kind != "user":
        print(f"error: not started again: {reason}; the same command goes on", file=sys.stderr)
    return not reason


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that come during the block, instead of what they would do."""
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    }
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _attempt(
    command: Sequence[str], folder: Path, nodes: int, ranks_per_node: int, attempt: int, came: Sequence[int]
) -> Cause | None:
    """Start all ranks and wait for their end. None: all ended with 0, or a signal came."""
    ranks = nodes * ranks_per_node
    shared = os.environ | _shared_environment(nodes, ranks, free_port()) | {"SLURM_RESTART_COUNT": str(attempt)}
    processes: list[Process] = []
    shown: list[str] = []
    try:
        for rank in range(ranks):
            node, local = divmod(rank, ranks_per_node)
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
            processes.append(_start(command, shared | own, None if rank == 0 else _log(folder, rank)))
        first = _watch(processes, came)
        if came:
            _let_save(processes, came)
        shown = [_shown(process) for process in processes]
    finally:
        codes = _end(processes)
    if not came and not any(first.values()):
        return None
    _restore_terminal()
    if came:
        how = "saved, the same command goes on" if _stopped(folder, attempt) else "all ranks have ended"
        print(f"stopped by {signal.Signals(came[0]).name}; {how}", file=sys.stderr)
        return None
    return _cause(first, codes, folder, shown, f"{os.getpid()}/{attempt}")


def _stopped(folder: Path, attempt: int) -> bool:
    """Whether the ranks have stopped after a save, as they were asked to."""
    end = ledger.ended(ledger.read(folder), f"{os.getpid()}/{attempt}")
    return end is not None and end["cause"] == "stopped"


def _shown(process: Process) -> str:
    """What a rank shows of its phase, e.g. `task:1200`; empty if it does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/comm").read_text().strip()
    return ""


def _shared_environment(nodes: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "SLURM_NTASKS": str(ranks),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": ",".join(["127.0.0.1"] * nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _log(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"rank-{rank:05d}.out"


def _start(command: Sequence[str], environment: dict[str, str], log: Path | None) -> Process:
    """Start one rank in a session of its own: Ctrl-C reaches the launcher only, and one signal its whole family."""
    with contextlib.ExitStack() as files:
        output = files.enter_context(log.open("ab")) if log else None
        if output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            output.flush()
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=_die_with_launcher(),
        )


def _die_with_launcher() -> Callable[[], None]:
    """What a new rank does before its program starts: ask the kernel for SIGKILL at the launcher's death.

    The launcher may have died just before that, hence the look at the parent. An ignored SIGINT stays ignored across
    exec and Python then raises no KeyboardInterrupt. The library is looked up here, before the fork.
    """
    prctl, launcher = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != launcher:
            os._exit(1)

    return prepare


def _watch(processes: Sequence[Process], came: Sequence[int]) -> Codes:
    """Wait until a rank fails, all have ended, or a signal came; the codes of those that have ended by then."""
    while True:
        codes = _codes(processes)
        if came or any(codes.values()) or len(codes) == len(processes):
            return codes
        time.sleep(_POLL_S)


def _let_save(processes: Sequence[Process], came: Sequence[int]) -> None:
    """Ask the ranks to stop, and wait for their end: not after one has failed, nor after a second signal."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)  # not what a rank has started: it may need that for its save
    deadline = time.monotonic() + _SAVE_S
    while len(codes := _codes(processes)) < len(processes) and not any(codes.values()):
        if len(came) > 1 or time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


def _end(processes: Sequence[Process]) -> Codes:
    """End all ranks with everything that they started; the codes as they were before SIGKILL.

    The processes are reaped last: until then their group keeps its number, and no stranger can be hit.
    """
    _signal(processes, signal.SIGTERM)
    codes = _wait(processes)
    _signal(processes, signal.SIGKILL)
    _wait(processes)
    for process in processes:
        if process.poll() is None:
            print(f"process {process.pid} does not end: the kernel holds it (disk or driver)", file=sys.stderr)
    return codes


def _wait(processes: Sequence[Process]) -> Codes:
    deadline = time.monotonic() + _GRACE_S
    while len(codes := _codes(processes)) < len(processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return codes


def _signal(processes: Sequence[Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _codes(processes: Sequence[Process]) -> Codes:
    """Codes of the ranks that have ended; WNOWAIT leaves them to be reaped by `_end`."""
    codes: Codes = {}
    for rank, process in enumerate(processes):
        state = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is not None:
            codes[rank] = state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
    return codes


def _cause(first: Codes, codes: Codes, folder: Path, shown: Sequence[str], attempt: str) -> Cause:
    """Why the run ended, in one line with the place of the log; without it if rank 0 has said just that.

    `first` are the codes before we sent any signal, `codes` those before we sent SIGKILL, `shown` what ranks showed.
    What a warden found comes first: it kills the rank that hangs. A rank that a signal from elsewhere ended leaves no
    record while its peers may, and it can close its connections long before it counts as ended: so it comes next, and
    SIGKILL counts in both. Then the records; then the bare exit status.
    """
    failures = read_failures(folder, attempt)
    where = dict(enumerate(shown)) | {it.rank: it.at for it in failures}
    failures = [it for it in failures if it.kind != "death"]  # of which the exit status says more
    hung = [it for it in failures if it.kind == "hang"]
    killed = [rank for rank, code in first.items() if code < 0]
    killed += [rank for rank, code in codes.items() if code == -signal.SIGKILL]
    kind: Kind = "bug"
    if killed and not hung:
        rank = killed[0]
        number, at = -codes[rank], where[rank]
        hint = "; unless somebody did that, memory ran out (dmesg tells): lower train.batch_size, data.threads or ranks"
        what = f"was killed by signal {number} ({_name(number)}){hint if number == signal.SIGKILL else ''}"
    elif failures:
        cause = failures[0]
        rank, kind, at, what = cause.rank, cause.kind, cause.at, cause.message
        if any((it.rank, it.message) == (0, what) and it.kind in ("user", "outage") for it in failures):
            return Cause("", kind, at)
        what = what if kind == "hang" else f"failed: {what}"
    else:
        rank, code = next((rank, code) for rank, code in first.items() if code)
        at, what = where[rank], f"exited with status {code}"
    log = "above" if rank == 0 else f"in {_log(folder, rank)}"
    return Cause(f"rank {rank} {what}; its output is {log}", kind, at)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "unnamed"


def _restore_terminal() -> None:
    """Show the cursor again and leave the line: rank 0 may have been ended in the middle of its progress bar."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")

"""Starts the ranks of a run as processes of this machine, ends them together and says which one failed first.

Every rank gets the environment that srun would give it, plus MASTER_ADDR and MASTER_PORT. Rank 0 writes to the
terminal, so that its progress bar shows; rank 1 writes to RUN/logs/rank-00001.out, and so on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autodo_dist.ports import free_port
from launcher.job import clear_failures, read_failures

_POLL_S = 0.05
_GRACE_S = 2.0  # from SIGTERM to SIGKILL, and then until a process that the kernel does not let go is left alone
_PR_SET_PDEATHSIG = 1

Process = subprocess.Popen[bytes]
Codes = dict[int, int]  # rank -> exit status, or minus the number of the signal that ended it


def launch(command: Sequence[str], folder: Path, nodes: int, ranks_per_node: int) -> int:
    """Run `command` as nodes × ranks_per_node ranks; the exit status of the launcher.

    0: every rank ended with 0. 1: a rank failed; the others are gone within five seconds and the cause is on stderr.
    130 or 143: Ctrl-C or SIGTERM came and all ranks are gone. Should the launcher itself be killed, the kernel ends the
    ranks. Call it from the main thread: it handles signals, and ranks die with the thread that started them.
    """
    clear_failures(folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    shared = os.environ | _shared_environment(nodes, nodes * ranks_per_node, free_port())
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    processes: list[Process] = []
    try:
        for rank in range(nodes * ranks_per_node):
            node, local = divmod(rank, ranks_per_node)
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
            processes.append(_start(command, shared | own, None if rank == 0 else _log(folder, rank)))
        first = _watch(processes, came)
    finally:
        codes = _end(processes)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not came and not any(first.values()):
        return 0
    _restore_terminal()
    if came:
        print(f"stopped by {signal.Signals(came[0]).name}; all ranks have ended", file=sys.stderr)
        return 128 + came[0]
    if cause := _cause(first, codes, folder):
        print(f"error: {cause}", file=sys.stderr)
    return 1


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


def _cause(first: Codes, codes: Codes, folder: Path) -> str:
    """Why the run ended, in one line with the place of the log; empty if rank 0 has said just that on the terminal.

    `first` are the codes before we sent any signal, `codes` those before we sent SIGKILL. A rank that a signal from
    elsewhere ended leaves no record while its peers may, and it can close its connections long before it counts as
    ended: so it comes first, and SIGKILL counts in both. Then the records, by time; then the bare exit status.
    """
    killed = [rank for rank, code in first.items() if code < 0]
    killed += [rank for rank, code in codes.items() if code == -signal.SIGKILL]
    if killed:
        rank = killed[0]
        number = -codes[rank]
        hint = "; unless somebody did that, memory ran out (dmesg tells): lower train.batch_size, data.threads or ranks"
        what = f"was killed by signal {number} ({_name(number)}){hint if number == signal.SIGKILL else ''}"
    elif failures := read_failures(folder):
        rank, what = failures[0].rank, failures[0].message
        if any((it.rank, it.kind, it.message) == (0, "user", what) for it in failures):
            return ""
        what = f"failed: {what}"
    else:
        rank, code = next((rank, code) for rank, code in first.items() if code)
        what = f"exited with status {code}"
    return f"rank {rank} {what}; its output is " + ("above" if rank == 0 else f"in {_log(folder, rank)}")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "unnamed"


def _restore_terminal() -> None:
    """Show the cursor again and leave the line: rank 0 may have been ended in the middle of its progress bar."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")

"""Runs whose processes are forked from one that has imported everything: a start takes a second instead of ten.

    fork server (imports) -> launcher (launcher.submit's own code) -> ranks

A rank is a process of its own, in a session of its own, with the environment, output and death signal that
launcher/local.py gives it; only its program is not loaded anew. What imports do at a start is not tried here.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch

from autodo_dist.errors import AutodoError
from autodo_dist.load_config import load_config
from autodo_dist.proof.kill import Launcher
from launcher import job, local, submit

IMPORTED = ("autodo_dist.train", "autodo_dist.data.dali", "launcher.submit", __name__)


@functools.cache
def server() -> ForkServerContext:
    """The fork server, once it has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    process = context.Process()  # does nothing
    process.start()
    process.join()
    return context


class Warm:
    """A launcher from the fork server, as `kill.run` watches it."""

    def __init__(self, file: Path, log: Path) -> None:
        self._process = server().Process(target=launch, args=(file, log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status; None while it lives."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""
        self._process.join(timeout)
        status = self._process.exitcode
        assert status is not None
        return status


def start(file: Path, log: Path) -> Launcher:
    """Start the run of a yaml file; what it prints is added to `log`."""
    return Warm(file, log)


def launch(file: Path, log: Path) -> None:
    """What the launcher's process does: launcher/submit.py, but for how a rank begins."""
    redirect(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))
    try:
        with patch.object(local, "_start", begin):
            status = submit.start(load_config(file), dry_run=False)
    except AutodoError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


def begin(command: Sequence[str], environment: dict[str, str], log: Path | None) -> Rank:
    """local._start: fork a rank in place of starting its program."""
    prepare = local._die_with_launcher()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return Rank(pid)
    try:
        os.setsid()
        prepare()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's, which an exec would drop
        os.environ.clear()
        os.environ.update(environment)
        if log is not None:
            redirect(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))
        sys.argv = [job.__file__, command[-1]]
        job.main()
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as ending:
        if ending.code == 0:  # it was asked to stop
            os._exit(0)
        print(ending.code, file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def redirect(to: int) -> None:
    """Have standard output and error go to an open file."""
    for stream in (1, 2):
        os.dup2(to, stream)


class Rank:
    """A forked rank, with what launcher/local.py asks of a process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Its exit status; None while it lives."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

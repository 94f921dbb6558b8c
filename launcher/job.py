"""What every rank runs, the same under Slurm's srun and on this machine: settings -> train(config).

A rank that fails leaves a record before it ends (failures.py). A rank that is asked to stop saves with all the
others and ends with 0 (autodo_dist/stop.py); before there is a handler it dies, with nothing to lose.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from autodo_dist import heartbeat, stop
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config, load_config
from autodo_dist.thread_name import show
from launcher import warden
from launcher.failures import kind_of, record
from launcher.verdict import check_start

_LONGEST_MESSAGE = 500  # characters; torch's errors can fill pages, and the traceback keeps them whole


@dataclass(frozen=True)
class Job:
    """The callable that submitit pickles and `python -m launcher.job` runs; holds the settings as plain values."""

    settings: dict[str, Any]

    def __call__(self) -> None:
        """Train as this process's environment says (SLURM_PROCID and so on); a failure ends the process.

        SystemExit of status 0 where it was asked to stop: submitit writes no result then.
        """
        show("start")
        stop.listen()
        faulthandler.enable()  # a segmentation fault leaves its stack in the rank's log
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # as does the warden's question
        config = check_config(self.settings, "of the job")
        try:
            guard(config)
            from autodo_dist.train import train  # here, as it imports torch, and so that its failure is recorded too

            finished = train(config)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch.distributed.checkpoint's CheckpointException is no Exception
            fail(error, config.folder)
        finally:
            heartbeat.pause(heartbeat.OVER)
        if not finished:
            raise SystemExit(0)


def guard(config: Config) -> None:
    """Have a process watch this rank; rank 0 also looks whether the job may go on."""
    rank, ranks = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    warden.guard(heartbeat.start(config.train.hang_after), config.folder, rank, ranks)
    if rank == 0 and config.launch.executor == "slurm":
        check_start(config.folder, config.launch.max_restarts)


def fail(error: BaseException, folder: Path) -> NoReturn:
    """Say why on stderr (AutodoError: one line; else the traceback), record it below the run's folder, exit with 1.

    The process leaves at once, without the interpreter's clean-up: that may wait for peers which wait for this rank.
    """
    user = isinstance(error, AutodoError)
    message = " ".join((str(error) if user else f"{type(error).__name__}: {error}").split())
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        with contextlib.suppress(OSError):  # stderr may be closed
            # Before the record: the launcher takes a recorded user's error of rank 0 as already on the terminal.
            print(f"error: {message}\n" if user else lines, end="", file=sys.stderr, flush=True)
        record(folder, kind_of(error), message if user else message[:_LONGEST_MESSAGE], heartbeat.here(), lines)
        sys.stdout.flush()
    except OSError as unwritten:
        print(f"error: this rank's failure is not recorded in {folder / 'errors'}: {unwritten}", file=sys.stderr)
    finally:
        os._exit(1)


def main() -> None:
    """`python -m launcher.job FILE.yaml [KEY=VALUE]…`: run one rank with the settings of FILE, and those over them."""
    try:
        config = load_config(Path(sys.argv[1]), sys.argv[2:])
    except AutodoError as error:
        sys.exit(f"error: {error}")
    Job(config.model_dump(mode="json"))()


if __name__ == "__main__":
    main()

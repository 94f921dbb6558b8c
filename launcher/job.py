"""What every rank runs, the same under Slurm's srun and on this machine: settings -> train(config).

A rank that fails leaves RUN/errors/rank-00002.json before it ends. Its peers soon fail too, with no more than
"connection closed", so the record with the earliest time holds the cause.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from autodo_dist.errors import AutodoError
from autodo_dist.files import write_json
from autodo_dist.load_config import check_config, load_config
from autodo_dist.thread_name import show

_LONGEST_MESSAGE = 500  # characters; torch's errors can fill pages, and the traceback keeps them whole


@dataclass(frozen=True)
class Failure:
    """Why a rank ended: seconds since 1970, who, "user" for an AutodoError, one line, and the whole traceback."""

    time: float
    rank: int
    host: str
    kind: Literal["user", "bug"]
    message: str
    traceback: str


@dataclass(frozen=True)
class Job:
    """The callable that submitit pickles and `python -m launcher.job` runs; holds the settings as plain values."""

    settings: dict[str, Any]

    def __call__(self) -> None:
        """Train as this process's environment says (SLURM_PROCID and so on); a failure ends the process."""
        show("start")
        faulthandler.enable()  # a segmentation fault leaves its stack in the rank's log
        config = check_config(self.settings, "of the job")
        try:
            from autodo_dist.train import train  # here, as it imports torch, and so that its failure is recorded too

            train(config)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch.distributed.checkpoint's CheckpointException is no Exception
            fail(error, config.folder)


def fail(error: BaseException, folder: Path) -> NoReturn:
    """Say why on stderr (AutodoError: one line; else the traceback), record it below the run's folder, exit with 1.

    The process leaves at once, without the interpreter's clean-up: that may wait for peers which wait for this rank.
    """
    user = isinstance(error, AutodoError)
    message = " ".join((str(error) if user else f"{type(error).__name__}: {error}").split())
    failure = Failure(
        time=time.time(),
        rank=int(os.environ.get("SLURM_PROCID", "0")),
        host=socket.gethostname(),
        kind="user" if user else "bug",
        message=message if user else message[:_LONGEST_MESSAGE],
        traceback="".join(traceback.format_exception(type(error), error, error.__traceback__)),
    )
    try:
        with contextlib.suppress(OSError):  # stderr may be closed
            # Before the record: the launcher takes a recorded user's error of rank 0 as already on the terminal.
            print(f"error: {message}\n" if user else failure.traceback, end="", file=sys.stderr, flush=True)
        _write(failure, folder / "errors")
        sys.stdout.flush()
    except OSError as unwritten:
        print(f"error: this rank's failure is not recorded in {folder / 'errors'}: {unwritten}", file=sys.stderr)
    finally:
        os._exit(1)


def _write(failure: Failure, errors: Path) -> None:
    errors.mkdir(parents=True, exist_ok=True)
    write_json(errors / f"rank-{failure.rank:05d}.json", asdict(failure))


def read_failures(folder: Path) -> list[Failure]:
    """The failures recorded below a run's folder, earliest first."""
    records = [json.loads(path.read_text()) for path in (folder / "errors").glob("rank-*.json")]
    return sorted((Failure(**record) for record in records), key=lambda failure: failure.time)


def clear_failures(folder: Path) -> None:
    """Remove what an earlier attempt of the run recorded."""
    for path in (folder / "errors").glob("rank-*.json"):
        path.unlink()


def main() -> None:
    """`python -m launcher.job FILE.yaml`: run one rank with the settings of FILE."""
    try:
        config = load_config(Path(sys.argv[1]))
    except AutodoError as error:
        sys.exit(f"error: {error}")
    Job(config.model_dump(mode="json"))()


if __name__ == "__main__":
    main()

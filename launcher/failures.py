"""Why ranks ended: a file each below the run's folder, RUN/errors/rank-00002.json, with its time.

When one fails its peers soon do too, with no more than "connection closed". The earliest record of another kind holds
the cause: clocks of machines differ, and of a rank that was killed its warden writes while its peers do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from autodo_dist import ledger
from autodo_dist.errors import AutodoError, OutageError
from autodo_dist.files import write_json

# An AutodoError; an OutageError; any other exception; that another rank is gone; and what a warden finds: that its rank
# makes no progress, or has ended without a word.
Kind = Literal["user", "outage", "bug", "peer", "hang", "death"]
_GONE = re.compile("(closed|reset) by peer|[Bb]roken pipe|[Cc]onnection was likely closed|remote process exited")


@dataclass(frozen=True)
class Failure:
    """Why a rank ended: seconds since 1970, who, what kind, one line, the whole traceback, where (`task:1200`), and at
    which start of the run.
    """

    time: float
    rank: int
    host: str
    kind: Kind
    message: str
    traceback: str
    at: str = ""
    attempt: str = ""


def record(folder: Path, kind: Kind, message: str, at: str, traceback: str = "", when: float | None = None) -> None:
    """Write why this rank ends, or did at `when`; its warden may do it. OSError if the disk does not take it."""
    file = record_of(folder, rank := int(os.environ.get("SLURM_PROCID", "0")))
    failure = Failure(when or time.time(), rank, socket.gethostname(), kind, message, traceback, at, ledger.attempt())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(failure))


def kind_of(error: BaseException) -> Kind:
    """What kind of failure an exception is."""
    if isinstance(error, AutodoError):
        return "outage" if isinstance(error, OutageError) else "user"
    return "peer" if _GONE.search(str(error)) else "bug"


def record_of(folder: Path, rank: int) -> Path:
    """The file in which it is told why a rank ended."""
    return folder / f"errors/rank-{rank:05d}.json"


def read_failures(folder: Path, attempt: str | None = None) -> list[Failure]:
    """The failures of one start, or of all, that were recorded below a run's folder, the likeliest cause first."""
    found = []
    for path in (folder / "errors").glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # broken off as its node died
            found.append(Failure(**json.loads(path.read_text())))
    return sorted(
        (it for it in found if attempt in (None, it.attempt)),
        key=lambda it: (it.kind != "hang", it.kind == "peer", it.time),
    )


def clear_failures(folder: Path) -> None:
    """Remove what an earlier attempt of the run recorded."""
    for path in (folder / "errors").glob("*.json"):
        path.unlink(missing_ok=True)

"""What a pack that is not finished keeps beside its shards, so that the same command goes on after a kill.

    OUT/unfinished/
      command.json        whose work this is: every option that decides a byte, and what was packed
      probed-00000.json   pictures of one chunk that decode: key -> [bytes of its file, time, height, width]
      train-00000.json    written once the shard is in place: what it was made from, checksums, a row a picture

Every note says what it was made from. A later run keeps what still holds and does the rest again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autodo_dist.data.manifest import PARTS
from autodo_dist.errors import AutodoError
from autodo_dist.files import write_text

FOLDER = "unfinished"
_OURS = re.compile(
    rf"(({'|'.join(PARTS)})-\d+\.(tar|idx)|samples\.parquet|(stamps|manifest)\.json|unreadable\.txt)(\.\d+)?(\.partial)?"
    rf"|{FOLDER}"
)


@contextlib.contextmanager
def begun(out: Path, command: dict[str, Any]) -> Iterator[Path]:
    """Hold `out` for this command, which goes on where it was stopped; yield the folder of notes.

    AutodoError as in `require_usable`, or if another process packs into `out`. The caller ends with `finish`.
    """
    require_usable(out, command)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        require_usable(out, command)  # another pack may have ended meanwhile
        notes = out / FOLDER
        if not read_note(notes / "command.json"):
            notes.mkdir(exist_ok=True)
            write_note(notes / "command.json", command)
        for partial in out.glob("*.partial"):
            partial.unlink()
        yield notes


def require_usable(out: Path, command: dict[str, Any]) -> None:
    """AutodoError if `out` is no folder, holds something else, a packed data set, or another command's work."""
    if out.exists() and not out.is_dir():
        raise AutodoError(f"pack {out}: not a folder; choose another name")
    try:
        found = sorted(os.listdir(out)) if out.exists() else []
    except OSError as error:
        raise AutodoError(f"pack {out}: cannot be read ({error.strerror}); mend its permissions") from error
    before = read_note(out / FOLDER / "command.json")
    if "manifest.json" in found and before != command:  # else it was stopped after its last word: it only tidies up
        raise AutodoError(f"pack {out}: already holds a packed data set; choose another folder or delete it")
    # Without our note nothing is ours: webdataset's own tars have such names too.
    foreign = [name for name in found if name != FOLDER and not (before and _OURS.fullmatch(name))]
    if foreign:
        raise AutodoError(f"pack {out}: holds other things ({foreign[0]!r}); choose an empty or a new folder")
    differing = [name for name in sorted(before.keys() | command.keys()) if before.get(name) != command.get(name)]
    if before and differing:
        differences = ", ".join(f"{name} {before.get(name)!r}, not {command.get(name)!r}" for name in differing)
        raise AutodoError(
            f"pack {out}: holds an unfinished pack of another command ({differences}); "
            "run that one again, choose another folder, or delete it"
        )


def finish(out: Path) -> None:
    """Drop the notes of a pack whose manifest is in place."""
    shutil.rmtree(out / FOLDER)


def write_note(path: Path, value: dict[str, Any]) -> None:
    """Write a note, whole or not at all."""
    write_text(path, json.dumps(value, separators=(",", ":")))


def read_note(path: Path) -> dict[str, Any]:
    """Read a note; empty if there is none, or if it was spoilt, as by a power cut: its work is done again."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second pack out of the folder, where its file system has locks."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise AutodoError(f"pack {out}: another pack is writing there; wait for it or choose another folder") from error
    except OSError:
        pass  # no locks here
    try:
        yield
    finally:
        os.close(folder)

"""checkpoint.json, read without trusting it: format, step, progress, and which files a checkpoint consists of.

It holds the SHA-256 of every other file and of what it says itself, so that a flipped bit in any of them is found. Only
files that a save writes may be named, and neither they nor their folder may be links out of the run's folder: that is
looked at before any of them is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from autodo_dist.files import write_text
from autodo_dist.parallel.checkpoint_metadata import LayoutError, read_small

FORMAT = 3  # 1 stored the optimizer's settings as pickles beside its tensors; 2 had no SHA-256 of checkpoint.json
FILE_NAME = re.compile(r"\.metadata|__\d+_\d+\.distcp", re.ASCII)


class NewerFormat(LayoutError):
    """A checkpoint that a newer program wrote: nothing is wrong with it."""


@dataclass(frozen=True)
class Header:
    """What checkpoint.json says; `sizes` in bytes and `sha256` by file name."""

    step: int
    progress: dict[str, Any]
    sizes: dict[str, int]
    sha256: dict[str, str]


def write_header(path: Path, header: dict[str, Any]) -> None:
    """Write checkpoint.json into the folder `path`, whole and for good, with the SHA-256 of what it says."""
    write_text(path / "checkpoint.json", _sealed(header))


def _sealed(header: dict[str, Any]) -> str:
    """The text of checkpoint.json; its last field is the SHA-256 of the text without it."""
    digest = hashlib.sha256(json.dumps(header, indent=1).encode()).hexdigest()
    return json.dumps(header | {"sha256": digest}, indent=1) + "\n"


def read_header(path: Path) -> Header:
    """The header of the checkpoint in folder `path`. LayoutError if it is not one, or names files outside the run."""
    run = path.parent.parent
    require_inside(path, run)
    try:
        require_inside(path / "checkpoint.json", run)
        raw = read_small(path / "checkpoint.json")
        value = json.loads(raw)
        whole = _as_written(value, raw)
    except (OSError, ValueError, RecursionError) as error:
        raise LayoutError(f"checkpoint.json is unreadable ({type(error).__name__}: {ascii(str(error))[:80]})") from None
    if not whole:
        raise LayoutError("checkpoint.json is not what was written (checksum)")
    header = _header(value)
    if path.name != f"step-{header.step:08d}":
        raise LayoutError(f"checkpoint.json is that of step {header.step}")
    for name in header.sizes:
        require_inside(path / name, run)
    return header


def _as_written(value: Any, raw: bytes) -> bool:
    """Whether checkpoint.json is as `write_header` wrote it, to the byte. Formats 1 and 2 were not; later ones are."""
    fields = value if isinstance(value, dict) else {}
    if "sha256" not in fields and not (_counts(written := fields.get("format")) and written > 2):
        return True
    return raw == _sealed({name: field for name, field in fields.items() if name != "sha256"}).encode()


def _header(value: Any) -> Header:
    fields = value if isinstance(value, dict) else {}
    if _counts(written := fields.get("format")) and written > FORMAT:
        raise NewerFormat(f"format {written} is newer than this program's {FORMAT}")
    step, progress, files = (fields.get(name) for name in ("step", "progress", "files"))
    if not (_counts(written) and _counts(step) and isinstance(progress, dict) and isinstance(files, dict)):
        raise LayoutError("checkpoint.json has no format, step, progress or files")
    for name, facts in files.items():
        if not FILE_NAME.fullmatch(name):
            raise LayoutError(f"checkpoint.json names {ascii(name)[:80]}, no file that a save writes")
        if not (isinstance(facts, dict) and _counts(facts.get("size")) and isinstance(facts.get("sha256"), str)):
            raise LayoutError(f"checkpoint.json has no size or SHA-256 of {name}")
    if ".metadata" not in files:
        raise LayoutError("checkpoint.json does not list .metadata")
    sizes = {name: facts["size"] for name, facts in files.items()}
    return Header(step, progress, sizes, {name: facts["sha256"] for name, facts in files.items()})


def require_inside(path: Path, run: Path) -> None:
    """LayoutError where a path leads out of the run's folder `run`, or to something that is neither file nor folder."""
    try:
        found = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        raise LayoutError(f"{path.name} is a link that leads nowhere") from None
    if not found.is_relative_to(run.resolve()):
        raise LayoutError(f"{path.name} is a link out of the run's folder {run}")
    if found.exists() and not (found.is_dir() or found.is_file()):
        raise LayoutError(f"{path.name} is neither a file nor a folder")


def _counts(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63

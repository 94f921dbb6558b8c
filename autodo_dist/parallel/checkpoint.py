"""Sharded checkpoints: which there are, checked before they are trusted, loaded on any number of ranks.

    checkpoints/step-00001200/
      __0_0.distcp, …, .metadata    torch.distributed.checkpoint: every rank its part; tensors and nothing else
      checkpoint.json               format, step, progress, size and SHA-256 of every file; written last

A folder named step-… is complete and on the disk: see checkpoint_save. There is no file that names the newest one, as
it could say more than is true.
Reading one runs nothing that it holds: see checkpoint_header, checkpoint_metadata and checkpoint_tensors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from autodo_dist.errors import AutodoError
from autodo_dist.files import sha256
from autodo_dist.parallel.checkpoint_header import Header, NewerFormat, read_header, require_inside
from autodo_dist.parallel.checkpoint_metadata import LayoutError, read_metadata
from autodo_dist.parallel.checkpoint_tensors import Reader
from autodo_dist.parallel.comm import Ranks

log = logging.getLogger(__name__)


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of everything in nested dicts and lists."""
    if isinstance(state, Mapping | list | tuple):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        for key, value in items:
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, state


def restore(path: Path, state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Load the tensors of checkpoint `path` into `state`, in place; its progress. Every rank must call this."""
    try:
        header = read_header(path)
        dcp.load(state, storage_reader=Reader(path, header.sizes))
    except (dcp.CheckpointException, LayoutError, RuntimeError, ValueError) as error:
        if isinstance(cause(error), LayoutError):
            raise AutodoError(f"checkpoint {path}: {reason(error)}; choose another") from error
        raise AutodoError(
            f"checkpoint {path}: does not fit this model ({reason(error)}); start another run.name"
        ) from error
    return header.progress


def newest(root: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint whose files are all as they were written, or None. Every rank must call this.

    Broken ones are passed over with a warning and renamed to step-….broken; AutodoError if all are broken, or for one
    that a newer program wrote: a run that went on from before it would lose its steps.
    """
    found: Path | str | None = None
    if ranks.main:
        try:
            found = _newest(root)
        except LayoutError as error:
            found = str(error)
    found = ranks.from_main(found)
    if isinstance(found, str):
        raise AutodoError(found)
    return found


def _newest(root: Path) -> Path | None:
    require_inside(root, root.parent)
    for path in root.glob("step-*.replaced"):
        if not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
    candidates = complete(root)
    for path in reversed(candidates):
        try:
            examine(path)
            return path
        except NewerFormat as error:
            cure = "update the program, or move the checkpoint away"
            raise LayoutError(f"checkpoint {path}: {error}; {cure}") from error
        except LayoutError as error:
            log.warning("checkpoint %s: %s; passed over and renamed to %s.broken", path, error, path.name)
            broken = path.with_suffix(".broken")
            shutil.rmtree(broken, ignore_errors=True)
            path.rename(broken)
    if candidates:
        cure = "delete the folder to start anew, or restore one from a copy"
        raise LayoutError(f"checkpoints in {root}: all broken; {cure}")
    return None


def existing(root: Path, step: int) -> Path:
    """Checkpoint `step`. AutodoError if there is none or its files are not as they were written."""
    path = folder(root, step)
    if not path.is_dir():
        have = ", ".join(str(step_of(found)) for found in complete(root)) or "none"
        raise AutodoError(f"{root}: no checkpoint of step {step}; those there: {have}")
    if fault := check(path):
        raise AutodoError(f"checkpoint {path}: {fault}; choose another")
    return path


def complete(root: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def check(path: Path, contents_of: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, or None; see `examine`."""
    try:
        examine(path, contents_of)
    except LayoutError as error:
        return str(error)
    return None


def examine(path: Path, contents_of: Collection[str] | None = None) -> tuple[Header, Metadata]:
    """What a checkpoint says of itself, after a look at its files' sizes and contents against checkpoint.json.

    `contents_of` names the files whose contents are read for that; None: all. LayoutError names the first wrong one.
    """
    header = read_header(path)
    try:
        for name, size in header.sizes.items():
            if (found := (path / name).stat().st_size) != size:
                raise LayoutError(f"{name} has {found} bytes instead of {size}")
            if (contents_of is None or name in contents_of) and sha256(path / name) != header.sha256[name]:
                raise LayoutError(f"{name} is not what was written (checksum)")
        return header, read_metadata(path, header.sizes)
    except OSError as error:
        raise LayoutError(f"{name} is unreadable ({error.strerror})") from error


def cause(error: BaseException) -> BaseException:
    """The error of the first rank that had one, which DCP wraps."""
    if isinstance(error, dcp.CheckpointException):
        return min(error.failures.items())[1][0]
    return error


def reason(error: BaseException) -> str:
    """What went wrong, in a few words; DCP wraps the errors of the ranks in pages of tracebacks."""
    return " ".join(str(cause(error)).split())[:200]


def prune(root: Path, keep: int, best: int | None, ranks: Ranks) -> None:
    """Delete all but the `keep` newest checkpoints and that of step `best`, and what broken-off saves left."""
    if ranks.main:
        for path in [*spare(root, keep, best), *root.glob("*.partial")]:
            delete(path)
        for path in root.glob("step-*.replaced"):
            if path.with_suffix("").exists():
                delete(path)


def spare(root: Path, keep: int, best: int | None) -> list[Path]:
    """The checkpoints that `prune` deletes, oldest first."""
    return [path for path in complete(root)[:-keep] if best is None or path != folder(root, best)]


def delete(path: Path) -> None:
    """Delete a checkpoint. Cut short, it is no folder named step-… any more, and the next save takes the rest away.

    Another process may delete the same at the same time.
    """
    partial = path.with_suffix(".partial")
    with contextlib.suppress(FileNotFoundError):
        if path != partial:
            shutil.rmtree(partial, ignore_errors=True)
            os.replace(path, partial)
        shutil.rmtree(partial)


def replaced(path: Path) -> Path:
    """Where a checkpoint lies while another one of its step takes its place."""
    return path.with_suffix(".replaced")


def folder(root: Path, step: int) -> Path:
    """Where checkpoint `step` lies."""
    return root / f"step-{step:08d}"

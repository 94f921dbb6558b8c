"""Sharded checkpoints: written whole or not at all, checked before they are trusted, loaded on any number of ranks.

    checkpoints/step-00001200/
      __0_0.distcp, …, .metadata    torch.distributed.checkpoint: every rank its part
      checkpoint.json               format, step, progress, size and SHA-256 of every file; written last

A save goes to a `.partial` folder that is renamed when every rank is done, so a folder named step-… is complete.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from autodo_dist.errors import AutodoError
from autodo_dist.files import sha256, write_json
from autodo_dist.parallel.comm import Ranks

FORMAT = 1
log = logging.getLogger(__name__)


def save(root: Path, step: int, state: dict[str, Any], progress: dict[str, Any], ranks: Ranks) -> None:
    """Save tensors `state` and JSON `progress` as checkpoint `step`. Every rank must call this.

    AutodoError if the disk does not take it.
    """
    final = folder(root, step)
    try:
        _write(final, step, state, progress, ranks)
    except (dcp.CheckpointException, OSError) as error:
        cure = "free space or mend the disk, then run the same command again"
        raise AutodoError(f"checkpoint {final}: cannot be written ({reason(error)}); {cure}") from error


def _write(final: Path, step: int, state: dict[str, Any], progress: dict[str, Any], ranks: Ranks) -> None:
    partial = final.with_suffix(".partial")
    if ranks.main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    dcp.save(state, checkpoint_id=partial)
    mine = [path for path in partial.iterdir() if path.name.startswith(f"__{ranks.rank}_")]
    if ranks.main:
        mine.append(partial / ".metadata")
    written = ranks.gather({path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in mine})
    if ranks.main:
        files = {name: facts for part in written for name, facts in part.items()}
        header = {"format": FORMAT, "step": step, "progress": progress, "files": files}
        write_json(partial / "checkpoint.json", header)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    ranks.barrier()


def restore(path: Path, state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Load the tensors of checkpoint `path` into `state`, in place; its progress. Every rank must call this."""
    header: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
    try:
        dcp.load(state, checkpoint_id=path)
    except (dcp.CheckpointException, RuntimeError, ValueError) as error:
        raise AutodoError(
            f"checkpoint {path}: does not fit this model ({reason(error)}); start another run.name"
        ) from error
    progress: dict[str, Any] = header["progress"]
    return progress


def newest(root: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint whose files are all as they were written, or None. Every rank must call this.

    Broken ones are passed over with a warning and renamed to step-….broken; AutodoError if all are broken.
    """
    found: Path | str | None = None
    if ranks.main:
        candidates = complete(root)
        for path in reversed(candidates):
            fault = check(path)
            if fault is None:
                found = path
                break
            log.warning("checkpoint %s: %s; passed over and renamed to %s.broken", path, fault, path.name)
            path.rename(path.with_suffix(".broken"))
        if candidates and found is None:
            found = f"checkpoints in {root}: all broken; delete the folder to start anew, or restore one from a copy"
    found = ranks.from_main(found)
    if isinstance(found, str):
        raise AutodoError(found)
    return found


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
    """What is wrong with a checkpoint's files, or None: their sizes and contents against checkpoint.json.

    `contents_of` names the files whose contents are read for that; None: all.
    """
    try:
        header = json.loads((path / "checkpoint.json").read_text())
        if header["format"] > FORMAT:
            return f"format {header['format']} is newer than this program's {FORMAT}"
        for name, facts in header["files"].items():
            if (path / name).stat().st_size != facts["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {facts['size']}"
            if (contents_of is None or name in contents_of) and sha256(path / name) != facts["sha256"]:
                return f"{name} is not what was written (checksum)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable ({error!r})"
    return None


def reason(error: BaseException) -> str:
    """What went wrong, in a few words; DCP wraps the errors of the ranks in pages of tracebacks."""
    if isinstance(error, dcp.CheckpointException):
        error = min(error.failures.items())[1][0]
    return " ".join(str(error).split())[:200]


def prune(root: Path, keep: int, best: int | None, ranks: Ranks) -> None:
    """Delete all but the `keep` newest checkpoints and that of step `best`, and what broken-off saves left."""
    if not ranks.main:
        return
    spare = [path for path in complete(root)[:-keep] if best is None or path != folder(root, best)]
    for path in [*spare, *root.glob("*.partial")]:
        shutil.rmtree(path)


def folder(root: Path, step: int) -> Path:
    """Where checkpoint `step` lies."""
    return root / f"step-{step:08d}"

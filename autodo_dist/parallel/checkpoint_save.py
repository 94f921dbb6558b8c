"""Checkpoints, written while training goes on: whole or not at all, and on the disk before they count.

    tensors -> staging buffer (a copy: all that training waits for)
    -> a thread: every rank's file and .metadata in a .partial folder, fsync -> size and SHA-256 of each
    -> checkpoint.json -> rename to step-… -> older ones deleted

A crash in between leaves a .partial folder, which no resume looks at and the next save takes away. A checkpoint of the
same step is renamed to .replaced before; a crash between the two renames leaves it so, and a resume takes it back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from autodo_dist.errors import AutodoError
from autodo_dist.files import sha256, sync
from autodo_dist.parallel.checkpoint import complete, folder, leaves, prune, reason, replaced
from autodo_dist.parallel.checkpoint_header import FORMAT, write_header
from autodo_dist.parallel.comm import Ranks

log = logging.getLogger(__name__)
BESIDE = 1 << 20  # bytes of a checkpoint beside its tensors: zip records, names, progress
PATIENCE = 60.0  # seconds that a rank which fails waits for its save to end


class Saver:
    """Saves of one run into `root`, one after another, on a thread with a process group of its own.

    The buffer is made by the first save and used again by the others. Every method is a collective.
    """

    def __init__(self, root: Path, ranks: Ranks) -> None:
        gpu = ranks.device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
        )
        self.root, self.ranks = root, ranks.twin()
        self._stager = DefaultStager(options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._going: Future[str] | None = None

    def save(
        self, step: int, state: dict[str, Any], progress: dict[str, Any], *, keep: int, best: int | None, beside: Path
    ) -> None:
        """Save `state` and `progress` as they are now; they may change once this returns.

        Waits for the save before. Then all but the `keep` newest checkpoints and that of step `best` are deleted. What
        the file `beside` holds by now is on the disk before the checkpoint is.
        """
        self.wait()
        staged = cast(dict[str, Any], self._stager.stage(state))  # no future, as staging is not asynchronous
        self._going = self._thread.submit(self._save, step, staged, progress, keep, best, beside)

    def _save(
        self, step: int, state: dict[str, Any], progress: dict[str, Any], keep: int, best: int | None, beside: Path
    ) -> str:
        try:
            save(self.root, step, state, progress, self.ranks, beside)
        except AutodoError as error:
            if self.ranks.main:
                kept = [found.name for found in complete(self.root)[-1:]]
                log.warning("%s; kept: %s", error, *kept or ["none"])
            return str(error)
        prune(self.root, keep, best, self.ranks)
        return ""

    def wait(self) -> str:
        """Wait for the end of the newest save; why it failed, the same on every rank, or the empty string."""
        return self._going.result() if self._going is not None else ""

    def __enter__(self) -> Saver:
        """To be left at the end of the saves."""
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Wait for the save that is going on, and free the buffer.

        After an error no longer than PATIENCE: the save may wait for a rank that is gone, or waits for this one to go.
        """
        if error is not None and self._going is not None:
            wait([self._going], PATIENCE)
        self._thread.shutdown(wait=error is None)
        if error is None:
            self._stager.close()


def save(
    root: Path, step: int, state: dict[str, Any], progress: dict[str, Any], ranks: Ranks, beside: Path | None = None
) -> None:
    """Save tensors `state` and JSON `progress` as checkpoint `step` now. Every rank must call this.

    AutodoError, on every rank alike, if the disk does not take it; TypeError for a leaf of `state` that is no tensor,
    which DCP would pickle.
    """
    for name, leaf in leaves(state):
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"checkpoint: {name} is no tensor but {type(leaf).__name__}; it belongs into progress")
    final, needed = folder(root, step), size(state)
    fault = _too_full(root, needed, ranks)
    if not fault:
        try:
            return _write(final, step, state, progress, ranks, beside)
        except (dcp.CheckpointException, OSError) as error:
            fault = reason(error)
    if ranks.main:
        shutil.rmtree(_partial(final), ignore_errors=True)
    free = ranks.from_main(_disk(root).free)
    raise AutodoError(f"checkpoint {final}: cannot be written ({fault}); it takes {needed:,} bytes, {free:,} are free")


def size(state: Any) -> int:
    """Bytes of all tensors in a tree of dicts, each counted once and with the parts of all ranks."""
    if isinstance(state, torch.Tensor):  # a sharded one counts the elements of all ranks
        return state.numel() * state.element_size()
    return sum(map(size, state.values())) if isinstance(state, dict) else 0


def _too_full(root: Path, needed: int, ranks: Ranks) -> str:
    """Why so many bytes of tensors need not be tried: the disk is too full. Else empty."""
    disk = _disk(root)
    # A little for what is written beside the tensors. Some file systems do not know their size, and say 0.
    full = disk.total > 0 and disk.free < needed * 1.01 + BESIDE
    return ranks.from_main("the disk is too full" if full else "")


def _disk(root: Path) -> Any:
    """Bytes in all, used and free where `root` is or will be."""
    return shutil.disk_usage(next(place for place in (root, *root.absolute().parents) if place.exists()))


def _write(
    final: Path, step: int, state: dict[str, Any], progress: dict[str, Any], ranks: Ranks, beside: Path | None
) -> None:
    partial = _partial(final)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if beside is not None:
            sync(beside)

    def finish() -> None:
        files = {name: facts for part in written for name, facts in part.items()}
        header = {"format": FORMAT, "step": step, "progress": progress, "files": files}
        write_header(partial, header)  # and with it every name in this folder is on the disk
        if final.exists():  # a stop in an evaluation saved this step without it; no moment is to have neither
            shutil.rmtree(replaced(final), ignore_errors=True)
            os.replace(final, replaced(final))
        os.replace(partial, final)
        sync(final.parent)
        for place in final.parent.parents[:2]:  # checkpoints/ and the run's folder may be new
            with contextlib.suppress(PermissionError):
                sync(place)

    _together(begin if ranks.main else None, ranks)
    dcp.save(state, checkpoint_id=partial, process_group=ranks.group)
    written = _together(lambda: _facts(partial, ranks), ranks)
    _together(finish if ranks.main else None, ranks)


def _partial(final: Path) -> Path:
    return final.with_suffix(".partial")


def _facts(partial: Path, ranks: Ranks) -> dict[str, Any]:
    """Size and SHA-256 of the files that this rank wrote."""
    mine = [path for path in partial.iterdir() if path.name.startswith(f"__{ranks.rank}_")]
    if ranks.main:
        mine.append(partial / ".metadata")
    return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in mine}


def _together(work: Callable[[], Any] | None, ranks: Ranks) -> list[Any]:
    """What each rank's `work` gives; the OSError that one meets is raised on all, so that none waits for it.

    Every rank must call this, those with nothing to do as well.
    """
    answer = None
    try:
        answer = work() if work is not None else None
    except OSError as error:
        answer = error
    answers = ranks.gather(answer)
    for found in answers:
        if isinstance(found, OSError):
            raise found
    return answers

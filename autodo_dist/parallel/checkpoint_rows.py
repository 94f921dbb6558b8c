"""Rows of a checkpoint's tensors, without loading them: one read at (place of the values) + (row)·(bytes of a row)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from autodo_dist.errors import AutodoError
from autodo_dist.parallel import checkpoint
from autodo_dist.parallel.checkpoint_metadata import LayoutError
from autodo_dist.parallel.checkpoint_tensors import Window, read_rows, values_start
from autodo_dist.parallel.row_table import Ids


class RowReader:
    """Rows of the tensors of one checkpoint. `bytes_read` counts what was read of the files that hold tensors.

    Sizes of all files are compared with checkpoint.json, and the contents of those that `contents_of` names (None: of
    all). By default that is .metadata alone, as more would be to read all of it for a few rows. AutodoError where
    something differs.
    """

    def __init__(self, path: Path, contents_of: Collection[str] | None = (".metadata",)) -> None:
        self.path, self.bytes_read = path, 0
        try:
            self.header, self.metadata = checkpoint.examine(path, contents_of)
        except LayoutError as error:
            raise AutodoError(f"checkpoint {path}: {error}; choose another with --step") from error

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self.metadata.state_dict_metadata)

    def size(self, name: str) -> torch.Size:
        """Shape of the tensor called `name`. AutodoError if there is none."""
        return self._stored(name).size

    def dtype(self, name: str) -> torch.dtype:
        """Type of the tensor called `name`. AutodoError if there is none."""
        return self._stored(name).properties.dtype

    def rows(self, name: str, rows_n: Ids) -> torch.Tensor:
        """The rows (n × …) of the tensor called `name`, in the order asked for; no memory but theirs is taken."""
        stored = self._stored(name)
        dtype, count = stored.properties.dtype, len(rows_n)
        strange = rows_n[(rows_n < 0) | (rows_n >= stored.size[0])]
        if len(strange):
            raise AutodoError(f"checkpoint {self.path}: {name} has {stored.size[0]} rows, not one of {strange[0]}")
        raw_nb = np.empty((count, stored.size[1:].numel() * dtype.itemsize), np.uint8)
        for chunk in stored.chunks:
            rows = rows_n - chunk.offsets[0]
            (wanted,) = np.nonzero((rows >= 0) & (rows < chunk.sizes[0]))
            if len(wanted):
                with self._window(name, chunk) as window:
                    _read_lines(window, values_start(window, chunk.sizes, dtype), raw_nb, wanted, rows)
        return torch.from_numpy(raw_nb.reshape(-1)).view(dtype).reshape(count, *stored.size[1:])

    def between(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The rows from `start` up to `stop` of the tensor called `name`; a number is one row, and comes as such."""
        stored = self._stored(name)
        found = torch.empty((stop - start, *stored.size[1:]), dtype=stored.properties.dtype)
        for chunk in stored.chunks if found.numel() else ():
            first = chunk.offsets[0] if chunk.offsets else 0
            low, high = max(start, first), min(stop, first + (chunk.sizes[0] if chunk.sizes else 1))
            if low < high:
                with self._window(name, chunk) as window:
                    read_rows(window, chunk, found.dtype, low - first, found[low - start : high - start])
        return found

    def whole(self, name: str) -> torch.Tensor:
        """The whole tensor called `name`."""
        size = self.size(name)
        return self.between(name, 0, size[0] if size else 1).reshape(size)

    def blocks(self, name: str, block_bytes: int) -> Iterator[tuple[int, int]]:
        """Where consecutive blocks of rows of the tensor called `name` begin and end, of about so many bytes each.

        None for a tensor without elements.
        """
        size = self.size(name)
        rows, row_bytes = (size[0] if size else 1), size[1:].numel() * self.dtype(name).itemsize
        step = max(1, block_bytes // max(1, row_bytes))
        for start in range(0, rows if row_bytes else 0, step):
            yield start, min(rows, start + step)

    def _stored(self, name: str) -> TensorStorageMetadata:
        stored = self.metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise AutodoError(f"checkpoint {self.path}: holds no tensor {name}; was it saved by another version?")
        return stored

    @contextmanager
    def _window(self, name: str, chunk: ChunkStorageMetadata) -> Iterator[Window]:
        """Where a chunk was stored. AutodoError for what goes wrong with it."""
        info = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        try:
            with Window(self.path / info.relative_path, info.offset, info.length) as window:
                yield window
                self.bytes_read += window.bytes_read
        except (LayoutError, OSError) as error:
            raise AutodoError(
                f"checkpoint {self.path}: {name} is not stored as expected ({checkpoint.reason(error)}); "
                "read it with the version of torch that wrote it, or choose another with --step"
            ) from error


def _read_lines(window: Window, start: int, raw_nb: npt.NDArray[np.uint8], wanted: Ids, rows_n: Ids) -> None:
    """Fill the `wanted` lines of `raw_nb` with as many rows of a chunk, counted from its first, at `start`."""
    for line in wanted:
        window.seek(start + int(rows_n[line]) * raw_nb.shape[1])
        if window.readinto(raw_nb[line].data) != raw_nb.shape[1]:
            raise LayoutError(f"the file ends before row {rows_n[line]}")


def find_checkpoint(root: Path, step: int | None) -> Path:
    """Checkpoint `step`, or the newest where that is None, unread. AutodoError if there is none."""
    have = checkpoint.complete(root)
    found = [path for path in have if step is None or checkpoint.step_of(path) == step]
    if not found:
        steps = ", ".join(str(checkpoint.step_of(path)) for path in have) or "none"
        asked = "yet" if step is None else f"of step {step}"
        raise AutodoError(f"{root}: no checkpoint {asked}; those there: {steps}")
    return found[-1]

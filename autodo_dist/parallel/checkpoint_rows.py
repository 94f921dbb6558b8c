"""A few rows out of a checkpoint's tensors, without loading them.

DCP stores a tensor in chunks, one a rank, each as a zip that torch.save wrote at some place of a file:

    .metadata             which rows a chunk holds; file, offset and length of its zip
    __0_0.distcp          zip | zip | …
    zip                   data.pkl (type, shape, strides) | byteorder | data/0 (the values, uncompressed) | directory

So a row is one read at (place of data/0) + (row in the chunk)·(bytes of a row). All of this is looked up in the files
and compared with what a contiguous tensor would give; nothing is taken for granted.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from autodo_dist.errors import AutodoError
from autodo_dist.parallel import checkpoint
from autodo_dist.parallel.row_table import Ids

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's record: signature, …, lengths of its name and extra field


class LayoutError(Exception):
    """What is not as DCP and torch.save are known to write it."""


class Window(io.RawIOBase):
    """`length` bytes of a file from `offset` on, as a file of their own; `bytes_read` counts what was read of them."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self.file, self.offset, self.length = path.open("rb", buffering=0), offset, length
        self.position = self.bytes_read = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, counted from the window's start, the present place or the window's end."""
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: memoryview | bytearray) -> int:  # type: ignore[override]  # as io calls it
        """Fill the buffer from here on, as far as the window goes; how many bytes there were."""
        view = memoryview(buffer).cast("B")[: max(0, self.length - self.position)]
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(view)
        self.position += count
        self.bytes_read += count
        return count

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


class RowReader:
    """Rows of the tensors of one checkpoint. `bytes_read` counts what was read of the files that hold tensors.

    Sizes of all files and the contents of .metadata are compared with checkpoint.json. The contents of the rest are
    not, as that would be to read all of it; `autodo evaluate RUN --step N` does. AutodoError where something differs.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes_read = path, 0
        if fault := checkpoint.check(path, contents_of=[".metadata"]):
            raise AutodoError(f"checkpoint {path}: {fault}; choose another with --step")
        self.metadata = dcp.FileSystemReader(path).read_metadata()

    def size(self, name: str) -> torch.Size:
        """Shape of the tensor called `name`. AutodoError if there is none."""
        return self._stored(name).size

    def rows(self, name: str, rows_n: Ids) -> torch.Tensor:
        """The rows (n × …) of the tensor called `name`, in the order asked for; no memory but theirs is taken."""
        stored = self._stored(name)
        dtype, count = stored.properties.dtype, len(rows_n)
        strange = rows_n[(rows_n < 0) | (rows_n >= stored.size[0])]
        if len(strange):
            raise AutodoError(f"checkpoint {self.path}: {name} has {stored.size[0]} rows, not one of {strange[0]}")
        raw_nb = np.empty((count, stored.size[1:].numel() * dtype.itemsize), np.uint8)
        try:
            for chunk in stored.chunks:
                rows = rows_n - chunk.offsets[0]
                (wanted,) = np.nonzero((rows >= 0) & (rows < chunk.sizes[0]))
                if len(wanted):
                    self._read(name, stored, chunk, raw_nb, wanted, rows)
        except (LayoutError, OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError) as error:
            raise AutodoError(
                f"checkpoint {self.path}: {name} is not stored as expected ({checkpoint.reason(error)}); "
                "read it with the version of torch that wrote it, or choose another with --step"
            ) from error
        return torch.from_numpy(raw_nb.reshape(-1)).view(dtype).reshape(count, *stored.size[1:])

    def _stored(self, name: str) -> TensorStorageMetadata:
        stored = self.metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise AutodoError(f"checkpoint {self.path}: holds no tensor {name}; was it saved by another version?")
        return stored

    def _read(
        self,
        name: str,
        stored: TensorStorageMetadata,
        chunk: ChunkStorageMetadata,
        raw_nb: npt.NDArray[np.uint8],
        wanted: Ids,
        rows_n: Ids,
    ) -> None:
        """Fill the `wanted` lines of `raw_nb` with as many rows of a chunk, counted from its first."""
        info = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        if info.transform_descriptors:
            raise LayoutError(f"encoded by {info.transform_descriptors}")
        if chunk.sizes[1:] != stored.size[1:]:
            raise LayoutError("not cut by rows alone")
        with Window(self.path / info.relative_path, info.offset, info.length) as window:
            start = values_start(window, chunk.sizes, stored.properties.dtype)
            for line in wanted:
                window.seek(start + int(rows_n[line]) * raw_nb.shape[1])
                if window.readinto(raw_nb[line].data) != raw_nb.shape[1]:
                    raise LayoutError(f"{info.relative_path} ends before row {rows_n[line]}")
            self.bytes_read += window.bytes_read


def values_start(window: Window, shape: torch.Size, dtype: torch.dtype) -> int:
    """Where the values begin in the zip of one contiguous tensor. LayoutError if it is not that, uncompressed."""
    tensor = torch.load(
        cast(IO[bytes], window), map_location="meta", weights_only=True
    )  # reads shape and type, not the values
    if (tensor.shape, tensor.dtype) != (shape, dtype) or tensor.storage_offset() or not tensor.is_contiguous():
        raise LayoutError(f"{tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}")
    with zipfile.ZipFile(window) as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        if "data/0" not in records or "byteorder" not in records:
            raise LayoutError(f"a zip of {', '.join(records)}")
        if (order := archive.read(records["byteorder"]).decode()) != sys.byteorder:
            raise LayoutError(f"{order}-endian")
        record = records["data/0"]
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != shape.numel() * dtype.itemsize:
        raise LayoutError(f"{record.file_size} bytes, compression {record.compress_type}")
    window.seek(record.header_offset)
    signature, name, extra = LOCAL_HEADER.unpack(window.read(LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise LayoutError("no record where the zip's directory says")
    return int(record.header_offset) + LOCAL_HEADER.size + int(name) + int(extra)


def find_checkpoint(root: Path, step: int | None) -> Path:
    """Checkpoint `step`, or the newest where that is None, unread. AutodoError if there is none."""
    have = checkpoint.complete(root)
    found = [path for path in have if step is None or checkpoint.step_of(path) == step]
    if not found:
        steps = ", ".join(str(checkpoint.step_of(path)) for path in have) or "none"
        asked = "yet" if step is None else f"of step {step}"
        raise AutodoError(f"{root}: no checkpoint {asked}; those there: {steps}")
    return found[-1]

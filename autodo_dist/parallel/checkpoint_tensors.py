"""The values of a checkpoint's tensors, read as bytes from their places: no pickle is run and nothing is unpacked.

DCP stores a tensor in chunks, one a rank, each as a zip that torch.save wrote at some place of a file:

    .metadata             which rows a chunk holds; file, offset and length of its zip
    __0_0.distcp          zip | zip | …
    zip                   data.pkl (type, shape, strides) | byteorder | data/0 (the values, uncompressed) | directory

All of this is looked up in the files and compared with what a plain tensor would give; nothing is taken for granted.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from autodo_dist.parallel.checkpoint_metadata import LayoutError, read_metadata

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's record: signature, …, lengths of its name and extra field
RECORDS = {
    *("data.pkl", "byteorder", "data/0", "version", ".format_version", ".storage_alignment", ".data/serialization_id")
}


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
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if place < 0:
            raise ValueError(f"place {place} of a file")
        self.position = place
        return place

    def readinto(self, buffer: memoryview | bytearray) -> int:  # type: ignore[override]  # as io calls it
        """Fill the buffer from here on, as far as the window goes; how many bytes there were."""
        view = memoryview(buffer).cast("B")[: max(0, self.length - self.position)]
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(view)
        self.position += count
        self.bytes_read += count
        return count

    def fill(self, values: torch.Tensor, start: int) -> None:
        """Fill a contiguous tensor in main memory with the bytes from `start` on. LayoutError if they are too few."""
        view = values.view(-1).view(torch.uint8).numpy().data
        self.seek(start)
        while view:  # Linux gives at most 2 GiB at once
            count = self.readinto(view)
            if not count:
                raise LayoutError(f"{self.file.name} ends too early")
            view = view[count:]

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


def stored_tensor(window: Window, shape: torch.Size, dtype: torch.dtype) -> tuple[int, torch.Tensor]:
    """Where the values begin in the zip of one tensor, and that tensor on the meta device, for its strides.

    LayoutError if the zip holds anything else than these values, dense and uncompressed.
    """
    try:
        record = _values_record(window, shape.numel() * dtype.itemsize)
        window.seek(0)  # reads type, shape and strides, not the values; weights_only admits nothing but tensors
        tensor = torch.load(cast(IO[bytes], window), map_location="meta", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or (tensor.shape, tensor.dtype) != (shape, dtype):
            raise LayoutError(f"{_described(tensor)}, not {tuple(shape)} of {dtype}")
        if tensor.layout != torch.strided or tensor.storage_offset() or not _dense(tensor):
            raise LayoutError("a tensor that is not dense")
        return _values_start(window, record), tensor
    except (LayoutError, OSError):
        raise
    except pickle.UnpicklingError:  # its words advise to switch weights_only off
        raise LayoutError("a pickle of something else than a tensor; nothing was run") from None
    except Exception as error:  # whatever a broken zip or pickle makes of their readers
        raise LayoutError(f"no zip of a tensor ({type(error).__name__}: {ascii(str(error))[:80]})") from None


def _values_record(window: Window, size: int) -> zipfile.ZipInfo:
    """The record of the values, after a look at the whole directory: before torch reads it, and takes memory for it."""
    if window.read(4) != b"PK\3\4":
        raise LayoutError("no zip where one belongs")
    with zipfile.ZipFile(window) as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
        if not {"data.pkl", "byteorder", "data/0"} <= records.keys() <= RECORDS:
            raise LayoutError(f"a zip of {ascii(', '.join(sorted(records)))[:100]}")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise LayoutError("a compressed zip")
        if sum(record.file_size for record in archive.infolist()) > window.length:
            raise LayoutError("a zip that claims more bytes than it has")
        if (order := archive.read(records["byteorder"]).decode()) != sys.byteorder:
            raise LayoutError(f"{ascii(order)[:20]}-endian")
    if records["data/0"].file_size != size:
        raise LayoutError(f"{records['data/0'].file_size} bytes of values instead of {size}")
    return records["data/0"]


def _described(found: Any) -> str:
    if isinstance(found, torch.Tensor):
        return f"{tuple(found.shape)} of {found.dtype}"
    return type(found).__name__


def values_start(window: Window, shape: torch.Size, dtype: torch.dtype) -> int:
    """Where the values begin in the zip of one contiguous tensor. LayoutError if it is not that, uncompressed."""
    start, tensor = stored_tensor(window, shape, dtype)
    if not tensor.is_contiguous():
        raise LayoutError(f"{tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}")
    return start


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their storage without gaps, in whatever order (channels_last has another)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _values_start(window: Window, record: zipfile.ZipInfo) -> int:
    window.seek(record.header_offset)
    signature, name, extra = LOCAL_HEADER.unpack(window.read(LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise LayoutError("no record where the zip's directory says")
    return int(record.header_offset) + LOCAL_HEADER.size + int(name) + int(extra)


def read_rows(
    window: Window, chunk: ChunkStorageMetadata, dtype: torch.dtype, first: int, target: torch.Tensor
) -> None:
    """Fill `target` with as many rows of a chunk as it has, from `first` on, counted from the chunk's first."""
    start, stored = stored_tensor(window, chunk.sizes, dtype)
    if not stored.is_contiguous():  # rows do not lie together: the whole chunk is read
        flat = torch.empty(stored.numel(), dtype=dtype)
        window.fill(flat, start)
        target.copy_(flat.as_strided(stored.shape, stored.stride())[first : first + len(target)])
        return
    straight = target.device.type == "cpu" and target.is_contiguous()
    rows = target if straight else torch.empty(target.shape, dtype=dtype)
    window.fill(rows, start + first * chunk.sizes[1:].numel() * dtype.itemsize)
    if not straight:
        target.copy_(rows)


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder whose files have these sizes, without pickles and for tensors alone."""

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        super().__init__(path)
        self.folder, self.sizes = path, sizes

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's tensors. LayoutError if .metadata is not what DCP writes of tensors cut by rows."""
        self.metadata = read_metadata(self.folder, self.sizes)
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors that the plan asks for, row by row. LayoutError names the first that cannot be."""
        for item in plan.items:
            name = item.storage_index.fqn
            try:
                self._read(item, planner)
            except (OSError, LayoutError) as error:
                raise LayoutError(f"{name} is not stored as expected: {' '.join(str(error).split())[:100]}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        index = item.storage_index
        stored = self.metadata.state_dict_metadata[index.fqn]
        chunk = next(chunk for chunk in stored.chunks if chunk.offsets == index.offset)  # type: ignore[union-attr]
        dtype = stored.properties.dtype  # type: ignore[union-attr]
        target = planner.resolve_tensor(item).detach()
        if tuple(item.lengths[1:]) != tuple(chunk.sizes[1:]):
            raise LayoutError("asked for in pieces that are no whole rows")
        if target.dtype != dtype:
            raise TypeError(f"{index.fqn} is of {dtype}, not of {target.dtype}")
        if target.dim() == 0:
            target = target.view(1)
        if target.numel():
            info = self.storage_data[MetadataIndex(index.fqn, index.offset)]
            with Window(self.folder / info.relative_path, info.offset, info.length) as window:
                read_rows(window, chunk, dtype, (*item.storage_offsets, 0)[0], target)
        planner.commit_tensor(item, target)

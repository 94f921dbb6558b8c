"""DCP's .metadata, read without trusting it: which tensors a checkpoint holds, and where their bytes lie.

.metadata is a pickle, and a pickle is a program: `pickle.load` runs what it names. Here it names nothing:

    opcodes      only those that DCP's writer needs; no other is run
    classes      only DCP's own, by an explicit list; each becomes a `Node` that keeps what it is given and does nothing
    numbers      of DCP's classes only after every name, size and place was looked at: the tensors are cut by rows and
                 complete, and each lies inside a file of checkpoint.json that is large enough for it

So a file that claims a tensor of a terabyte is refused before anything is allocated.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA = "torch.distributed.checkpoint.metadata"
SIZE, INFO = "torch.Size", "torch.distributed.checkpoint.filesystem._StorageInfo"
CLASSES = {
    *(f"{METADATA}.{kind.__name__}" for kind in (BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex)),
    *(f"{METADATA}.{name}" for name in ("TensorProperties", "TensorStorageMetadata", "StorageMeta")),
    f"{METADATA}._MEM_FORMAT_ENCODING",
    INFO,
    SIZE,
    "torch.serialization._get_layout",
    "pathlib.PosixPath",  # the folder that was saved to, in StorageMeta; not used
    "pathlib._local.PosixPath",  # as Python 3.13 calls it
}
DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
# Without those that name a class in the stream, ask for objects outside of it, or set aside memory by a number in it.
OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"),
    *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
}
LARGEST = 1 << 26  # bytes of .metadata and of checkpoint.json; a table on 4,096 ranks takes a few MB


class LayoutError(Exception):
    """What is not as this project, DCP and torch.save are known to write it, in a few words."""


class Node:
    """What a pickle makes of a class: the arguments and the state that it came with, never acted upon."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Unpickler(pickle.Unpickler):
    """Reads DCP's .metadata into nodes. LayoutError for a class that is not DCP's."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.kinds: dict[str, type[Node]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a class on the list, made for this one pickle; a type of numbers is itself."""
        full = f"{module}.{name}"
        if full in DTYPES:
            return DTYPES[full]
        if full not in CLASSES:
            raise LayoutError(
                f".metadata asks for {ascii(full)[:100]}, which is none of DCP's classes; nothing was run"
            )
        return self.kinds.setdefault(full, type(full, (Node,), {}))


def read_metadata(path: Path, sizes: Mapping[str, int]) -> Metadata:
    """The tensors of the checkpoint in folder `path`, whose files have these sizes. LayoutError if they cannot be so.

    What was stored as something other than a tensor, as format 1 did, is left out.
    """
    raw = read_small(path / ".metadata")
    try:
        for opcode, _, place in pickletools.genops(raw):
            if opcode.name not in OPCODES:
                raise LayoutError(f".metadata has a pickle's {opcode.name} at byte {place}; nothing was run")
        return _metadata(Unpickler(raw).load(), sizes)
    except LayoutError:
        raise
    except Exception as error:  # whatever a broken pickle makes of the interpreter's stack
        raise LayoutError(
            f".metadata is no pickle of DCP's ({type(error).__name__}: {ascii(str(error))[:80]})"
        ) from None


def read_small(path: Path) -> bytes:
    """All bytes of a file. LayoutError if they are more than `LARGEST`."""
    if (size := path.stat().st_size) > LARGEST:
        raise LayoutError(f"{path.name} has {size} bytes, more than {LARGEST}")
    return path.read_bytes()


def _metadata(root: Any, sizes: Mapping[str, int]) -> Metadata:
    tensors, stored = _fields(root, f"{METADATA}.Metadata", "state_dict_metadata", "storage_data")
    if not isinstance(tensors, dict) or not isinstance(stored, dict):
        raise LayoutError(".metadata lists no tensors")
    places = dict(_place(*item) for item in stored.items())
    found: dict[str, Any] = {}
    for name, node in tensors.items():
        _require(_is_name(name), "a tensor whose name cannot be printed")
        if not _is(node, f"{METADATA}.BytesStorageMetadata"):
            found[name] = _tensor(name, node)
            for chunk in found[name].chunks:
                _check_place(name, chunk, found[name].properties.dtype, places, sizes)
    return Metadata(found, storage_data={index: info for index, info in places.items() if index.fqn in found})


def _tensor(name: str, node: Any) -> TensorStorageMetadata:
    properties, size, chunks = _fields(node, f"{METADATA}.TensorStorageMetadata", "properties", "size", "chunks")
    _require(_is(properties, f"{METADATA}.TensorProperties"), f"{name} without a type")
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise LayoutError(f".metadata has {name} without a type or a place")
    pairs = [_fields(chunk, f"{METADATA}.ChunkStorageMetadata", "offsets", "sizes") for chunk in chunks]
    found = [ChunkStorageMetadata(_size(offsets), _size(sizes)) for offsets, sizes in pairs]
    stored = TensorStorageMetadata(TensorProperties(dtype), _size(size), found)
    _check_complete(name, stored)
    return stored


def _check_complete(name: str, stored: TensorStorageMetadata) -> None:
    """LayoutError unless the chunks are runs of whole rows that together make the tensor, each row once."""
    start, shape = 0, _rows_first(stored.size)
    for chunk in sorted(stored.chunks, key=lambda chunk: (*chunk.offsets[:1], *chunk.sizes[:1])):
        offsets, sizes = chunk.offsets, _rows_first(chunk.sizes)
        _require(len(offsets) == len(chunk.sizes) == len(stored.size), f"{name} with chunks of other dimensions")
        _require(sizes[1:] == shape[1:] and not any(offsets[1:]), f"{name} not cut by rows alone")
        _require((offsets[0] if offsets else 0) == start, f"{name} with rows missing or twice at row {start}")
        start += sizes[0]
    _require(start == shape[0], f"{name} with {start} of {shape[0]} rows")


def _rows_first(size: torch.Size) -> tuple[int, ...]:
    return tuple(size) or (1,)  # a number is one row


def _place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    name, offsets = _fields(index, f"{METADATA}.MetadataIndex", "fqn", "offset")
    file, start, length = _fields(info, INFO, "relative_path", "offset", "length")
    _require(_is_name(name) and isinstance(file, str), "a place whose name cannot be printed")
    _require(_counts(start) and _counts(length), f"no numbers for the place of {name}")
    _require(not info.state.get("transform_descriptors"), f"{name} encoded by an extension")
    return MetadataIndex(name, None if offsets is None else _size(offsets)), _StorageInfo(file, start, length)


def _check_place(
    name: str,
    chunk: ChunkStorageMetadata,
    dtype: torch.dtype,
    places: Mapping[MetadataIndex, _StorageInfo],
    sizes: Mapping[str, int],
) -> None:
    """LayoutError unless a chunk lies in a file that checkpoint.json lists, and there is room for its values."""
    info = places.get(MetadataIndex(name, chunk.offsets))
    if info is None:
        raise LayoutError(f".metadata has {name} without a place")
    if info.relative_path not in sizes:
        raise LayoutError(f".metadata puts {name} in {ascii(info.relative_path)[:80]}, no file of checkpoint.json")
    end, claimed = info.offset + info.length, math.prod(chunk.sizes) * dtype.itemsize
    _require(end <= sizes[info.relative_path], f"{name} behind the end of {info.relative_path}")
    _require(claimed <= info.length, f"{name} with {claimed} bytes where {info.length} were stored")


def _fields(node: Any, kind: str, *names: str) -> list[Any]:
    """These attributes of an object that the pickle made of class `kind`."""
    _require(_is(node, kind) and isinstance(node.state, dict), f"no {kind.rpartition('.')[2]} where one belongs")
    return [node.state.get(name) for name in names]


def _size(node: Any) -> torch.Size:
    _require(_is(node, SIZE) and len(node.args) <= 1, "no size where one belongs")
    values = node.args[0] if node.args else ()
    _require(isinstance(values, tuple) and len(values) <= 64, "no size where one belongs")
    _require(all(_counts(value) for value in values), "a size that is none")
    return torch.Size(values)


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value <= sys.maxsize


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 1000


def _is(node: Any, kind: str) -> bool:
    return isinstance(node, Node) and type(node).__name__ == kind


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise LayoutError(f".metadata has {what}")

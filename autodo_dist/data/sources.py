"""What is packed: one picture's key, label, part, and how to read it; and what digits, folder and archives share."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from autodo_dist.data.manifest import PARTS
from autodo_dist.data.split import split_off

TRAIN, VALIDATION, TEST = range(len(PARTS))
SPLIT, SHUFFLE = 0, 1  # what a random stream of the pack's seed is for


@dataclass(frozen=True, slots=True)
class FileBytes:
    """A picture in a file: the whole of it, or `size` bytes from `offset` on. Calling it reads them."""

    path: str
    offset: int = 0
    size: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to workers as a tuple: a frozen dataclass's own way is several times slower."""
        return FileBytes, (self.path, self.offset, self.size)

    def __call__(self) -> bytes:
        """Return the encoded picture. OSError if it cannot be read, or the file ends before it does."""
        if self.size is None:
            return Path(self.path).read_bytes()
        data = os.pread(_kept_open(self.path).fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self.path} ends inside the picture")
        return data


class Source(NamedTuple):
    """One picture to pack: `key` names it to the reader, `label` indexes the classes, `part` indexes PARTS.

    `read` returns the encoded bytes, and can be pickled where more than one worker packs. `extension` is that of the
    tar's member, without the dot.
    """

    key: str
    extension: str
    label: int
    part: int
    read: Callable[[], bytes]

    def stamp(self) -> tuple[int, int]:
        """What tells, without reading it, that its file was changed: bytes and time in ns. OSError if it is gone."""
        if not isinstance(self.read, FileBytes):
            return 0, 0  # generated: the command and its options say all
        status = os.stat(self.read.path)
        return status.st_size, status.st_mtime_ns


def draw_part(
    sources: list[Source], part: int, classes: int, fraction: float, generator: np.random.Generator
) -> list[Source]:
    """Move round(fraction·n) of each class's n train sources to another part."""
    label_N = np.array([source.label for source in sources], dtype=np.int32)
    train = np.flatnonzero(np.array([source.part for source in sources]) == TRAIN)
    _, moved = split_off(train, label_N, classes, fraction, generator)
    sources = list(sources)
    for index in moved.tolist():
        sources[index] = sources[index]._replace(part=part)
    return sources


def stream(seed: int, purpose: int) -> np.random.Generator:
    """The random stream of a pack for one purpose, SPLIT or SHUFFLE."""
    return np.random.Generator(np.random.Philox([seed, purpose]))


def printable(name: str) -> str:
    r"""A file name on one line: control characters as `\n`, `\x07`; bytes that are not UTF-8 as `\xff`."""
    name = os.fsencode(name).decode(errors="backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: found[0].encode("unicode_escape").decode(), name)


def one_line(error: Exception) -> str:
    """What a library's exception says, on one line; its kind where it says nothing."""
    return " ".join(f"{error or type(error).__name__}".split())


def extension(name: str) -> str:
    """The extension of a file name as a tar's member has it: lower case, `jpg` for `jpeg`, without the dot."""
    suffix = Path(name).suffix[1:].lower()
    return "jpg" if suffix == "jpeg" else suffix


@functools.lru_cache(maxsize=8)
def _kept_open(path: str) -> BinaryIO:
    """An archive that many pictures are read from stays open. An evicted one closes when its last reader is done."""
    return open(path, "rb", buffering=0)

"""Encoded pictures out of a packed data set's tars, each by its place: a tar is read, never parsed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from autodo_dist.data.manifest import Manifest
from autodo_dist.errors import AutodoError

Encoded = npt.NDArray[np.uint8]


class Shards:
    """The tars of a data set. `read` may be called from several threads at once."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def read(self, ids: Sequence[int]) -> list[Encoded]:
        """The encoded pictures of these ids. AutodoError names a tar that is missing or ends too early."""
        return [self._read(id_) for id_ in ids]

    def _read(self, id_: int) -> Encoded:
        path = self.manifest.root / self.manifest.shards[self.manifest.shard_N[id_]].name
        size = int(self.manifest.size_N[id_])
        try:
            file = _open(path)  # held while it is read: the cache may drop it meanwhile
            data = os.pread(file.fileno(), size, int(self.manifest.offset_N[id_]))
        except OSError as error:
            raise AutodoError(f"data {path}: cannot be read ({error.strerror}); check the file system") from error
        if len(data) != size:
            raise AutodoError(f"data {path}: ends inside sample {id_}; the tar was cut off after the run started")
        return np.frombuffer(data, np.uint8)


# Below the usual limit of 1,024 open files. An evicted file closes when its last reader is done.
@lru_cache(maxsize=256)
def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)

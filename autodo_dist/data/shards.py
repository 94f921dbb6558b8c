"""Encoded pictures out of a packed data set's tars, each by its place: a tar is read, never parsed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autodo_dist.data.cache import ShardCache, Source, open_whole, read_at
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.remote import Place, Remote
from autodo_dist.data.staging import Fetcher, Share, Turn, stage
from autodo_dist.errors import AutodoError

Encoded = npt.NDArray[np.uint8]


class Folder:
    """The tars of a data set on a local or shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def ranges(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes at each of these places. AutodoError names a tar that is missing or ends too early."""
        return [self._read(self.root / name, start, size) for name, start, size in places]

    @staticmethod
    def _read(path: Path, start: int, size: int) -> bytes:
        try:
            file = open_whole(path)
        except OSError as error:
            raise AutodoError(f"data {path}: cannot be read ({error.strerror}); check the file system") from error
        return read_at(file, start, size)


class Shards:
    """The tars of a data set, and those of them that this node keeps. `read` may be called from several threads.

    Of a remote data set, what earlier runs kept beside the copy of its manifest is used, and nothing is fetched until
    `keep` is called. `close` ends what that started.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.source: Source = Remote(manifest.remote) if manifest.remote else Folder(manifest.root)
        self.cache = ShardCache(manifest.root, manifest.shards, 0) if manifest.remote else None
        self._fetcher: Fetcher | None = None

    def read(self, ids: Sequence[int]) -> list[Encoded]:
        """The encoded pictures of these ids: kept ones from this node's disk, all others at once from the source.

        AutodoError names a tar that is missing or ends too early, or says why the source cannot be read.
        """
        if self._fetcher is not None:
            self._fetcher.check()
        manifest = self.manifest
        found: dict[int, bytes] = {}
        places: dict[int, Place] = {}
        for index, id_ in enumerate(ids):
            number, start, size = int(manifest.shard_N[id_]), int(manifest.offset_N[id_]), int(manifest.size_N[id_])
            file = self.cache.open(number) if self.cache is not None else None
            if file is not None:
                found[index] = read_at(file, start, size)
            else:
                places[index] = (manifest.shards[number].name, start, size)
        if places:
            found |= zip(places, self.source.ranges(list(places.values())), strict=True)
        return [np.frombuffer(found[index], np.uint8) for index in range(len(ids))]

    def keep(
        self,
        folder: Path,
        limit: int | None,
        turn: Turn,
        gather: Callable[[Share], list[Share]] | None = None,
        strict: bool = True,
    ) -> None:
        """Keep shards in a folder of this node, at most `limit` bytes (None: what its disk holds).

        With `gather` they are copied now, and every rank must call this (see `stage`); without, from now on in the
        background. AutodoError if the folder cannot be written, or a shard's bytes are wrong; one that is not `strict`
        goes on reading that shard from the source.
        """
        self.cache = ShardCache(folder, self.manifest.shards, limit, strict)
        self.cache.prepare()
        if gather is not None:
            stage(self.cache, self.source, turn, gather)
        else:
            self._fetcher = Fetcher(self.cache, self.source, turn)

    def close(self) -> None:
        """Stop fetching."""
        if self._fetcher is not None:
            self._fetcher.close()

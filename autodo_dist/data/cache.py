"""Whole shards in a folder of this node, beside the place that the data set is read from.

    FOLDER/<first 16 digits of the manifest's SHA-256>/train-00000.tar …

Shuffling is uniform over the whole data set, so an epoch reads each picture once, from every shard on every node. Under
that no eviction beats a fixed subset: as many shards as fit are kept, and the rest is read from the source.

A shard is written under a name of its writer's own, read against its checksum on the way, and then renamed: under its
own name it is whole or not there. So no lock is needed, and two runs may use a folder at once: the last rename wins,
with the same bytes. What was kept is known by its size and by its modification time, which is made from the checksum;
a shard that anyone wrote to since is fetched again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from autodo_dist.data.manifest import Shard
from autodo_dist.data.remote import Place
from autodo_dist.errors import AutodoError
from autodo_dist.files import own_partial

log = logging.getLogger(__name__)
BLOCK, PARTS = 8 << 20, 4  # bytes of a range, and ranges asked for at once, while a shard is fetched
FREE_SHARE, FREE_BYTES = 0.05, 10**9  # of the disk; the larger of the two stays free
STALE_S = 24 * 3600  # an unfinished file of another machine's is left alone so long


class Source(Protocol):
    """Where a data set's tars are read from: a folder, or a URL."""

    def ranges(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes at each of these places. AutodoError if they cannot be had."""
        ...


class Full(Exception):
    """No further shard can be kept: the disk is full, or does not take it."""


class ShardCache:
    """The kept shards of one data set; `limit` is the most bytes of them (None: what the disk holds).

    What is there counts first, and nothing is ever removed: a smaller limit keeps no more, and frees nothing.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], limit: int | None, strict: bool = True) -> None:
        """`strict`: a shard whose bytes are wrong is an error; else it is not kept, and goes on being read as it is."""
        self.folder, self.shards, self.limit, self.strict = folder, shards, limit, strict

    def prepare(self) -> None:
        """Make the folder, and remove what killed processes left unfinished. AutodoError if it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = own_partial(self.folder / "probe")
            probe.touch()
            probe.unlink()
            for path in self.folder.glob("*~*~*~*.partial"):
                with contextlib.suppress(FileNotFoundError):  # another rank removes it too
                    if _abandoned(path):
                        path.unlink()
        except OSError as error:
            raise AutodoError(
                f"cache {self.folder}: cannot be written ({error.strerror}); set data.cache or data.stage_to"
            ) from error

    def open(self, number: int) -> BinaryIO | None:
        """A kept shard for reading; None where it is not there as it was kept."""
        shard = self.shards[number]
        try:
            return open_whole(self.folder / shard.name, shard.size, _stamp(shard.sha256))
        except OSError:
            return None

    def has(self, number: int) -> bool:
        """Whether a shard is there as it was kept."""
        shard = self.shards[number]
        try:
            found = (self.folder / shard.name).stat()
        except OSError:
            return False
        return (found.st_size, int(found.st_mtime)) == (shard.size, _stamp(shard.sha256))

    def wanted(self) -> list[int]:
        """The shards that are still to be kept under the limit: the same ones however many of them are there by now."""
        kept = [self.has(number) for number in range(len(self.shards))]
        used = sum(shard.size for shard, here in zip(self.shards, kept, strict=True) if here)
        wanted = []
        for number, shard in enumerate(self.shards):
            if not kept[number] and (self.limit is None or used + shard.size <= self.limit):
                wanted.append(number)
                used += shard.size
        return wanted

    def fetch(self, number: int, source: Source, writers: int, go_on: Callable[[], bool] = lambda: True) -> None:
        """Copy a shard from the source; does nothing where it is there, or once `go_on` says no.

        Full where `writers` such shards at once would leave too little of the disk free, or it cannot be written.
        AutodoError where the source's bytes are not those that were packed.
        """
        shard = self.shards[number]
        if self.has(number):
            return
        partial, digest = own_partial(self.folder / shard.name), hashlib.sha256()
        try:
            self._check_room(shard.size * writers)
            with partial.open("wb") as file:
                for block in _blocks(source, shard):
                    if not go_on():
                        return
                    digest.update(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())  # a power cut must not leave the name and the size without the bytes
            if digest.hexdigest() != shard.sha256:
                wrong = f"data {source}: the bytes of {shard.name} are not those that were packed (checksum)"
                if self.strict:
                    raise AutodoError(f"{wrong}; copy it there again, or pack again")
                log.warning("%s; it is not kept", wrong)
                return
            os.utime(partial, (time.time(), _stamp(shard.sha256)))
            os.replace(partial, self.folder / shard.name)
            if not self.has(number):
                raise Full(f"{self.folder} does not keep files' times; name a folder of a local disk")
        except OSError as error:
            raise Full(f"{self.folder} cannot be written ({error.strerror})") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _check_room(self, size: int) -> None:
        disk = shutil.disk_usage(self.folder)
        if disk.free - size < max(FREE_SHARE * disk.total, FREE_BYTES):
            raise Full(
                f"the disk of {self.folder} has {disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free, and 5 %, at "
                "least 1 GB, stays so"
            )


# Half of the files that may be open. An evicted file closes when its last reader is done.
@lru_cache(maxsize=min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
def open_whole(path: Path, size: int | None = None, changed: int | None = None) -> BinaryIO:
    """A file for reading. FileNotFoundError where it has not the size or the modification time that it should have."""
    file = path.open("rb", buffering=0)
    found = os.fstat(file.fileno())
    if size not in (None, found.st_size) or changed not in (None, int(found.st_mtime)):
        file.close()
        raise FileNotFoundError(path)
    return file


def read_at(file: BinaryIO, start: int, size: int) -> bytes:
    """Bytes of an open tar. AutodoError if they cannot be read or it ends before."""
    try:
        data = os.pread(file.fileno(), size, start)
    except OSError as error:
        raise AutodoError(f"data {file.name}: cannot be read ({error.strerror}); check the file system") from error
    if len(data) != size:
        raise AutodoError(
            f"data {file.name}: ends inside sample data, before byte {start + size}; the tar was cut off after the run "
            "started"
        )
    return data


def _blocks(source: Source, shard: Shard) -> Iterator[bytes]:
    """The bytes of a shard, in their order."""
    starts = range(0, shard.size, BLOCK)
    for first in range(0, len(starts), PARTS):
        yield from source.ranges(
            [(shard.name, start, min(BLOCK, shard.size - start)) for start in starts[first : first + PARTS]]
        )


def _stamp(sha256: str) -> int:
    """The modification time of a kept shard, seconds since 1970: 28 bits of its checksum, all in 2017 to 2026."""
    return 1_500_000_000 + int(sha256[:7], 16)


def _abandoned(partial: Path) -> bool:
    """Whether the process that writes this file is gone."""
    _, host, process, _ = partial.name.rsplit("~", 3)
    if host == socket.gethostname():
        return not Path(f"/proc/{process}").exists()
    return time.time() - partial.stat().st_mtime > STALE_S

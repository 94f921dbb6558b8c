"""Shards: which picture lies in which, and one shard's tar, index and note (manifest.py describes the format)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from autodo_dist.data.encode import Shrink
from autodo_dist.data.manifest import PARTS, Shard
from autodo_dist.data.probe import Found
from autodo_dist.data.sources import SHUFFLE, Source, stream
from autodo_dist.data.unfinished import read_note, write_note
from autodo_dist.errors import AutodoError
from autodo_dist.files import sha256, whole


@dataclass(frozen=True)
class Planned:
    """A shard to be: its number and name, its first id, and which sources lie in it, in the order of ids."""

    number: int
    name: str
    first_id: int
    members: npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where a picture lies in its tar, in bytes, and its pixels after EXIF orientation."""

    offset: int
    size: int
    height: int
    width: int


def plan_shards(
    part_N: npt.NDArray[np.int8], readable_N: npt.NDArray[np.bool_], seed: int, shard_samples: int
) -> list[Planned]:
    """Shuffle each part's readable pictures and cut it into the fewest shards of at most `shard_samples`, even in size.

    The shards come in the order of ids.
    """
    generator = stream(seed, SHUFFLE)
    plan: list[Planned] = []
    first_id = 0
    for part, name in enumerate(PARTS):
        members = generator.permutation(np.flatnonzero((part_N == part) & readable_N))
        shards = np.array_split(members, -(-len(members) // shard_samples)) if len(members) else []
        for number, shard in enumerate(shards):
            plan.append(Planned(len(plan), f"{name}-{number:05d}", first_id, shard))
            first_id += len(shard)
    return plan


def write_shard(
    out: Path,
    notes: Path,
    planned: Planned,
    sources: Sequence[Source],
    found_K4: npt.NDArray[np.int64],
    shrink: Shrink | None,
) -> tuple[Planned, Shard, list[Place]]:
    """Write a shard of K pictures, or keep the one that is there if it was made from the same; found_K4 are `Found`s.

    Returns the plan, the shard, and the place of each picture. AutodoError if a picture has changed since it was
    found, OSError if one cannot be read or a file not be written; what was written in part is deleted.
    """
    found = [Found(*row) for row in found_K4.tolist()]
    made_from = _made_from(planned, sources, found, shrink)
    note_path = notes / f"{planned.name}.json"
    note = read_note(note_path)
    if note.get("made_from") == made_from:
        shard = Shard(**note["shard"])
        if _in_place(out, shard):
            return planned, shard, [Place(*place) for place in note["places"]]
    tar, index = out / f"{planned.name}.tar", out / f"{planned.name}.idx"
    lines, places = _write_tar(tar, planned.first_id, sources, found, shrink)
    with _whole(index) as file:
        file.write(f"v1.2 {len(lines)}\n{''.join(lines)}".encode())
    shard = Shard(tar.name, tar.stat().st_size, len(sources), sha256(tar), sha256(index))
    write_note(note_path, {"made_from": made_from, "shard": asdict(shard), "places": places})
    return planned, shard, places


def _made_from(planned: Planned, sources: Sequence[Source], found: Sequence[Found], shrink: Shrink | None) -> str:
    pictures = [(source.key, source.extension, *each) for source, each in zip(sources, found, strict=True)]
    what = [planned.name, planned.first_id, asdict(shrink) if shrink else None, pictures]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _in_place(out: Path, shard: Shard) -> bool:
    tar = out / shard.name
    index = tar.with_suffix(".idx")
    whole = tar.is_file() and tar.stat().st_size == shard.size
    return whole and index.is_file() and sha256(index) == shard.index_sha256


def _write_tar(
    path: Path, first_id: int, sources: Sequence[Source], found: Sequence[Found], shrink: Shrink | None
) -> tuple[list[str], list[Place]]:
    """Write a tar, whole or not at all: (DALI's index line, place) of each picture.

    A line of index format v1.2 holds `extension offset size name` for each member of the sample.
    """
    lines, places = [], []
    with _whole(path) as file, tarfile.open(fileobj=file, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        for id_, (source, each) in enumerate(zip(sources, found, strict=True), first_id):
            raw, extension, height, width = _picture(source, each, shrink)
            line = []
            for suffix, data in sorted([("id", id_.to_bytes(8, "little", signed=True)), (extension, raw)]):
                offset = tar.offset + tarfile.BLOCKSIZE
                member = f"{id_:08d}.{suffix}"
                tar.addfile(_header(member, len(data)), io.BytesIO(data))
                line.append(f"{suffix} {offset} {len(data)} {member}")
                if suffix == extension:
                    places.append(Place(offset, len(data), height, width))
            lines.append(" ".join(line) + "\n")
    return lines, places


def _header(name: str, size: int) -> tarfile.TarInfo:
    """The header of a member. Fixed time and owner: the same pictures give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, 0, 0o444
    member.uname = member.gname = "autodo"
    return member


def _picture(source: Source, found: Found, shrink: Shrink | None) -> tuple[bytes, str, int, int]:
    """(encoded bytes, extension, height, width) of a picture as it is packed."""
    if source.stamp() != (found.file_size, found.file_time):
        raise AutodoError(f"pack: {source.key} was changed while it was being packed; run the same command again")
    raw = source.read()
    if shrink is not None and shrink.applies(found.height, found.width):
        raw, height, width = shrink(raw)
        return raw, "jpg", height, width
    return raw, source.extension, found.height, found.width


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is in place and on the disk afterwards, or not there.

    Its name until then is this process's own: a process that was thought dead cannot write into it.
    """
    with (
        whole(path, path.with_name(f"{path.name}.{os.getpid()}.partial")) as partial,
        partial.open("wb") as file,
    ):
        yield file
        file.flush()
        os.fsync(file.fileno())

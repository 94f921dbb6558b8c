"""What a packed data set is: shards, samples, classes, and whether the files are still those that were packed.

    ROOT/
      manifest.json        format, name, classes, shards with their sizes and checksums; written last
      samples.parquet      a row a sample, in the order of ids: id, key, shard, offset, size, height, width, label, part
      stamps.json          modification times of the tars when they were last known to be right
      train-00000.tar      webdataset shard: 00000042.jpg and 00000042.id (little-endian int64) for sample 42
      train-00000.idx      DALI's index of it

Labels are read from here by id and never from the tars, so a split or a distortion rewrites no tar.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from autodo_dist.errors import AutodoError
from autodo_dist.files import sha256, write_json

FORMAT = 1
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shard:
    """One tar with its index: size in bytes, number of samples, SHA-256 of both files."""

    name: str
    size: int
    samples: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A packed data set of N samples; columns are in the order of ids 0..N-1.

    shard_N indexes `shards`; offset_N and size_N are bytes of the encoded picture inside its tar; height_N and width_N
    are pixels after EXIF orientation; label_N is the true class; part_N indexes PARTS. `checksum` is the SHA-256 of
    manifest.json, which holds those of all other files.
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    keys: pa.StringArray
    shard_N: npt.NDArray[np.int32]
    offset_N: npt.NDArray[np.int64]
    size_N: npt.NDArray[np.int64]
    height_N: npt.NDArray[np.int32]
    width_N: npt.NDArray[np.int32]
    label_N: npt.NDArray[np.int32]
    part_N: npt.NDArray[np.int8]
    checksum: str

    def __len__(self) -> int:
        return len(self.label_N)


def write_manifest(
    root: Path, name: str, classes: list[str], shards: list[Shard], samples: pa.Table, source: dict[str, Any]
) -> None:
    """Write samples.parquet, stamps.json and, last and atomically, manifest.json: with it the data set is complete.

    `samples` has the columns named above; `source` says how it was packed (command, seed, counts), for the reader.
    """
    pa.parquet.write_table(samples, root / "samples.parquet")
    write_stamps(root, shards)
    header = {
        "format": FORMAT,
        "name": name,
        "samples": samples.num_rows,
        "samples_sha256": sha256(root / "samples.parquet"),
        "source": source,
        "classes": classes,
        "shards": [asdict(shard) for shard in shards],
    }
    write_json(root / "manifest.json", header)


def read_manifest(root: Path) -> Manifest:
    """Read a packed data set's manifest. AutodoError if the folder holds none, or a broken or newer one."""
    path = root / "manifest.json"
    if not root.is_dir():
        raise AutodoError(f"data {root}: no such folder; pack one with `autodo pack`, or set data.root")
    if not path.is_file():
        raise AutodoError(f"data {root}: holds no complete packed data set (no manifest.json); run `autodo pack` again")
    raw = path.read_bytes()
    try:
        header = json.loads(raw)
        if header["format"] > FORMAT:
            raise AutodoError(
                f"data {path}: format {header['format']} is newer than this program's {FORMAT}; update it"
            )
        if sha256(root / "samples.parquet") != header["samples_sha256"]:
            raise AutodoError(f"data {root / 'samples.parquet'}: not the file that was packed (checksum); pack again")
        table = pa.parquet.read_table(root / "samples.parquet")
        name, classes = header["name"], tuple(header["classes"])
        shards = tuple(Shard(**shard) for shard in header["shards"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise AutodoError(f"data {path}: broken manifest ({type(error).__name__}: {error}); pack again") from error

    def column(name: str) -> Any:
        return table.column(name).to_numpy()

    return Manifest(
        root=root,
        name=name,
        classes=classes,
        shards=shards,
        keys=table.column("key").combine_chunks(),
        shard_N=column("shard"),
        offset_N=column("offset"),
        size_N=column("size"),
        height_N=column("height"),
        width_N=column("width"),
        label_N=column("label"),
        part_N=column("part"),
        checksum=hashlib.sha256(raw).hexdigest(),
    )


def check_files(manifest: Manifest) -> None:
    """Check size and time of every tar and the bytes of every index: cheap, done at the start of each run.

    AutodoError names the first file that is missing or was changed after packing. Times are compared in whole seconds,
    which copies with `cp -p` and `rsync -t` keep.
    """
    stamps = read_stamps(manifest.root)
    for shard in manifest.shards:
        tar, index = manifest.root / shard.name, (manifest.root / shard.name).with_suffix(".idx")
        if not tar.is_file() or not index.is_file():
            raise AutodoError(f"data {tar}: tar or index is missing; copy it back or pack again")
        if tar.stat().st_size != shard.size:
            raise AutodoError(
                f"data {tar}: {tar.stat().st_size} bytes, {shard.size} were packed; copy or pack it again"
            )
        if sha256(index) != shard.index_sha256:
            raise AutodoError(f"data {index}: not the index that was packed (checksum); copy or pack it again")
        if int(tar.stat().st_mtime) != stamps.get(shard.name):
            raise AutodoError(
                f"data {tar}: changed or copied after packing (its time differs); "
                f"`autodo pack --verify {manifest.root}` reads all bytes and, if they are right, notes the new times"
            )


def verify_bytes(manifest: Manifest) -> None:
    """Read every byte of the data set against the manifest, then note the tars' present times as right.

    AutodoError names the first file that differs.
    """
    for shard in manifest.shards:
        for path, expected in (
            (manifest.root / shard.name, shard.sha256),
            ((manifest.root / shard.name).with_suffix(".idx"), shard.index_sha256),
        ):
            if not path.is_file():
                raise AutodoError(f"data {path}: missing; copy it back or pack again")
            if sha256(path) != expected:
                raise AutodoError(f"data {path}: its bytes are not those that were packed; copy or pack it again")
    write_stamps(manifest.root, list(manifest.shards))


def read_stamps(root: Path) -> dict[str, int]:
    """Tar name -> modification time (whole seconds) when its bytes were last known to be right."""
    try:
        return {str(name): int(time) for name, time in json.loads((root / "stamps.json").read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def write_stamps(root: Path, shards: list[Shard]) -> None:
    """Note the present modification times of the tars."""
    stamps = {shard.name: int((root / shard.name).stat().st_mtime) for shard in shards}
    if stamps == read_stamps(root):
        return
    try:
        write_json(root / "stamps.json", stamps)
    except OSError as error:
        raise AutodoError(f"data {root}: cannot be written ({error.strerror}); make the folder writable") from error

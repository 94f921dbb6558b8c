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

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from autodo_dist.data.remote import Remote
from autodo_dist.errors import AutodoError
from autodo_dist.files import own_partial, sha256, whole, write_json
from autodo_dist.urls import is_remote

FORMAT = 1
DEFAULT_CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "autodo_dist")
PARTS = ("train", "validation", "test")
COLUMNS = ("shard", "offset", "size", "height", "width", "label", "part")  # of samples.parquet, beside id and key


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
    manifest.json, which holds those of all other files. `root` is the folder of these files; where the tars are
    elsewhere, `remote` is their URL, and `root` holds copies of manifest.json and samples.parquet.
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    shard_N: npt.NDArray[np.int32]
    offset_N: npt.NDArray[np.int64]
    size_N: npt.NDArray[np.int64]
    height_N: npt.NDArray[np.int32]
    width_N: npt.NDArray[np.int32]
    label_N: npt.NDArray[np.int32]
    part_N: npt.NDArray[np.int8]
    checksum: str
    remote: str | None = None

    @functools.cached_property
    def keys(self) -> pa.StringArray:
        """The pictures' names, read when first asked for: the largest column, which a run seldom needs."""
        return pa.parquet.read_table(self.root / "samples.parquet", columns=["key"]).column("key").combine_chunks()

    @property
    def place(self) -> str:
        """Where the data set is, for a reader."""
        return self.remote or str(self.root)

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


def read_manifest(root: Path | str, cache: Path | None = None) -> Manifest:
    """Read a packed data set's manifest from its folder, or from a URL by way of a copy below `cache`.

    AutodoError if there is none, or a broken or newer one.
    """
    if not is_remote(str(root)):
        return _read(Path(root), str(root))
    remote = Remote(str(root))
    return replace(_read(_copy(remote, cache or DEFAULT_CACHE), remote.url), remote=remote.url)


def _copy(remote: Remote, cache: Path) -> Path:
    """The folder below `cache` that holds manifest.json and samples.parquet as they are at the source now."""
    manifest = remote.whole("manifest.json")
    folder = cache_folder(cache, hashlib.sha256(manifest).hexdigest())
    try:
        expected = json.loads(manifest)["samples_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise AutodoError(f"data {remote.url}/manifest.json: broken manifest ({error}); copy it there again") from error
    samples = folder / "samples.parquet"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not samples.is_file() or sha256(samples) != expected:
            _write(samples, remote.whole("samples.parquet"))
        _write(folder / "manifest.json", manifest)
    except OSError as error:
        raise AutodoError(f"cache {folder}: cannot be written ({error.strerror}); set data.cache") from error
    return folder


def cache_folder(cache: Path, checksum: str) -> Path:
    """Where below a cache one data set's files are."""
    return cache / checksum[:16]


def _write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; several processes may at once."""
    with whole(path, own_partial(path)) as partial:
        partial.write_bytes(data)


def _read(root: Path, place: str) -> Manifest:
    """The manifest of a folder; `place` names it in errors."""
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
                f"data {place}/manifest.json: format {header['format']} is newer than this program's {FORMAT}; "
                "update it"
            )
        if sha256(root / "samples.parquet") != header["samples_sha256"]:
            raise AutodoError(f"data {place}/samples.parquet: not the file that was packed (checksum); pack again")
        samples = pa.parquet.ParquetFile(root / "samples.parquet")
        columns = {f"{name}_N": samples.read(columns=[name]).column(name).to_numpy() for name in COLUMNS}
        name, classes = header["name"], tuple(header["classes"])
        shards = tuple(Shard(**shard) for shard in header["shards"])
        if bad := [shard.name for shard in shards if Path(shard.name).name != shard.name]:
            raise ValueError(f"shard {bad[0]!r} is no plain file name")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise AutodoError(
            f"data {place}/manifest.json: broken manifest ({type(error).__name__}: {error}); pack again"
        ) from error

    return Manifest(root, name, classes, shards, **columns, checksum=hashlib.sha256(raw).hexdigest())


def check_files(manifest: Manifest) -> None:
    """Check size and time of every tar and the bytes of every index: cheap, done at the start of each run.

    AutodoError names the first file that is missing or was changed after packing. Times are compared in whole seconds,
    which copies with `cp -p` and `rsync -t` keep. Of a remote data set the tars' sizes are checked, and that parts of
    them can be read.
    """
    if manifest.remote:
        return _check_remote(manifest, Remote(manifest.remote))
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


def _check_remote(manifest: Manifest, remote: Remote) -> None:
    sizes = remote.sizes([shard.name for shard in manifest.shards])
    for shard, size in zip(manifest.shards, sizes, strict=True):
        if size not in (None, shard.size):
            raise AutodoError(
                f"data {remote.url}/{shard.name}: {size} bytes, {shard.size} were packed; copy it there again"
            )
    remote.ranges([("manifest.json", 1, 1)])  # by the smallest file: a server without ranges sends it whole


def verify_bytes(manifest: Manifest) -> None:
    """Read every byte of the data set against the manifest, then note the tars' present times as right.

    AutodoError names the first file that differs, or says that the data set is not in a folder.
    """
    if manifest.remote:
        raise AutodoError(
            f"data {manifest.remote}: only a folder is read through; of a remote data set every shard that is fetched "
            "(data.cache, data.stage_to) is checked byte by byte"
        )
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

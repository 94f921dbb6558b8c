"""A split as one small file over a manifest: for every id its given label, its part, and whether it is kept.

    line 1           JSON: format, the manifest's checksum, samples N, classes C, the columns of a row, and `made`: the
                     recipe, with the SHA-256 of a file of labels where there was one
    N rows           in the order of ids, without gaps: `label`, unsigned, little-endian, of 1 byte up to 256 classes, 2
                     up to 65,536, else 4; `part`, 1 byte, an index of manifest.PARTS; `kept`, 1 byte, 0 or 1
    last 65 bytes    SHA-256 of all bytes before them, 64 hexadecimal digits and a line feed

`label` is the true one but for kept train samples; only train samples are left out (`kept` = 0). `head -1 FILE` says
how it was made, and numpy reads the rows with the header's `columns` as dtype. Nothing in it depends on the version of
a library, as a packed or compressed format would: the same split gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodo_dist.data.manifest import PARTS, Manifest
from autodo_dist.data.split import Split
from autodo_dist.errors import AutodoError
from autodo_dist.files import whole

FORMAT = 1
_DIGEST = 65  # bytes


def row_type(classes: int) -> np.dtype[np.void]:
    """The type of a row, for so many classes."""
    label = np.min_scalar_type(max(classes - 1, 0)).newbyteorder("<")
    return np.dtype([("label", label), ("part", "u1"), ("kept", "u1")])


def encode(split: Split, manifest: Manifest, made: Mapping[str, Any]) -> bytes:
    """The whole file; `made` says how the split came about, in plain JSON."""
    dtype = row_type(len(manifest.classes))
    header = {
        "format": FORMAT,
        "manifest": manifest.checksum,
        "samples": len(manifest),
        "classes": len(manifest.classes),
        "columns": dtype.descr,
        "made": dict(made),
    }
    rows = np.zeros(len(manifest), dtype)
    rows["label"] = split.label_N
    for part, ids in enumerate((split.train, split.validation, split.test)):
        rows["part"][ids], rows["kept"][ids] = part, 1
    body = json.dumps(header).encode() + b"\n" + rows.tobytes()
    return body + _digest(body)


def write_split(path: Path, content: bytes) -> bool:
    """Write the file, whole or not at all; False where it is there already with the same bytes.

    AutodoError if something else is there, or it cannot be written.
    """
    try:
        if path.exists():
            if path.is_file() and path.read_bytes() == content:
                return False
            raise AutodoError(f"split {path}: is there already and is not this split; choose another name or delete it")
        with whole(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise AutodoError(f"split {path}: cannot be written ({error.strerror}); choose another place") from error
    return True


def read_split(path: Path, manifest: Manifest) -> Split:
    """Read a split of this manifest. AutodoError if the file is not whole, or was made for another manifest."""
    line, _, rows = _body(path).partition(b"\n")
    try:
        header = json.loads(line)
        if header["format"] > FORMAT:
            raise AutodoError(
                f"split {path}: format {header['format']} is newer than this program's {FORMAT}; update it"
            )
        if header["manifest"] != manifest.checksum:
            raise AutodoError(
                f"split {path}: made for the manifest {header['manifest'][:12]}, and that of {manifest.place} is "
                f"{manifest.checksum[:12]}; set data.root to its data set, or make one with `autodo split "
                f"{manifest.place} FILE`"
            )
        return _decode(np.frombuffer(rows, row_type(len(manifest.classes))), manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise AutodoError(f"split {path}: broken ({type(error).__name__}: {error}); make it again") from error


def checksum(path: Path) -> str:
    """SHA-256 of a split, as it ends with. AutodoError if the file is not whole."""
    return hashlib.sha256(_body(path)).hexdigest()


def _decode(rows: npt.NDArray[np.void], manifest: Manifest) -> Split:
    """The split that the rows say. ValueError if they cannot be of this manifest."""
    label, part, kept = rows["label"], rows["part"], rows["kept"]
    if len(rows) != len(manifest):
        raise ValueError(f"{len(rows)} rows for {len(manifest)} samples")
    if np.any(label >= len(manifest.classes)) or np.any(part >= len(PARTS)) or np.any(kept > 1):
        raise ValueError("a label, part or kept is out of range")
    train, validation, test = (np.flatnonzero((part == number) & (kept == 1)) for number in range(len(PARTS)))
    return Split(train, validation, test, label.astype(np.int32))


def _body(path: Path) -> bytes:
    """All but the checksum at its end, which is compared with it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise AutodoError(
            f"split {path}: cannot be read ({error.strerror}); make it with `autodo split`, or set data.split"
        ) from error
    body = raw[:-_DIGEST]
    if raw[-_DIGEST:] != _digest(body):
        raise AutodoError(
            f"split {path}: cut off, changed or no split file (it does not end with its checksum); "
            "copy it again, or make it with `autodo split`"
        )
    return body


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode() + b"\n"

"""Files that are whole or not there, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autodo_dist.errors import AutodoError


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's names, on the disk: they outlast a power cut from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def own_partial(path: Path) -> Path:
    """Where this thread alone writes a file that others may be writing too, until it is whole and renamed."""
    return path.with_name(f"{path.name}~{socket.gethostname()}~{os.getpid()}~{threading.get_ident()}.partial")


@contextmanager
def whole(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Where to write a file that is renamed to `path` at the end, for good; where the block raises, nothing stays.

    By default that is `path`.partial, for a single writer; others may be writing too: `own_partial`.
    """
    partial = path.with_name(path.name + ".partial") if partial is None else partial
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that this project wrote. AutodoError if it cannot be."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AutodoError(f"{path}: cannot be read ({error}); restore it from a copy, or delete its folder") from error
    if not isinstance(value, dict):
        raise AutodoError(f"{path}: is no JSON object; restore it from a copy, or delete its folder")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, as far as they are whole: a run may be writing the last. [] for no file.

    AutodoError if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AutodoError(f"{path}: cannot be read ({error.strerror}); restore it from a copy") from error
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                found.append(value)
    return found

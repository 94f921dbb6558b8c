"""Manifest: a file that is missing, cut, changed or newer is one line that names it; verify_bytes notes new times."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from autodo_dist.data.manifest import check_files, read_manifest, verify_bytes
from autodo_dist.data.pack import pack
from autodo_dist.data.sources import TRAIN, VALIDATION, Source
from autodo_dist.errors import AutodoError
from autodo_dist.files import sha256


def grey_png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (6, 5), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifest") / "packed"
    sources = [
        Source(f"key-{number}", "png", number % 2, TRAIN if number < 8 else VALIDATION, partial(grey_png, number))
        for number in range(10)
    ]
    options = {"seed": 0, "shard_samples": 4, "skip_unreadable": False, "origin": {"command": "test"}}
    pack(out, "tiny", ["even", "odd"], sources, report=lambda *_: None, **options)  # type: ignore[arg-type]
    return out


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    """A copy that keeps the files' times."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def keep_time(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file behind its modification time's back."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_byte(path: Path, position: int = 700) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def edit_header(root: Path, **changes: object) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_data_set_passes(root: Path) -> None:
    manifest = read_manifest(root)
    check_files(manifest)
    verify_bytes(manifest)
    assert (manifest.name, manifest.classes, len(manifest)) == ("tiny", ("even", "odd"), 10)
    assert [shard.name for shard in manifest.shards] == ["train-00000.tar", "train-00001.tar", "validation-00000.tar"]
    assert manifest.checksum == hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()
    assert (manifest.height_N[0], manifest.width_N[0]) == (5, 6)


def test_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 10_000  # more than two blocks
    (tmp_path / "file").write_bytes(raw)
    assert sha256(tmp_path / "file") == hashlib.sha256(raw).hexdigest()


def test_truncated_tar_is_found_by_its_size(root: Path) -> None:
    keep_time(root / "train-00001.tar", cut)
    with pytest.raises(AutodoError, match=r"train-00001\.tar: \d+ bytes, \d+ were packed"):
        check_files(read_manifest(root))
    with pytest.raises(AutodoError, match=r"train-00001\.tar: its bytes are not"):
        verify_bytes(read_manifest(root))


def test_changed_index_is_found_by_its_bytes(root: Path) -> None:
    keep_time(root / "train-00000.idx", partial(flip_byte, position=10))
    with pytest.raises(AutodoError, match=r"train-00000\.idx: not the index that was packed"):
        check_files(read_manifest(root))
    with pytest.raises(AutodoError, match=r"train-00000\.idx: its bytes are not"):
        verify_bytes(read_manifest(root))


def test_touched_tar_is_refused_until_its_bytes_were_read(root: Path) -> None:
    manifest = read_manifest(root)
    os.utime(root / "train-00000.tar", (1_000_000_000, 1_000_000_000))
    with pytest.raises(AutodoError, match=r"train-00000\.tar: changed or copied .*autodo pack --verify") as caught:
        check_files(manifest)
    assert str(root) in str(caught.value)
    verify_bytes(manifest)
    check_files(manifest)
    assert read_manifest(root).checksum == manifest.checksum


def test_byte_flipped_behind_the_time_is_found_by_verify_alone(root: Path) -> None:
    manifest = read_manifest(root)
    keep_time(root / "validation-00000.tar", flip_byte)
    check_files(manifest)
    with pytest.raises(AutodoError, match=r"validation-00000\.tar: its bytes are not"):
        verify_bytes(manifest)


def test_a_failed_verify_notes_no_times(root: Path) -> None:
    flip_byte(root / "train-00001.tar")
    os.utime(root / "train-00001.tar", (1_000_000_000, 1_000_000_000))
    stamps = (root / "stamps.json").read_bytes()
    with pytest.raises(AutodoError):
        verify_bytes(read_manifest(root))
    assert (root / "stamps.json").read_bytes() == stamps


@pytest.mark.parametrize("name", ["train-00001.tar", "train-00001.idx"])
def test_missing_tar_or_index(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(AutodoError, match=r"train-00001\.tar: tar or index is missing"):
        check_files(read_manifest(root))
    with pytest.raises(AutodoError, match=f"{name}: missing"):
        verify_bytes(read_manifest(root))


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"train-00000.tar": "yesterday"}'])
def test_missing_or_broken_stamps_are_cured_by_verify(root: Path, text: str | None) -> None:
    (root / "stamps.json").unlink()
    if text is not None:
        (root / "stamps.json").write_text(text)
    with pytest.raises(AutodoError, match="--verify"):
        check_files(read_manifest(root))
    verify_bytes(read_manifest(root))
    check_files(read_manifest(root))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "one"}', '{"format": 1}', "\udc80"])
def test_broken_manifest(root: Path, text: str) -> None:
    (root / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AutodoError, match=r"manifest\.json: broken manifest .*; pack again"):
        read_manifest(root)


def test_shard_with_unknown_field_is_a_broken_manifest(root: Path) -> None:
    edit_header(root, shards=[{"name": "train-00000.tar", "colour": "red"}])
    with pytest.raises(AutodoError, match="broken manifest"):
        read_manifest(root)


def test_newer_format_asks_for_an_update(root: Path) -> None:
    edit_header(root, format=2)
    with pytest.raises(AutodoError, match="format 2 is newer than this program's 1; update"):
        read_manifest(root)


def test_altered_samples_are_refused(root: Path) -> None:
    flip_byte(root / "samples.parquet", position=100)
    with pytest.raises(AutodoError, match=r"samples\.parquet: not the file that was packed"):
        read_manifest(root)
    (root / "samples.parquet").unlink()
    with pytest.raises(AutodoError, match="broken manifest"):
        read_manifest(root)


def test_no_folder_and_no_manifest_say_what_to_run(root: Path) -> None:
    with pytest.raises(AutodoError, match="no such folder; pack one with `autodo pack`"):
        read_manifest(root / "nowhere")
    (root / "manifest.json").unlink()
    with pytest.raises(AutodoError, match=r"no complete packed data set \(no manifest\.json\)"):
        read_manifest(root)

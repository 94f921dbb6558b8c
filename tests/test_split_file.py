"""Split files: bytes that depend on nothing but the split, and one line for a file that is not what it should be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodo_dist.data.label_file import read_labels, read_mapping
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.split import Recipe, Split, make_split
from autodo_dist.data.split_file import checksum, encode, read_split, write_split
from autodo_dist.errors import AutodoError

CLASSES = ("cat", "dog", "NA")  # a name that CSV readers like to take for nothing


def manifest(samples: int = 12, classes: tuple[str, ...] = CLASSES) -> Manifest:
    """Every sixth sample is packed as validation, every sixth as test."""
    number = np.arange(samples, dtype=np.int32)
    made = Manifest(
        root=Path("data/tiny"),
        name="tiny",
        classes=classes,
        shards=(),
        shard_N=number,
        offset_N=number.astype(np.int64),
        size_N=number.astype(np.int64),
        height_N=number,
        width_N=number,
        label_N=number % len(classes),
        part_N=np.maximum(number % 6 - 3, 0).astype(np.int8),
        checksum="c0ffee" * 10 + "1234",
    )
    # As if they had been read.
    keys = [f"{classes[label % len(classes)]}/{label:03d}, a" for label in number.tolist()]
    vars(made)["keys"] = pa.array(keys, pa.string())
    return made


def by_hand() -> Split:
    """Ids 1 and 8 are left out, 0 and 2 are given wrong labels."""
    label_N = np.array([1, 1, 0, 0, 1, 2, 0, 1, 2, 0, 1, 2], np.int32)
    return Split(np.array([0, 2, 3, 6, 7, 9]), np.array([4, 10]), np.array([5, 11]), label_N)


def assert_equal(a: Split, b: Split) -> None:
    for name in ("train", "validation", "test", "label_N"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        assert np.array_equal(left, right)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "hand.split"
    assert write_split(path, encode(by_hand(), manifest(), {"by": "hand"}))
    return path


def test_the_layout_is_as_documented(path: Path) -> None:
    raw = path.read_bytes()
    header = (
        b'{"format": 1, "manifest": "' + b"c0ffee" * 10 + b'1234", "samples": 12, "classes": 3, "columns": '
        b'[["label", "|u1"], ["part", "|u1"], ["kept", "|u1"]], "made": {"by": "hand"}}\n'
    )
    rows = bytes.fromhex("010001 010000 000001 000001 010101 020201 000001 010001 020000 000001 010101 020201")
    assert raw == header + rows + hashlib.sha256(header + rows).hexdigest().encode() + b"\n"
    assert hashlib.sha256(raw).hexdigest() == "07c93ce573b5c980fca5e35237a3755a8b7b165776253931072de22ff48f5bad"
    assert checksum(path) == raw[-65:-1].decode()
    read = np.frombuffer(raw[len(header) : -65], [tuple(column) for column in json.loads(header)["columns"]])
    assert read["label"].tolist() == by_hand().label_N.tolist()
    assert np.flatnonzero(read["kept"] == 0).tolist() == [1, 8]


@pytest.mark.parametrize(("classes", "size"), [(1, 3), (256, 3), (257, 4), (65_536, 4), (65_537, 6)])
def test_labels_take_as_few_bytes_as_they_can(classes: int, size: int, tmp_path: Path) -> None:
    data = replace(manifest(), classes=tuple(map(str, range(classes))))
    data.label_N[-1] = classes - 1
    split = make_split(data.label_N % classes, data.part_N, classes, Recipe())
    content = encode(split, data, {})
    assert len(content) - content.index(b"\n") - 1 - 65 == size * 12
    write_split(tmp_path / "file", content)
    assert_equal(read_split(tmp_path / "file", data), split)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 80), st.floats(0, 0.9), st.floats(1, 20), st.floats(0, 1), st.integers(0, 99))
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, samples: int, fraction: float, ratio: float, rate: float, seed: int
) -> None:
    data, path = manifest(samples), tmp_path_factory.mktemp("split") / "file"
    recipe = Recipe(fraction, "exponential", ratio, "asymmetric", rate, seed=seed)
    split = make_split(data.label_N, data.part_N, len(CLASSES), recipe)
    write_split(path, encode(split, data, {}))
    assert_equal(read_split(path, data), split)


def test_what_is_there_already_stays(path: Path) -> None:
    before = path.read_bytes()
    assert not write_split(path, before)
    with pytest.raises(AutodoError, match=r"hand\.split: is there already and is not this split"):
        write_split(path, before + b"x")
    with pytest.raises(AutodoError, match="is there already"):
        write_split(path.parent, before)
    assert path.read_bytes() == before
    with pytest.raises(AutodoError, match=r"none/file: cannot be written \(No such file or directory\)"):
        write_split(path.parent / "none" / "file", before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: raw.replace(b"hand", b"Hand"),
        lambda raw: raw[:-70] + bytes([raw[-70] ^ 1]) + raw[-69:],
        lambda raw: raw[:-3] + b"0" + raw[-2:] if raw[-3:-2] != b"0" else raw[:-3] + b"1" + raw[-2:],
        lambda raw: raw + b"\n",
        lambda raw: b"data: {root: data/digits}\n",
    ],
)
def test_a_cut_off_or_changed_file(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    for read in (checksum, lambda path: read_split(path, manifest())):
        with pytest.raises(AutodoError, match=r"hand\.split: cut off, changed or no split file") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(AutodoError, match=rf"cannot be read \({why}.*`autodo split`"):
            read_split(path, manifest())


def test_a_split_of_another_manifest(path: Path) -> None:
    with pytest.raises(AutodoError, match=r"made for the manifest c0ffeec0ffee, .* data/tiny is 0123456789ab; set"):
        read_split(path, replace(manifest(), checksum="0123456789abcdef"))


def sealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.replace(b'"format": 1', b'"format": 2'), "format 2 is newer than this program's 1; update"),
        (lambda body: body.replace(b'"format": 1', b'"format": "x"'), "broken"),
        (lambda body: b"[]\n" + body, "broken"),
        (lambda body: b"\n" + body, "broken"),
        (lambda body: body.replace(b'"manifest"', b'"fest"'), r"broken \(KeyError: 'manifest'\)"),
        (lambda body: body[:-1], "broken"),
        (lambda body: body[:-3], "11 rows for 12 samples"),
        (lambda body: body[:-3] + b"\x03\x02\x01", "out of range"),
        (lambda body: body[:-3] + b"\x02\x03\x01", "out of range"),
        (lambda body: body[:-3] + b"\x02\x02\x02", "out of range"),
    ],
)
def test_a_file_that_another_program_wrote_wrongly(path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path.write_bytes(sealed(change(path.read_bytes()[:-65])))
    with pytest.raises(AutodoError, match=message) as caught:
        read_split(path, manifest())
    assert "\n" not in str(caught.value)


def labelled(path: Path, lines: list[str]) -> np.ndarray:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_labels(path, manifest(), by_hand().train)


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_given_labels_are_those_of_the_file(tmp_path: Path, ids: bool, start: str) -> None:
    """In any order, with more samples than are asked for: only train's change."""
    data = manifest()
    place = [str(id_) if ids else f'"{data.keys[id_].as_py()}"' for id_ in range(12)]
    lines = [f"{start}{'id' if ids else 'key'},label"] + [f"{place[id_]},NA" for id_ in (9, 7, 6, 3, 2, 0, 1, 5)]
    expected = data.label_N.copy()
    expected[by_hand().train] = 2
    found = labelled(tmp_path / "labels.csv", lines)
    assert found.dtype == np.int32
    assert np.array_equal(found, expected)


ALL = [f"{id_},cat" for id_ in range(12)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "cannot be read as CSV"),
        (["id,label", "3"], r"cannot be read as CSV \(.*Expected 2 columns, got 1"),
        (["id;label", "3;cat"], "begins with 'id;label'; its first line must be key,label or id,label"),
        (["label,id", *ALL], "begins with 'label,id'; its first line must be key,label or id,label"),
        (["from,to", "cat,dog"], "its first line must be key,label"),
        (["key,label", "cat/000, a,cat"], "Expected 2 columns, got 3"),
        (["key,label", '"cat/999, a",cat', "no,dog"], r"'cat/999, a' is no sample of data/tiny \(and 1 more\)"),
        (["id,label", *ALL, "12,cat"], "'12' is no sample of data/tiny; mend"),
        (["id,label", *ALL, "-1,cat"], "'-1' is no sample"),
        (["id,label", *ALL[1:], "0,cow"], r"'cow' is no class \(cat, dog, NA\)"),
        (["id,label", *ALL[1:], "0,0"], "'0' is no class"),
        (["id,label", *ALL[1:], "0,"], "'' is no class"),
        (["id,label", *ALL, *ALL[3:]], r"id '3' is there twice \(and 8 more\); keep one"),
        (["id,label", *ALL[4:]], r"none for train sample 'cat/000, a' \(id 0\) \(and 2 more\); add it"),
        (["id,label"], r"none for train sample .* \(id 0\) \(and 5 more\)"),
    ],
)
def test_bad_labels_are_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(AutodoError, match=message) as caught:
        labelled(tmp_path / "labels.csv", lines)
    assert "labels.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_leaves_other_classes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "mapping.csv"
    path.write_text("from,to\ncat,NA\nNA,dog\n")
    assert read_mapping(path, CLASSES) == (2, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat,dog\n", "begins with 'cat,dog'; its first line must be from,to"),
        ("from,to\ncat,cow\n", "'cow' is no class"),
        ("from,to\ncow,cat\n", "'cow' is no class"),
        ("from,to\ncat,dog\ncat,NA\n", "class 'cat' is mapped twice; keep one"),
    ],
)
def test_a_bad_mapping_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mapping.csv"
    path.write_text(text)
    with pytest.raises(AutodoError, match=message):
        read_mapping(path, CLASSES)
    with pytest.raises(AutodoError, match="cannot be read as CSV"):
        read_mapping(tmp_path / "none.csv", CLASSES)

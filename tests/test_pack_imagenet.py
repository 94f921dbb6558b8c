"""`autodo pack imagenet`: archives of the official structure, a few classes and pictures, read in place."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from test_pack import invoke, keys, stored

from autodo_dist.data.imagenet import META, TRUTH, imagenet_sources, members
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError

# ILSVRC ids do not follow the WordNet ids, in the official list neither; 1001 and 1002 are groups of classes.
SYNSETS = [
    (1, "n02119789", "kit fox, Vulpes macrotis", 0),
    (2, "n01440764", "tench, Tinca tinca", 0),
    (3, "n03126707", "crane", 0),
    (4, "n02012849", "crane", 0),
    (1001, "n00001740", "entity", 2),
    (1002, "n00015388", "animal, animate being", 3),
]
WNIDS = ["n01440764", "n02012849", "n02119789", "n03126707"]  # sorted, as torchvision counts classes
EACH, TRUTH_IDS = 10, [3, 1, 4, 2, 2, 3, 1, 4]

Files = Iterable[tuple[str, bytes]]


@dataclass
class Archives:
    """The three archives, and what lies in them: key -> bytes."""

    train: Path
    val: Path
    devkit: Path
    pictures: dict[str, bytes]

    def words(self) -> tuple[Path, Path, Path]:
        return self.train, self.val, self.devkit


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    noise_HWC = np.random.default_rng(seed).integers(0, 256, (8 + seed % 5, 11, 3), dtype=np.uint8)
    Image.fromarray(noise_HWC).save(file, "JPEG")
    return file.getvalue()


def tar_of(files: Files) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def synsets(rows: list[tuple[int, str, str, int]] = SYNSETS) -> bytes:
    """meta.mat as in the official devkit: an N × 1 struct array of eight fields, children by their numbers."""
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    table = np.zeros((len(rows), 1), [(name, object) for name in (*names, "num_train_images")])
    for index, (number, wnid, words, children) in enumerate(rows):
        group = np.uint8(children), np.arange(1, 1 + children, dtype=np.uint16), np.uint8(0)
        table[index, 0] = (float(number), wnid, words, "gloss", *group, np.uint16(1300))
    file = io.BytesIO()
    savemat(file, {"synsets": table})
    return file.getvalue()


def devkit(meta: bytes | None = None, truth: list[int] = TRUTH_IDS, **changes: bytes | None) -> bytes:
    files = {META: meta or synsets(), TRUTH: "".join(f"{number}\n" for number in truth).encode()} | changes
    tar = tar_of([(f"ILSVRC2012_devkit_t12/{name}", data) for name, data in files.items() if data is not None])
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as packed, tarfile.open(fileobj=io.BytesIO(tar)) as plain:
        for member in plain:
            packed.addfile(member, plain.extractfile(member))
    return file.getvalue()


def train_pictures(wnid: str) -> list[tuple[str, bytes]]:
    return [(f"{wnid}_{number}.JPEG", jpeg(1000 * int(wnid[-2:]) + number)) for number in range(EACH)]


def train_tars() -> list[tuple[str, bytes]]:
    # The official tar is sorted by WordNet id, too; here it is not, so that nothing can rely on it.
    return [(f"{wnid}.tar", tar_of(train_pictures(wnid))) for wnid in reversed(WNIDS)]


def val_pictures() -> list[tuple[str, bytes]]:
    return [(f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(number)) for number in (3, 1, 2, 8, 7, 6, 5, 4)]


@pytest.fixture
def archives(tmp_path: Path) -> Archives:
    folder = tmp_path / "archives"
    folder.mkdir()
    train, val = folder / "ILSVRC2012_img_train.tar", folder / "ILSVRC2012_img_val.tar"
    train.write_bytes(tar_of(train_tars()))
    val.write_bytes(tar_of(val_pictures()))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    pictures = {f"train/{wnid}/{name}": data for wnid in WNIDS for name, data in train_pictures(wnid)}
    pictures |= {f"val/{name}": data for name, data in val_pictures()}
    return Archives(train, val, folder / "ILSVRC2012_devkit_t12.tar.gz", pictures)


def test_every_picture_arrives_with_its_bytes_class_and_part(archives: Archives, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = invoke("imagenet", *archives.words(), out, "--validation-fraction", 0.3, "--shard-samples", 9)
    manifest = read_manifest(out)
    assert "imagenet, 4 classes, 48 samples" in printed
    assert manifest.classes == tuple(WNIDS)
    assert {manifest.keys[id_].as_py(): stored(manifest, id_) for id_ in range(48)} == archives.pictures
    wnid_of = {number: wnid for number, wnid, _, _ in SYNSETS}
    for id_ in range(48):
        folder, *rest = manifest.keys[id_].as_py().split("/")
        number = int(rest[-1][15:23]) if folder == "val" else 0
        assert manifest.classes[manifest.label_N[id_]] == (wnid_of[TRUTH_IDS[number - 1]] if number else rest[0])
        assert stored(manifest, id_) == archives.pictures[manifest.keys[id_].as_py()]
    assert keys(manifest, "test") == {key for key in archives.pictures if key.startswith("val/")}
    for label in range(4):  # the paper's clean validation part: a share of each class of train
        assert np.bincount(manifest.part_N[manifest.label_N == label]).tolist() == [7, 3, 2]
    source = json.loads((out / "manifest.json").read_text())["source"]
    assert source["words"] == ["tench, Tinca tinca", "crane", "kit fox, Vulpes macrotis", "crane"]
    assert source["command"] == "imagenet"


def test_default_validation_fraction_is_fifty_of_a_class_of_thirteen_hundred() -> None:
    from autodo_dist.data.imagenet import VALIDATION_FRACTION

    assert [round(VALIDATION_FRACTION * count) for count in (1300, 732)] == [51, 29]
    assert round(VALIDATION_FRACTION * 1281167) == pytest.approx(50_000, rel=1e-3)


def test_only_headers_are_scanned_and_progress_counts_bytes(archives: Archives) -> None:
    calls: list[tuple[str, int, int]] = []
    imagenet_sources(*archives.words(), seed=0, validation_fraction=0.2, report=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == [f"scanning ILSVRC2012_img_{part}.tar (bytes)" for part in ("train", "val")]
    for stage, archive in zip(stages, (archives.train, archives.val), strict=True):
        done = [done for name, done, _ in calls if name == stage]
        assert done == sorted(done)
        assert {total for name, _, total in calls if name == stage} == {archive.stat().st_size} != {done[-1]}


class Counting(io.BytesIO):
    """A file that counts what is read of it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_a_tar_within_a_tar_is_scanned_by_its_headers_alone() -> None:
    inner = [(f"{number}.JPEG", bytes([number]) * 100_000) for number in range(5)]
    file = Counting(tar_of([("a.tar", tar_of(inner)), ("b.tar", tar_of(inner[:1]))]))
    found = {}
    for outer in members(file, Path("x")):
        for picture in members(file, Path("x"), outer.offset_data, outer.offset_data + outer.size):
            found[outer.name, picture.name] = file.getvalue()[picture.offset_data :][: picture.size]
    assert found == {("a.tar", name): data for name, data in inner} | {("b.tar", "0.JPEG"): inner[0][1]}
    # 9 headers, 3 ends, and a byte before each header; 600,000 bytes of pictures are passed over.
    assert file.count < 20 * tarfile.BLOCKSIZE


# ----------------------------------------------------------------------------------------------------------- bad input


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def cut_outer_inside(archives: Archives) -> None:
    cut(archives.train, archives.train.stat().st_size // 2)


def cut_outer_between(archives: Archives) -> None:
    """After a whole inner tar: tarfile itself takes this for the end."""
    cut(archives.train, tarfile.BLOCKSIZE + len(train_tars()[0][1]))


def cut_val_inside(archives: Archives) -> None:
    archives.val.write_bytes(inside(archives.val.read_bytes()))


def cut_inner(keep: Callable[[bytes], bytes]) -> Callable[[Archives], None]:
    def change(archives: Archives) -> None:
        first, (name, data), *rest = train_tars()
        archives.train.write_bytes(tar_of([first, (name, keep(data)), *rest]))

    return change


def inside(data: bytes) -> bytes:
    """Up to the fifth byte of the third member."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: tar.getmembers()[2].offset_data + 5]


def first_two(data: bytes) -> bytes:
    """Two whole members and no end."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: tar.getmembers()[2].offset]


def spoilt_header(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmembers()[2].offset
    return data[:offset] + b"\xff" * 512 + data[offset + 512 :]


def train_with(*files: tuple[str, bytes]) -> Callable[[Archives], None]:
    return lambda archives: archives.train.write_bytes(tar_of([*train_tars(), *files])) and None


def devkit_with(**changes: Any) -> Callable[[Archives], None]:
    return lambda archives: archives.devkit.write_bytes(devkit(**changes)) and None


def val_with(files: list[tuple[str, bytes]]) -> Callable[[Archives], None]:
    return lambda archives: archives.val.write_bytes(tar_of(files)) and None


def twice(archives: Archives) -> None:
    pictures = train_pictures(WNIDS[0])
    tars = [(f"{WNIDS[0]}.tar", tar_of([*pictures, pictures[3]])), *train_tars()[:-1]]
    archives.train.write_bytes(tar_of(tars))


def empty_picture(archives: Archives) -> None:
    pictures = [(name, b"" if name.endswith("_4.JPEG") else data) for name, data in train_pictures(WNIDS[1])]
    others = [tar for tar in train_tars() if tar[0] != f"{WNIDS[1]}.tar"]
    archives.train.write_bytes(tar_of([*others, (f"{WNIDS[1]}.tar", tar_of(pictures))]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_outer_inside, r"img_train\.tar: is cut off inside n\d+\.tar; get it again"),
        (cut_outer_between, r"img_train\.tar: is cut off or broken at byte [\d,]+; get it again"),
        (cut_inner(inside), r"its n02119789\.tar is cut off inside n02119789_2\.JPEG"),
        (cut_inner(first_two), r"its n02119789\.tar is cut off"),
        (cut_inner(spoilt_header), r"its n02119789\.tar is cut off or broken at byte [\d,]+"),
        (cut_inner(lambda data: b""), r"its n02119789\.tar is cut off"),
        (cut_inner(lambda data: b"no tar" * 500), r"its n02119789\.tar is cut off or broken at byte 0;"),
        (cut_val_inside, r"img_val\.tar: is cut off inside ILSVRC2012_val_00000002\.JPEG"),
        (lambda archives: cut(archives.val, 0), r"img_val\.tar: is no tar, or cut off \(empty file\)"),
        (lambda archives: archives.val.unlink(), r"img_val\.tar: cannot be read \(No such file"),
        (lambda archives: cut(archives.devkit, 300), r"devkit_t12\.tar\.gz: no devkit's archive, or a broken one"),
        (
            lambda archives: archives.devkit.unlink(),
            r"devkit_t12\.tar\.gz: no devkit's archive, or a broken one \(.*No",
        ),
        (
            lambda archives: archives.devkit.write_bytes(b"x"),
            r"no devkit's archive, or a broken one \(.*not a gzip file",
        ),
        (devkit_with(**{META: None}), r"devkit_t12\.tar\.gz: holds no data/meta\.mat"),
        (devkit_with(**{TRUTH: None}), r"holds no data/ILSVRC2012_validation_ground_truth\.txt"),
        (devkit_with(meta=b"no matrix" * 50), r"its data/meta\.mat holds no synsets of ILSVRC2012 \("),
        (devkit_with(**{TRUTH: b"1\ntwo\n"}), r"ground_truth\.txt does not hold a number a line \(.*'two'"),
        (devkit_with(truth=[3, 1, 4, 2, 2, 3, 1, 1001]), r"ground_truth\.txt names class 1001, which its data/meta"),
        (devkit_with(truth=TRUTH_IDS[:-1]), r"img_val\.tar: holds 8 pictures, .*labels of 7, and number 8 is only"),
        (devkit_with(meta=synsets([*SYNSETS, (5, "n04019541", "puck", 0)])), "of 1 of 5 classes, n04019541 first"),
        (
            devkit_with(meta=synsets(SYNSETS[1:]), truth=[2, 3, 4]),
            r"holds n02119789\.tar, a class that .* does not know",
        ),
        (train_with(("README.txt", b"x")), r"holds README\.txt, which is no tar of a class"),
        (val_with(val_pictures()[:-1]), r"img_val\.tar: holds 7 pictures, .*labels of 8, and number 4 is only in one"),
        (val_with([("cat.JPEG", jpeg(0))]), r"holds cat\.JPEG, which is not named as a validation picture"),
        (twice, r"pack imagenet: train/n01440764/n01440764_3\.JPEG is there twice"),
        (train_with(train_tars()[0]), r"pack imagenet: train/n03126707/n03126707_0\.JPEG is there twice"),
        (val_with([*val_pictures(), val_pictures()[0]]), r"val/ILSVRC2012_val_00000003\.JPEG is there twice"),
        (empty_picture, r"1 unreadable: train/n02012849/n02012849_4\.JPEG \(zero bytes\)"),
    ],
)
def test_bad_archive_is_one_line_that_names_it(
    archives: Archives, tmp_path: Path, change: Callable[[Archives], None], message: str
) -> None:
    change(archives)
    with pytest.raises(AutodoError, match=message) as caught:
        invoke("imagenet", *archives.words(), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_packed_data_set_is_refused_before_the_archives_are_scanned(archives: Archives, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("imagenet", *archives.words(), out)
    archives.train.unlink()
    with pytest.raises(AutodoError, match="already holds a packed data set"):
        invoke("imagenet", *archives.words(), out)

"""ImageNet (ILSVRC2012) from its official archives, read in place: nothing is unpacked to disk.

    ILSVRC2012_img_train.tar        a tar of 1,000 tars, n01440764.tar ..., each of one class's JPEGs
    ILSVRC2012_img_val.tar          50,000 JPEGs, ILSVRC2012_val_00000001.JPEG ...
    ILSVRC2012_devkit_t12.tar.gz    data/meta.mat: the classes;
                                    data/ILSVRC2012_validation_ground_truth.txt: a class's number a line

Of the tars only headers are scanned, once; a picture is then (tar, offset, size). A tar within a tar is no obstacle: it
lies there byte for byte.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from autodo_dist.data.sources import (
    SPLIT,
    TEST,
    TRAIN,
    VALIDATION,
    FileBytes,
    Source,
    draw_part,
    extension,
    one_line,
    printable,
    stream,
)
from autodo_dist.errors import AutodoError

META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
VALIDATION_FRACTION = 0.039  # of train: 50 of a class's 1,300, as many as the official validation set has

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ImageNet:
    """The class names, their words, the pictures.

    The names are the WordNet ids, as the words are not unique (two classes are `crane`), and sorted, which is
    torchvision's order.
    """

    classes: list[str]
    words: list[str]
    sources: list[Source]


@dataclass(frozen=True)
class Devkit:
    """The classes: WordNet id -> words, ILSVRC id -> WordNet id; and the ILSVRC id of each validation picture."""

    words: dict[str, str]
    wnid: dict[int, str]
    truth: list[int]


def imagenet_sources(
    train_tar: Path, val_tar: Path, devkit_tar: Path, seed: int, validation_fraction: float, report: Report
) -> ImageNet:
    """Scan the official archives.

    The official validation set becomes the test part, as it is what ImageNet's results are given on; the validation
    part, which guides AutoDO, is drawn from train as in `draw_part`. AutodoError names an archive that is cut off, is
    another one, or does not fit the others.
    """
    devkit = read_devkit(devkit_tar)
    classes = sorted(devkit.words)
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    train = list(_train(train_tar, label_of, devkit_tar, report))
    missing = sorted(set(range(len(classes))) - {source.label for source in train})
    if missing:
        raise AutodoError(
            f"pack {train_tar}: holds no picture of {len(missing)} of {len(classes)} classes, "
            f"{classes[missing[0]]} first; give the whole archive"
        )
    labels = [label_of[devkit.wnid[number]] for number in devkit.truth]
    test = _validation(val_tar, labels, devkit_tar, report)
    sources = draw_part(train + test, VALIDATION, len(classes), validation_fraction, stream(seed, SPLIT))
    return ImageNet(classes, [devkit.words[wnid] for wnid in classes], sources)


def read_devkit(path: Path) -> Devkit:
    """Read classes and validation labels out of the devkit's archive. AutodoError says what is missing or broken."""
    meta, truth = _devkit_files(path)
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]  # only ImageNet needs scipy

        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"].astype(int) == 0]  # the others are groups of classes
        words = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
        wnid = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
    except Exception as error:  # scipy answers a broken file with many kinds
        said = one_line(error)
        raise AutodoError(f"pack {path}: its {META} holds no synsets of ILSVRC2012 ({said}); get it again") from error
    try:
        numbers = [int(line) for line in truth.split()]
    except ValueError as error:
        raise AutodoError(f"pack {path}: its {TRUTH} does not hold a number a line ({error}); get it again") from error
    unknown = next((number for number in numbers if number not in wnid), None)
    if unknown is not None:
        raise AutodoError(f"pack {path}: its {TRUTH} names class {unknown}, which its {META} lacks; get it again")
    return Devkit(words, wnid, numbers)


def _devkit_files(path: Path) -> tuple[bytes, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                for name in (META, TRUTH):
                    if member.isfile() and f"/{member.name}".endswith(f"/{name}"):
                        files[name] = _content(tar, member)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise AutodoError(
            f"pack {path}: no devkit's archive, or a broken one ({one_line(error)}); get it again"
        ) from error
    for name in (META, TRUTH):
        if name not in files:
            raise AutodoError(f"pack {path}: holds no {name}; give ILSVRC2012_devkit_t12.tar.gz")
    return files[META], files[TRUTH]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _train(path: Path, label_of: dict[str, int], devkit: Path, report: Report) -> Iterator[Source]:
    with _opened(path) as file:
        for archive in members(file, path, report=report):
            wnid, _, suffix = Path(archive.name).name.partition(".")
            what = f"pack {path}: holds {printable(archive.name)}"
            if suffix != "tar":
                raise AutodoError(f"{what}, which is no tar of a class; give ILSVRC2012_img_train.tar")
            if wnid not in label_of:
                raise AutodoError(f"{what}, a class that {devkit} does not know; give archives of the same year")
            end = archive.offset_data + archive.size
            for picture in members(file, path, archive.offset_data, end, printable(archive.name)):
                name = Path(picture.name).name
                yield _source(f"train/{wnid}/{name}", path, picture, label_of[wnid], TRAIN)


def _validation(path: Path, labels: list[int], devkit: Path, report: Report) -> list[Source]:
    pictures = []
    with _opened(path) as file:
        for member in members(file, path, report=report):
            number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", Path(member.name).name)
            if not number:
                what = f"{printable(member.name)}, which is not named as a validation picture"
                raise AutodoError(f"pack {path}: holds {what}; give ILSVRC2012_img_val.tar")
            pictures.append((int(number[1]), member))
    numbers, expected = {number for number, _ in pictures}, set(range(1, len(labels) + 1))
    if numbers != expected:
        raise AutodoError(
            f"pack {path}: holds {len(numbers)} pictures, {devkit} labels of {len(labels)}, and number "
            f"{min(numbers ^ expected)} is only in one of them; give archives of the same year"
        )
    return [
        _source(f"val/{Path(member.name).name}", path, member, labels[number - 1], TEST) for number, member in pictures
    ]


def _source(key: str, path: Path, picture: tarfile.TarInfo, label: int, part: int) -> Source:
    read = FileBytes(str(path), picture.offset_data, picture.size)
    return Source(printable(key), extension(picture.name), label, part, read)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise AutodoError(f"pack {path}: cannot be read ({error.strerror}); give an archive that can") from error


def members(
    file: BinaryIO, path: Path, start: int = 0, end: int | None = None, inner: str = "", report: Report | None = None
) -> Iterator[tarfile.TarInfo]:
    """Yield the files of the tar that lies in bytes start..end of `file`, by their headers; offsets are those in it.

    `path` and `inner` name it in an AutodoError: if it is no tar, or does not end as tars do, with a block of zeros.
    """
    what = f"pack {path}: " + (f"its {inner} " if inner else "")
    size = file.seek(0, os.SEEK_END)
    end = size if end is None else end
    file.seek(start)
    try:
        # A tar that begins where the file stands counts its offsets from the file's beginning.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > end:
                    raise AutodoError(f"{what}is cut off inside {printable(member.name)}; get it again")
                if member.isfile():
                    yield member
                if report is not None:
                    report(f"scanning {path.name} (bytes)", member.offset_data + member.size, size)
            file.seek(tar.offset)
            if tar.offset + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
                raise AutodoError(f"{what}is cut off or broken at byte {tar.offset - start:,}; get it again")
    except tarfile.TarError as error:
        raise AutodoError(f"{what}is no tar, or cut off ({one_line(error)}); get it again") from error

"""CIFAR-10, CIFAR-100, SVHN and MNIST, as torchvision's classes read them from their own files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from autodo_dist.data.encode import png
from autodo_dist.data.sources import SPLIT, TEST, TRAIN, VALIDATION, Source, draw_part, one_line, stream
from autodo_dist.errors import AutodoError

NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "mnist": "MNIST"}  # ours -> torchvision's class


def torchvision_sources(
    name: str, root: Path, seed: int, validation_fraction: float, *, extra: bool, download: bool
) -> tuple[list[str], list[Source]]:
    """Class names and pictures of one of NAMES, as PNG: the same pixels, without loss.

    `root` is torchvision's: the folder that holds cifar-10-batches-py/, cifar-100-python/, train_32x32.mat or
    MNIST/raw/. `extra` adds SVHN's split of that name to train. A key is the split with the index that torchvision
    gives the picture in it. The validation part is drawn from train, as in `draw_part`. AutodoError if the files are
    missing or not those that torchvision expects.
    """
    if name not in NAMES:
        raise AutodoError(f"pack torchvision: knows no data set {name!r}; give one of {', '.join(NAMES)}")
    if extra and name != "svhn":
        raise AutodoError(f"pack torchvision {name}: has no extra split, only svhn does; leave out --extra")
    sources: list[Source] = []
    for split in ("train", "extra", "test") if extra else ("train", "test"):
        classes, images_N, labels_N = _read(name, root, split, download)
        sources += [
            Source(f"{split}-{index:06d}", "png", label, TEST if split == "test" else TRAIN, partial(_png, pixels))
            for index, (pixels, label) in enumerate(zip(images_N, labels_N.tolist(), strict=True))
        ]
    return classes, draw_part(sources, VALIDATION, len(classes), validation_fraction, stream(seed, SPLIT))


def _read(
    name: str, root: Path, split: str, download: bool
) -> tuple[list[str], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(class names, uint8 pictures of N × H × W (× 3), labels) of a split."""
    from torchvision import datasets  # brings torch along: seconds, which `autodo --help` need not wait

    dataset_class = getattr(datasets, NAMES[name])
    which: dict[str, Any] = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        dataset = dataset_class(str(root), download=download, **which)
    except Exception as error:  # missing, broken, not to be downloaded: torchvision and its parsers have many kinds
        hint = "" if download else f"; --download gets the files from {_address(dataset_class, split)}"
        raise AutodoError(f"pack torchvision {name} {root}: torchvision says: {one_line(error)}{hint}") from error
    if name == "svhn":
        return [str(digit) for digit in range(10)], dataset.data.transpose(0, 2, 3, 1), np.asarray(dataset.labels)
    return list(dataset.classes), np.asarray(dataset.data), np.asarray(dataset.targets)


def _address(dataset_class: Any, split: str) -> str:
    """Where torchvision would download a split from."""
    if hasattr(dataset_class, "split_list"):
        return str(dataset_class.split_list[split][0])
    return str(dataset_class.mirrors[0] if hasattr(dataset_class, "mirrors") else dataset_class.url)


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    return png(Image.fromarray(pixels))

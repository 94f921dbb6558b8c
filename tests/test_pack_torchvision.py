"""`autodo pack torchvision`: what is packed is what torchvision's own classes give, pixel for pixel.

The real files cannot be had here. The tests write small ones of the same formats, and put their MD5 into torchvision's
tables in place of the real files', so that torchvision's own checks and parsers run.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from test_pack import everything, invoke, keys, stored
from torchvision import datasets

from autodo_dist.data.manifest import Manifest, read_manifest
from autodo_dist.errors import AutodoError


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, dataset_class: Any, classes: int) -> None:
    """Batches of 3 · classes pictures a file: uint8 rows of 3,072 values, red plane first, and lists of labels."""
    folder = root / dataset_class.base_folder
    folder.mkdir(parents=True)
    for table in ("train_list", "test_list"):
        files = []
        for seed, (name, _) in enumerate(getattr(dataset_class, table)):
            labels = np.random.default_rng(seed).permutation(np.arange(3 * classes) % classes).tolist()
            entry = {"data": pixels(3 * classes, 3072, seed=seed + 7 * len(name))}
            entry |= {"labels": labels} if classes == 10 else {"fine_labels": labels, "coarse_labels": labels}
            (folder / name).write_bytes(pickle.dumps(entry))
            files.append([name, md5(folder / name)])
        monkeypatch.setattr(dataset_class, table, files)
    meta = folder / dataset_class.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset_class.meta["key"]: [f"class {label}" for label in range(classes)]}))
    monkeypatch.setattr(dataset_class, "meta", dataset_class.meta | {"md5": md5(meta)})


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MATLAB files: X is 32 × 32 × 3 × N, y holds 1..10, where 10 is the digit 0."""
    root.mkdir()
    splits = {}
    for seed, (split, (url, name, _)) in enumerate(datasets.SVHN.split_list.items()):
        count = 40 + 10 * seed
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        savemat(root / name, {"X": pixels(count, 32, 32, 3, seed=seed).transpose(1, 2, 3, 0), "y": labels})
        splits[split] = [url, name, md5(root / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)


def write_mnist(root: Path) -> None:
    """IDX files: a magic number, big-endian sizes, bytes. torchvision checks only that they are there."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (part, count) in enumerate([("train", 50), ("t10k", 20)]):
        images, labels = pixels(count, 28, 28, seed=seed), (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def assert_as_torchvision(manifest: Manifest, splits: dict[str, Any], mode: str) -> None:
    """Every picture of every split is there once, with torchvision's pixels and label, encoded without loss."""
    id_of = {manifest.keys[id_].as_py(): id_ for id_ in range(len(manifest))}
    assert len(manifest) == sum(len(dataset) for dataset in splits.values())
    for split, dataset in splits.items():
        for index in range(len(dataset)):
            image, label = dataset[index]
            id_ = id_of[f"{split}-{index:06d}"]
            with Image.open(io.BytesIO(stored(manifest, id_))) as packed:
                assert (packed.format, packed.mode) == ("PNG", mode)
                assert np.array_equal(np.asarray(packed), np.asarray(image))
            assert manifest.label_N[id_] == label
            assert (manifest.part_N[id_] == 2) == (split == "test")


@pytest.mark.parametrize(
    ("name", "dataset_class", "classes"), [("cifar10", datasets.CIFAR10, 10), ("cifar100", datasets.CIFAR100, 100)]
)
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dataset_class: Any, classes: int) -> None:
    root = tmp_path / "root"
    write_cifar(root, monkeypatch, dataset_class, classes)
    invoke("torchvision", name, root, tmp_path / "out", "--validation-fraction", 0.34, "--workers", 1)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.name == name
    assert manifest.classes == tuple(f"class {label}" for label in range(classes))
    splits = {split: dataset_class(str(root), train=split == "train") for split in ("train", "test")}
    assert_as_torchvision(manifest, splits, "RGB")
    per_class = len(splits["train"]) // classes
    for label in range(classes):  # the validation part is a share of each class of train
        moved = round(0.34 * per_class)
        assert np.bincount(manifest.part_N[manifest.label_N == label]).tolist() == [per_class - moved, moved, 3]


@pytest.mark.parametrize("extra", [False, True])
def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: bool) -> None:
    root = tmp_path / "root"
    write_svhn(root, monkeypatch)
    invoke("torchvision", "svhn", root, tmp_path / "out", *(["--extra"] if extra else []))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == tuple("0123456789")
    splits = {
        split: datasets.SVHN(str(root), split=split) for split in ("train", "test", *(["extra"] if extra else []))
    }
    assert_as_torchvision(manifest, splits, "RGB")
    zero = next(id_ for id_ in range(len(manifest)) if manifest.keys[id_].as_py() == "train-000009")
    assert manifest.label_N[zero] == 0  # the file says 10
    assert {key[:5] for key in keys(manifest, "test")} == {"test-"}


def test_mnist(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_mnist(root)
    invoke("torchvision", "mnist", root, tmp_path / "out", "--shard-samples", 10)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes[:2] == ("0 - zero", "1 - one")
    splits = {split: datasets.MNIST(str(root), train=split == "train") for split in ("train", "test")}
    assert_as_torchvision(manifest, splits, "L")


def test_arrays_travel_to_worker_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "root")
    monkeypatch.setattr("autodo_dist.data.pack.CHUNK", 20)
    for workers in (1, 2):
        words = ("mnist", tmp_path / "root", tmp_path / f"{workers}", "--shard-samples", 10, "--workers", workers)
        invoke("torchvision", *words)
    assert everything(tmp_path / "1") == everything(tmp_path / "2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("cifar10",),
            r"torchvision says: Dataset not found or corrupted.*--download gets the files from https://www.cs.t",
        ),
        (
            ("cifar100",),
            r"--download gets the files from https://www\.cs\.toronto\.edu/~kriz/cifar-100-python\.tar\.gz",
        ),
        (("svhn",), r"--download gets the files from http://ufldl\.stanford\.edu/housenumbers/train_32x32\.mat"),
        (("mnist",), r"torchvision says: Dataset not found.*files from https://ossci-datasets.s3.amazonaws.com/mnist/"),
        (("kmnist",), r"knows no data set 'kmnist'; give one of cifar10, cifar100, svhn, mnist"),
        (("mnist", "--extra"), r"mnist: has no extra split, only svhn does"),
    ],
)
def test_missing_files_are_one_line_with_torchvisions_words(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    name, *options = words
    with pytest.raises(AutodoError, match=message) as caught:
        invoke("torchvision", name, tmp_path / "root", tmp_path / "out", *options)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_those_torchvision_knows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    write_cifar(root, monkeypatch, datasets.CIFAR10, 10)
    with (root / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        AutodoError, match=r"pack torchvision cifar10 .*: torchvision says: Dataset not found or corrupted"
    ):
        invoke("torchvision", "cifar10", root, tmp_path / "out")
    write_mnist(tmp_path / "mnist")
    labels = tmp_path / "mnist" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-7])
    with pytest.raises(AutodoError, match=r"pack torchvision mnist .*: torchvision says: ") as caught:
        invoke("torchvision", "mnist", tmp_path / "mnist", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_download_is_torchvisions_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--download` reaches torchvision's class; where that fails, the line says so and gives no further advice."""
    asked = []

    def download(dataset: datasets.SVHN) -> None:
        asked.append(dataset.split)
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.SVHN, "download", download)
    with pytest.raises(AutodoError, match=r"torchvision says: no route to host$"):
        invoke("torchvision", "svhn", tmp_path, tmp_path / "out", "--download")
    assert asked == ["train"]

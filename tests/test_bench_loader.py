"""The loader's benchmark: every way gives batches of the same kind, and its data set of ImageNet's size is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from autodo_dist.data.manifest import check_files, read_manifest
from benchmarks import loader


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    assert 80e3 < loader.make_pictures(root, 100) < 140e3
    return root


def test_pictures_are_a_pure_function_of_their_number() -> None:
    assert loader.picture(3) == loader.picture(3) != loader.picture(4)


def test_every_way_gives_batches(root: Path) -> None:
    """Those of DALI and of this loader; the others start worker processes of their own."""
    ways = (
        loader.by_this_loader(root / "packed", "dali"),
        loader.by_this_loader(root / "packed", "pil"),
        loader.by_dali(root / "packed", finish=True),
    )
    shape = (loader.BATCH, 3, loader.SIDE, loader.SIDE)
    by_dali, by_pil, plain = (next(way) for way in ways)
    assert by_dali.images_BCHW.shape == plain.shape == shape
    assert torch.equal(by_dali.images_BCHW, by_pil.images_BCHW)
    # Other crops of other pictures, but normalised alike.
    assert abs(float(plain.mean() - by_dali.images_BCHW.mean())) < 0.2
    assert abs(float(plain.std() - by_dali.images_BCHW.std())) < 0.2


def test_decoding_and_resizing_are_told_apart(root: Path) -> None:
    rows = loader.parts_of_it(root / "packed", 1)
    assert [row["name"].split(" a picture")[0] for row in rows] == [
        "DALI decodes",
        "DALI decodes and resizes",
        "PIL decodes",
        "torchvision resizes",
    ]
    assert all(row["unit"] == "ms" and 0 < row["value"] < 1000 for row in rows)


def test_transform_and_decoding_of_the_others() -> None:
    image = loader.transform()(loader.decoded(loader.picture(0)))
    assert image.shape == (3, loader.SIDE, loader.SIDE)
    assert image.dtype == torch.float32


def test_as_many_rows_as_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "IMAGENET", 1000)
    loader.make_imagenet(root)
    manifest = read_manifest(root / "imagenet")
    check_files(manifest)
    assert len(manifest) == 1000
    assert len(np.unique(manifest.keys.to_numpy(zero_copy_only=False))) == 1000
    (row,) = loader.restoring(root / "imagenet")
    assert row["holds"] is (row["value"] <= 2.0)


def test_at_least() -> None:
    assert [loader.at_least("x", value, "times", 0.9)["holds"] for value in (0.89, 0.9, 1.0)] == [False, True, True]

"""The loader: exact order, exact ids, the same pixels whichever rank loads them, from any position."""

from __future__ import annotations

import io
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import RankPool

from autodo_dist.data import order
from autodo_dist.data.dali import DaliPixels, DaliWindows
from autodo_dist.data.loader import Batch, Dropped, Loader
from autodo_dist.data.manifest import Manifest, read_manifest
from autodo_dist.data.order import Crop
from autodo_dist.data.pack import pack
from autodo_dist.data.pixels import Finish, Pixels
from autodo_dist.data.shards import Shards
from autodo_dist.data.sources import Source
from autodo_dist.data.torchvision_pixels import PilWindows, TorchvisionPixels
from autodo_dist.errors import AutodoError
from autodo_dist.parallel import comm

PADDED = Crop("padded", (0.08, 1.0), 2, 32, 0.875, flip=True)
BATCH = 100


def make(
    manifest: Manifest, ids: np.ndarray, *, decoder: str = "dali", dropped: Dropped | None = None, **changes: Any
) -> Loader:
    options: dict[str, Any] = {
        "pass_": "task",
        "seed": 7,
        "batch_size": BATCH,
        "rank": 0,
        "ranks": 1,
        "crop": PADDED,
        "device": torch.device("cpu"),
        "draws": 5,
    } | changes
    finish = Finish(options["crop"], mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def pixels(most: int) -> Pixels:
        if decoder == "dali on a gpu":  # its graph, on the CPU
            return DaliPixels(finish, most, 1, None)
        windows = DaliWindows(options["crop"], most, 1) if decoder == "dali" else PilWindows(2)
        return TorchvisionPixels(finish, 2, windows)

    return Loader(Shards(manifest), pixels, dropped or Dropped(manifest, 0), manifest.label_N, ids, **options)


@pytest.fixture(scope="module")
def manifest(digits: Path) -> Manifest:
    return read_manifest(digits)


@pytest.fixture(scope="module")
def train_ids(manifest: Manifest) -> np.ndarray:
    return np.flatnonzero(manifest.part_N == 0)[:530]


def joined(parts: list[Batch]) -> Batch:
    names = [name for name in Batch.__annotations__ if name != "next_ids_B"]
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_global_batches_are_equal_on_any_number_of_ranks(manifest: Manifest, train_ids: np.ndarray, ranks: int) -> None:
    alone = list(make(manifest, train_ids).batches(epoch=1))
    parts = [list(make(manifest, train_ids, rank=rank, ranks=ranks).batches(epoch=1)) for rank in range(ranks)]
    assert len(alone) == 5
    for step, batch in enumerate(alone):
        together = joined([part[step] for part in parts])
        assert torch.equal(together.ids_B, batch.ids_B)
        assert torch.equal(together.labels_B, batch.labels_B)
        assert torch.equal(together.images_BCHW, batch.images_BCHW)
        assert torch.equal(together.draws_BD, batch.draws_BD)
        assert batch.draws_BD.shape == (BATCH, 5)


def test_batches_are_what_order_says(manifest: Manifest, train_ids: np.ndarray) -> None:
    loader = make(manifest, train_ids)
    for epoch in range(2):
        ids = order.shuffled(train_ids, 7, epoch, "task")
        batches = list(loader.batches(epoch))
        assert torch.cat([batch.ids_B for batch in batches]).tolist() == ids[: 5 * BATCH].tolist()
        for batch in batches:
            assert batch.labels_B.tolist() == manifest.label_N[batch.ids_B.numpy()].tolist()


@pytest.mark.parametrize(("start", "ranks"), [(0, 1), (3, 1), (0, 3)])
def test_a_batch_tells_the_ids_of_the_next(manifest: Manifest, train_ids: np.ndarray, start: int, ranks: int) -> None:
    batches = list(make(manifest, train_ids, rank=ranks - 1, ranks=ranks).batches(epoch=1, start=start))
    assert batches[-1].next_ids_B is None
    for batch, following in itertools.pairwise(batches):
        assert batch.next_ids_B is not None
        assert torch.equal(batch.next_ids_B, following.ids_B)


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_resume_at_any_position_gives_the_rest(manifest: Manifest, train_ids: np.ndarray, start: int) -> None:
    whole = list(make(manifest, train_ids).batches(epoch=3))
    rest = list(make(manifest, train_ids).batches(epoch=3, start=start))
    assert len(rest) == len(whole) - start
    for got, expected in zip(rest, whole[start:], strict=True):
        assert torch.equal(got.ids_B, expected.ids_B)
        assert torch.equal(got.images_BCHW, expected.images_BCHW)


@pytest.mark.parametrize("pass_", ["task", "validation", "evaluation"])
def test_a_shortened_pass_is_the_first_batches_of_the_whole_one(
    manifest: Manifest, train_ids: np.ndarray, pass_: order.Pass
) -> None:
    whole, short = (make(manifest, train_ids, pass_=pass_, most_steps=most) for most in (None, 3))
    assert (short.steps, make(manifest, train_ids, most_steps=9).steps) == (3, 5)
    batches = list(short.batches(epoch=2))
    assert len(batches) == 3
    for got, expected in zip(batches, whole.batches(epoch=2), strict=False):
        assert torch.equal(got.ids_B, expected.ids_B)
        assert torch.equal(got.images_BCHW, expected.images_BCHW)
    assert batches[-1].next_ids_B is None
    (last,) = short.batches(epoch=2, start=2)
    assert torch.equal(last.ids_B, batches[2].ids_B)
    assert list(short.batches(epoch=2, start=3)) == []


def test_a_pass_left_early_leaves_nothing_behind(manifest: Manifest, train_ids: np.ndarray) -> None:
    loader = make(manifest, train_ids)
    for _ in loader.batches(epoch=0):
        break
    got, expected = next(loader.batches(epoch=1)), next(make(manifest, train_ids).batches(epoch=1))
    assert torch.equal(got.images_BCHW, expected.images_BCHW)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_evaluation_gives_every_picture_once(manifest: Manifest, ranks: int) -> None:
    """Five pictures in the last batch of 4 ranks and 2 in a batch of 4: some ranks have an empty part there."""
    ids = np.flatnonzero(manifest.part_N == 2)[:18]
    loaders = [make(manifest, ids, rank=rank, ranks=ranks, pass_="evaluation", batch_size=4) for rank in range(ranks)]
    parts = [list(loader.batches(epoch=0)) for loader in loaders]
    assert {len(part) for part in parts} == {5}
    seen = sorted(id_ for part in parts for batch in part for id_ in batch.ids_B.tolist())
    assert seen == ids.tolist()
    assert all(batch.images_BCHW.shape == (len(batch), 3, 32, 32) for part in parts for batch in part)


def encoded_pixels(manifest: Manifest, id_: int) -> np.ndarray:
    with (manifest.root / manifest.shards[manifest.shard_N[id_]].name).open("rb") as tar:
        tar.seek(manifest.offset_N[id_])
        encoded = tar.read(manifest.size_N[id_])
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).transpose(2, 0, 1)


def test_evaluation_pixels_are_the_picture(manifest: Manifest) -> None:
    ids = np.flatnonzero(manifest.part_N == 2)[:8]
    batch = next(make(manifest, ids, pass_="evaluation", batch_size=8).batches(epoch=0))
    for id_, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
        assert np.abs(255 * image.numpy() - encoded_pixels(manifest, id_)).max() < 1e-3


def test_padded_crop_is_the_drawn_shift_and_flip(manifest: Manifest, train_ids: np.ndarray) -> None:
    for batch in make(manifest, train_ids).batches(epoch=0, start=4):
        for id_, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
            window = order.training_window(order.stream(7, 0, "task", id_), 32, 32, PADDED)
            top, left = round(window.top * 32) + 2, round(window.left * 32) + 2
            padded = np.pad(encoded_pixels(manifest, id_), ((0, 0), (2, 2), (2, 2)))
            expected = padded[:, top : top + 32, left : left + 32]
            expected = expected[:, :, ::-1] if window.flip else expected
            assert np.abs(255 * image.numpy() - expected).max() < 1e-3


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A large smooth picture, so that a window's place can be read off its colours."""
    height, width = 90, 120
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 2, columns * 2, np.full_like(rows, 128)], -1).astype(np.uint8)
    root = tmp_path_factory.mktemp("gradients") / "packed"
    path = root.parent / "picture.png"
    Image.fromarray(picture).save(path)
    sources = [Source(f"{number}", "png", 0, 0, path.read_bytes) for number in range(6)]
    options: dict[str, Any] = {"seed": 0, "shard_samples": 10, "skip_unreadable": False, "origin": {}}
    pack(root, "gradients", ["only"], sources, report=lambda *_: None, **options)
    return read_manifest(root)


@pytest.mark.parametrize("pass_", ["task", "evaluation"])
def test_resized_crop_is_the_drawn_window(gradients: Manifest, pass_: order.Pass) -> None:
    crop = Crop("resized", (0.2, 1.0), 0, 24, 0.875, flip=True)
    batch = next(make(gradients, np.arange(6), crop=crop, pass_=pass_, batch_size=6).batches(epoch=0))
    for id_, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
        window = (
            order.evaluation_window(90, 120, crop)
            if pass_ == "evaluation"
            else order.training_window(order.stream(7, 0, "task", id_), 90, 120, crop)
        )
        # The mean of a linear ramp over the window is its value at the window's centre.
        rows, columns = 255 * image[0].numpy() / 2, 255 * image[1].numpy() / 2
        assert abs(rows.mean() - (90 * (window.top + window.height / 2) - 0.5)) < 1.0
        assert abs(columns.mean() - (120 * (window.left + window.width / 2) - 0.5)) < 1.0
        assert (columns[0, 0] > columns[0, -1]) == window.flip


def ids_of_a_pass(root: Path, batch_size: int) -> list[list[int]]:
    """What one real rank loads in epoch 2, gathered over ranks step by step."""
    manifest = read_manifest(root)
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        ids = np.flatnonzero(manifest.part_N == 0)
        loader = make(manifest, ids, rank=ranks.rank, ranks=ranks.ranks, batch_size=batch_size)
        parts = (ranks.gather(batch.ids_B.tolist()) for batch in loader.batches(epoch=2))
        return [list(itertools.chain(*part)) for part in parts]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_real_ranks_load_the_same_global_batches(pool: RankPool, digits: Path, manifest: Manifest, ranks: int) -> None:
    ids = order.shuffled(np.flatnonzero(manifest.part_N == 0), 7, 2, "task")
    expected = [ids[start : start + 250].tolist() for start in range(0, len(ids) // 250 * 250, 250)]
    for seen in pool.run(ranks, ids_of_a_pass, digits, 250):
        assert seen == expected


def test_one_shard_serves_any_number_of_ranks(gradients: Manifest) -> None:
    assert len(gradients.shards) == 1
    parts = [list(make(gradients, np.arange(6), rank=rank, ranks=4, batch_size=6).batches(0)) for rank in range(4)]
    assert sorted(id_ for part in parts for id_ in part[0].ids_B.tolist()) == list(range(6))


def test_a_tar_cut_off_after_the_start_is_named(gradients: Manifest, tmp_path: Path) -> None:
    copy = replace(gradients, root=Path(shutil.copytree(gradients.root, tmp_path / "copy")))
    tar = copy.root / copy.shards[0].name
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 3])
    with pytest.raises(AutodoError, match=r"train-00000\.tar: ends inside sample"):
        list(make(copy, np.arange(6), batch_size=6).batches(epoch=0))


def test_a_picture_that_does_not_decode_is_named(manifest: Manifest, train_ids: np.ndarray, tmp_path: Path) -> None:
    """In the middle of many batches, taken as fast as they come: DALI's own queues could crash there."""
    copy = replace(manifest, root=Path(shutil.copytree(manifest.root, tmp_path / "copy")))
    victim = int(order.shuffled(train_ids, 7, 0, "task")[203])
    tar = copy.root / copy.shards[copy.shard_N[victim]].name
    data = bytearray(tar.read_bytes())
    data[copy.offset_N[victim] : copy.offset_N[victim] + 64] = bytes(64)
    tar.write_bytes(data)
    batches = make(copy, train_ids, batch_size=20).batches(epoch=0)
    for _ in range(9):  # one less than come before it, as a batch tells of the next
        next(batches)
    with pytest.raises(AutodoError, match=rf"picture {copy.keys[victim]} \(id {victim}\) does not decode"):
        next(batches)

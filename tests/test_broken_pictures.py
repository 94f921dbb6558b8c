"""Pictures that do not decode while a run goes on: dropped from their batch, everything else stays as it was."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankError, RankPool
from test_autodo import learning
from test_loader import make
from test_train import assert_close_runs, assert_equal_states, cut_back, lines, run_train, settings, weights

from autodo_dist.data import order
from autodo_dist.data.loader import Dropped
from autodo_dist.data.manifest import Manifest, read_manifest
from autodo_dist.errors import AutodoError

DECODERS = pytest.mark.parametrize("decoder", ["dali", "pil", "dali on a gpu"])


def damaged(digits: Path, folder: Path, ids: list[int]) -> Manifest:
    """A copy of the data set in which the first bytes of these pictures are zeros, and no stamp tells."""
    manifest = read_manifest(digits)
    copy = replace(manifest, root=Path(shutil.copytree(digits, folder)))
    for id_ in ids:
        tar = copy.root / copy.shards[copy.shard_N[id_]].name
        before, data = tar.stat(), bytearray(tar.read_bytes())
        data[copy.offset_N[id_] : copy.offset_N[id_] + 64] = bytes(64)
        tar.write_bytes(data)
        os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    return copy


@pytest.fixture(scope="module")
def train_ids(digits: Path) -> np.ndarray:
    return np.flatnonzero(read_manifest(digits).part_N == 0)[:100]


@DECODERS
@pytest.mark.parametrize("ranks", [1, 3])
def test_only_the_broken_ones_are_missing(
    digits: Path, train_ids: np.ndarray, tmp_path: Path, decoder: str, ranks: int
) -> None:
    """Two in one batch and the last of the pass, in two epochs; batches tell the ids of the next as they come."""
    ids = order.shuffled(train_ids, 7, 0, "task")
    broken = [int(ids[23]), int(ids[29]), int(ids[99])]
    copy = damaged(digits, tmp_path / "copy", broken)
    options: dict[str, Any] = {"batch_size": 20, "ranks": ranks, "decoder": decoder}
    for rank in range(ranks):
        dropped = Dropped(copy, most=3)
        whole = make(read_manifest(digits), train_ids, rank=rank, **options)
        left = make(copy, train_ids, rank=rank, dropped=dropped, **options)
        for epoch in (0, 1):
            batches = list(left.batches(epoch))
            for got, expected in zip(batches, whole.batches(epoch), strict=True):
                keep = ~torch.isin(expected.ids_B, torch.tensor(broken))
                assert torch.equal(got.ids_B, expected.ids_B[keep])
                assert torch.equal(got.images_BCHW, expected.images_BCHW[keep])
                assert torch.equal(got.labels_B, expected.labels_B[keep])
                assert torch.equal(got.draws_BD, expected.draws_BD[keep])
            for batch, following in itertools.pairwise(batches):
                assert torch.equal(batch.next_ids_B, following.ids_B)
        assert set(dropped.why) <= set(broken)
        assert ranks > 1 or set(dropped.why) == set(broken)


@DECODERS
def test_more_than_may_be_dropped(digits: Path, train_ids: np.ndarray, tmp_path: Path, decoder: str) -> None:
    copy, dropped = damaged(digits, tmp_path / "copy", train_ids[:4].tolist()), Dropped(read_manifest(digits), most=3)
    list(make(copy, train_ids, batch_size=20, dropped=dropped, decoder=decoder).batches(0))
    assert set(dropped.why) == set(train_ids[:4].tolist())
    dropped.check(3)
    with pytest.raises(AutodoError, match=r"4 pictures do not decode, more than the 3 that data\.most_dropped allows"):
        dropped.check(4)


def test_a_part_with_nothing_left_is_refused_in_training_and_empty_in_evaluation(
    digits: Path, train_ids: np.ndarray, tmp_path: Path
) -> None:
    copy = damaged(digits, tmp_path / "copy", train_ids[:2].tolist())
    options: dict[str, Any] = {"batch_size": 2, "dropped": Dropped(copy, most=9)}
    (batch,) = make(copy, train_ids[:2], pass_="evaluation", **options).batches(0)
    assert len(batch) == 0
    with pytest.raises(AutodoError, match="rank 0's whole part of a batch does not decode"):
        list(make(copy, train_ids[:2], **options).batches(0))


@pytest.fixture(scope="module")
def broken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, list[int]]:
    """Two train pictures, a validation and a test picture are broken."""
    manifest = read_manifest(digits)
    ids = [*np.flatnonzero(manifest.part_N == 0)[[0, 400]], *(np.flatnonzero(manifest.part_N == p)[7] for p in (1, 2))]
    return damaged(digits, tmp_path_factory.mktemp("broken") / "copy", [int(id_) for id_ in ids]), ids


def listed(folder: Path) -> list[int]:
    with (folder / "dropped.csv").open(newline="") as file:
        return [int(row["id"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"picture .* does not decode .* or set data.on_error=skip"),
        ({"data__on_error": "skip", "data__most_dropped": 0.0001}, r"more than the 1 that data\.most_dropped allows"),
    ],
)
def test_a_run_stops_unless_it_may_skip_so_many(
    broken: tuple[Manifest, list[int]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AutodoError, match=message):
        run_train(settings(broken[0].root, tmp_path, data__imbalance_ratio=1, **changes))


def test_the_share_holds_over_several_starts(
    pool: RankPool, broken: tuple[Manifest, list[int]], tmp_path: Path
) -> None:
    """Four are broken and three may be: the same command again finds the list, and stops again."""
    changes = {"data__on_error": "skip", "data__most_dropped": 3 / 1797, "data__imbalance_ratio": 1}
    tree = settings(broken[0].root, tmp_path, **changes)
    for _ in range(2):
        with pytest.raises(RankError, match=r"4 pictures do not decode, more than the 3"):
            pool.run(2, run_train, tree)
        assert listed(tmp_path / "run") == sorted(broken[1])


@pytest.mark.parametrize("setting", ["cache", "stage_to"])
def test_a_spoilt_shard_is_read_from_the_source(
    pool: RankPool, broken: tuple[Manifest, list[int]], tmp_path: Path, setting: str
) -> None:
    """Its checksum is wrong. Where pictures may be dropped it is not kept, and the numbers are as without copies."""
    changes = {"data__on_error": "skip", "data__most_dropped": 0.01, "data__imbalance_ratio": 1}
    kept = {f"data__{setting}": str(tmp_path / "kept")}
    plain = pool.run(2, run_train, settings(broken[0].root, tmp_path / "plain", **changes))[0]
    copied = pool.run(2, run_train, settings(broken[0].root, tmp_path / "copied", **changes, **kept))[0]
    assert_equal_states(weights(copied, 22), weights(plain, 22))
    assert listed(copied) == sorted(broken[1])
    spoilt = {broken[0].shards[broken[0].shard_N[id_]].name for id_ in broken[1]}
    there = {path.name for path in (tmp_path / "kept").glob("*/*.tar")}
    assert there == {shard.name for shard in broken[0].shards} - spoilt


def test_a_png_whose_data_is_spoilt_is_found_by_both(digits: Path, tmp_path: Path) -> None:
    """PIL decodes it without a word: it does not look at the checksums of a PNG's data."""
    manifest = read_manifest(digits)
    ids = np.flatnonzero(manifest.part_N == 0)[:20]
    copy = replace(manifest, root=Path(shutil.copytree(digits, tmp_path / "copy")))
    tar = copy.root / copy.shards[copy.shard_N[ids[3]]].name
    data = bytearray(tar.read_bytes())
    end = int(copy.offset_N[ids[3]] + copy.size_N[ids[3]])
    data[end - 60 : end - 40] = bytes(20)
    tar.write_bytes(data)
    for decoder in ("dali", "pil"):
        dropped = Dropped(copy, most=9)
        list(make(copy, ids, batch_size=20, dropped=dropped, decoder=decoder).batches(0))
        assert list(dropped.why) == [ids[3]], decoder


def test_a_run_with_dropped_pictures_learns_the_same_on_any_ranks(
    pool: RankPool, broken: tuple[Manifest, list[int]], tmp_path: Path
) -> None:
    """AutoDO with every group: 1 and 3 ranks agree to 1e-10, a resume is bit-exact, the run folder lists all four."""
    copy, ids = broken
    split = {"data__imbalance_ratio": 1, "data__on_error": "skip", "data__most_dropped": 0.01, "data__image_size": 16}
    folders = {}
    for ranks in (1, 3):
        tree = learning(copy.root, tmp_path / str(ranks), train__precision="fp64", **split)
        folders[ranks] = pool.run(ranks, run_train, tree)[0]
        assert listed(folders[ranks]) == sorted(ids)
    last = max(row["step"] for row in lines(folders[1]))
    assert_close_runs(folders[3], folders[1], last)
    expected, metrics = weights(folders[3], last), lines(folders[3])
    cut_back(folders[3], 15)
    pool.run(3, run_train, tree)
    assert_equal_states(weights(folders[3], last), expected)
    assert lines(folders[3]) == metrics
    assert listed(folders[3]) == sorted(ids)


def test_a_run_that_no_longer_skips_goes_on_until_the_first_one(
    pool: RankPool, broken: tuple[Manifest, list[int]], tmp_path: Path
) -> None:
    """The list of what was dropped before is no fault of its own."""
    tree = settings(broken[0].root, tmp_path, data__on_error="skip", data__most_dropped=0.01, data__imbalance_ratio=1)
    folder = pool.run(2, run_train, tree)[0]
    assert listed(folder)
    cut_back(folder, 5)
    tree["data"] |= {"on_error": "stop", "most_dropped": 0.001}
    with pytest.raises(RankError, match=r"picture .* does not decode .* or set data\.on_error=skip"):
        pool.run(2, run_train, tree)
    assert listed(folder)

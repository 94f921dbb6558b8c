"""A batch in pieces is the batch: on DDP and every ZeRO stage, for the rows too; it holds less memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from test_autodo import RECIPE
from test_engines import (
    CUT_ALL,
    NOTHING,
    SHARED,
    STAGES,
    assert_same,
    first,
    fresh,
    go,
    needs_deepspeed,
    small,
    with_stage,
)

from autodo_dist import engine_settings
from autodo_dist.build import build
from autodo_dist.config import Config, differences
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.footprint import Alive
from autodo_dist.load_config import check_config
from autodo_dist.parallel import comm
from autodo_dist.steps import (
    Piece,
    look_ahead,
    pieces,
    renew_validation,
    seed_dropout,
    task_step,
    train_forward,
    weights_of,
)
from autodo_dist.train import train

CPU = torch.device("cpu")
BATCH = 16
EVERYTHING = {"learn__augment": "per_sample", "learn__weight": True, "learn__soft_label": True}
WAYS = {
    "nothing": NOTHING,
    "clipped": NOTHING | {"optim__clip_norm": 0.5},
    "separate": {"learn__normalize_weights": True},
    "separate, shared row": {"learn__augment": "shared"},
    "shared": SHARED | {"learn__normalize_weights": True},
    "shared, weights and labels": SHARED | {"learn__augment": "none"},
    "shared, fisher": SHARED | {"hyper__solver": "fisher"},
    "recipe": RECIPE,
}


def settings(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return small(digits, folder, **(EVERYTHING | {"train__batch_size": BATCH} | changes))


def in_pieces(tree: dict[str, Any], count: int) -> dict[str, Any]:
    return tree | {"train": tree["train"] | {"accumulate": count}}


@pytest.mark.parametrize("way", WAYS)
def test_pieces_are_the_whole(pool: RankPool, digits: Path, tmp_path: Path, way: str) -> None:
    """Losses, weights, momentum and rows in float64, on one rank in four pieces and on two ranks in two and four."""
    tree = settings(digits, tmp_path, train__precision="fp64", **WAYS[way])
    expected = pool.run(1, go, tree, 6)[0]
    for ranks, count in ((1, 4), (2, 2), (2, 4)):
        found = pool.run(ranks, go, in_pieces(tree, count), 6)[0]
        assert_same(found, expected, 1e-8)
    if way == "nothing":
        one = pool.run(2, go, tree, 6)[0]
        assert any(
            not torch.equal(value, found["state"][name]) for name, value in one["state"].items()
        )  # was in pieces


@needs_deepspeed
@pytest.mark.parametrize("stage", [None, *STAGES])
def test_every_engine(pool: RankPool, digits: Path, tmp_path: Path, stage: int | None) -> None:
    """Twenty steps of a 4 × B batch in four pieces of B, beside DDP's in one; and the rows of a hyper pass."""
    tree = settings(digits, tmp_path, optim__clip_norm=0.5)
    expected = pool.run(2, fresh, go, tree, 20)[0]
    cut = with_stage(in_pieces(tree, 4), stage, CUT_ALL if stage == 3 else None)
    one, two = pool.run(2, fresh, go, cut, 20)
    assert (one["losses"] - expected["losses"]).abs().max() <= 1e-6
    assert_same(two, one, 0.0)
    for name, value in expected["state"].items():
        torch.testing.assert_close(one["state"][name], value, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(
        one["rows"], expected["rows"], rtol=0, atol=1e-4
    )  # RMSprop divides a gradient by its size


@pytest.fixture
def resnet(digits: Path, tmp_path: Path) -> Config:
    tree = in_pieces(settings(digits, tmp_path, model__name="resnet18", data__image_size=32, **SHARED), 2)
    return check_config(tree, "test")


def test_looking_ahead_sees_the_steps_features_and_leaves_no_trace(resnet: Config) -> None:
    """With BatchNorm, whose running statistics each forward changes."""
    with comm.process_group(comm.Place(), CPU) as ranks:
        parts = build(resnet, read_manifest(resnet.data.root), ranks)
        assert parts.hyper is not None
        parts.model.train()
        batch = first(parts.loaders.task, 1)[0]
        rows = parts.hyper.parameters.fetch(batch.ids_B)
        cut = pieces(parts.accumulate, parts.dtype, batch, rows, learnt=True)
        before = [buffer.clone() for buffer in parts.model.buffers()]
        ahead = look_ahead(parts, cut, 0, ranks)
        assert all(map(torch.equal, before, parts.model.buffers()))
        seed_dropout(parts, 0, ranks)
        weight_B = weights_of(parts, batch, rows, ranks)
        for piece, features_BD in zip(cut, ahead, strict=True):
            assert torch.equal(train_forward(parts, piece, weight_B, ranks).features_BD, features_BD)
        assert not all(map(torch.equal, before, parts.model.buffers()))


def test_dropout_masks_are_the_same_ahead(digits: Path, tmp_path: Path) -> None:
    tree = settings(digits, tmp_path, **SHARED)
    with comm.process_group(comm.Place(), CPU) as ranks:
        parts = build(check_config(in_pieces(tree, 2), "test"), read_manifest(digits), ranks)
        parts.model.encoder = torch.nn.Sequential(parts.model.encoder, torch.nn.Dropout(0.5))
        parts.model.train()
        batch = first(parts.loaders.task, 1)[0]
        assert parts.hyper is not None
        cut = pieces(parts.accumulate, parts.dtype, batch, parts.hyper.parameters.fetch(batch.ids_B))
        once, again = (torch.cat(look_ahead(parts, cut, 3, ranks)) for _ in range(2))
        assert torch.equal(once, again)
        assert not torch.equal(once, torch.cat(look_ahead(parts, cut, 4, ranks)))


def test_the_validation_gradient_is_that_of_the_whole_batch(digits: Path, tmp_path: Path) -> None:
    tree = settings(digits, tmp_path, train__precision="fp64")
    with comm.process_group(comm.Place(), CPU) as ranks:
        parts = build(check_config(tree, "test"), read_manifest(digits), ranks)
        assert parts.hyper is not None
        validation = first(parts.loaders.hyper_validation, 1)[0]
        found = []
        for count in (1, 3, BATCH + 1):  # the last: less than a picture a piece
            renew_validation(replace(parts, accumulate=count), parts.hyper, validation, ranks)
            found.append(parts.hyper.valid_grad_CD.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    assert torch.equal(found[2], found[0])


def peak(tree: dict[str, Any]) -> int:
    """The most bytes of tensors alive in a second task step that were not before it."""
    with comm.process_group(comm.Place(), CPU) as ranks:
        parts = build(check_config(tree, "test"), read_manifest(tree["data"]["root"]), ranks)
        parts.model.train()
        one, two = first(parts.loaders.task, 2)
        task_step(parts, one, 0, ranks)
        known = [*parts.model.parameters(), *parts.model.buffers(), two.images_BCHW, two.draws_BD]
        with Alive(known) as alive:
            task_step(parts, two, 1, ranks)
        return alive.peak


def test_activations_are_those_of_a_piece(digits: Path, tmp_path: Path) -> None:
    """Twice the pieces save half as much again."""
    tree = settings(digits, tmp_path, train__batch_size=64, **NOTHING)
    whole, half, quarter = (peak(in_pieces(tree, count)) for count in (1, 2, 4))
    assert (whole - half) / (half - quarter) == pytest.approx(2, rel=0.15)
    assert 2 * (whole - half) > 0.7 * whole  # the rest: gradients, pictures


@pytest.mark.parametrize(
    ("batch", "ranks", "count", "words"),
    [
        (
            20,
            2,
            3,
            "batch_size = 20 does not divide by 2 ranks x 3 pieces; set train.accumulate=2, or train.batch_size=24",
        ),
        (
            20,
            3,
            2,
            "batch_size = 20 does not divide by 3 ranks x 2 pieces; set train.accumulate=1, or train.batch_size=24",
        ),
        (8, 2, 16, "set train.accumulate=4, or train.batch_size=32"),
    ],
)
def test_what_does_not_divide_is_refused(
    digits: Path, tmp_path: Path, batch: int, ranks: int, count: int, words: str
) -> None:
    config = check_config(in_pieces(settings(digits, tmp_path, train__batch_size=batch), count), "test")
    with pytest.raises(AutodoError, match=f"train.accumulate = {count}.*{words}"):
        engine_settings.check(config, ranks)


def test_it_is_refused_before_data_is_touched(digits: Path, tmp_path: Path) -> None:
    tree = in_pieces(settings(digits, tmp_path, data__root=str(tmp_path / "nowhere")), 3)
    with pytest.raises(AutodoError, match=r"train\.accumulate = 3"):
        train(check_config(tree, "test"))
    assert not list(tmp_path.iterdir())


def test_too_many_dropped_pictures_are_one_line(digits: Path, tmp_path: Path) -> None:
    with comm.process_group(comm.Place(), CPU) as ranks:
        parts = build(check_config(in_pieces(settings(digits, tmp_path), 4), "test"), read_manifest(digits), ranks)
        batch = first(parts.loaders.task, 1)[0]
        few = replace(batch, images_BCHW=batch.images_BCHW[:3], labels_B=batch.labels_B[:3], ids_B=batch.ids_B[:3])
        assert parts.hyper is not None
        with pytest.raises(AutodoError, match=r"train\.accumulate = 4: 3 pictures .* lower it"):
            pieces(parts.accumulate, parts.dtype, few, parts.hyper.parameters.fetch(few.ids_B))


def test_uneven_pieces_hold_every_picture_once(digits: Path, tmp_path: Path) -> None:
    """As where a picture of the part was dropped."""
    with comm.process_group(comm.Place(), CPU) as ranks:
        parts = build(check_config(in_pieces(settings(digits, tmp_path), 4), "test"), read_manifest(digits), ranks)
        batch = first(parts.loaders.task, 1)[0]
        odd = replace(
            batch,
            images_BCHW=batch.images_BCHW[:-1],
            labels_B=batch.labels_B[:-1],
            ids_B=batch.ids_B[:-1],
            draws_BD=batch.draws_BD[:-1],
        )
        assert parts.hyper is not None
        rows = parts.hyper.parameters.fetch(odd.ids_B)
        cut: list[Piece] = pieces(parts.accumulate, parts.dtype, odd, rows)
        assert sorted(len(piece.labels_B) for piece in cut) == [3, 4, 4, 4]
        assert [piece.last for piece in cut] == [False, False, False, True]
        assert torch.equal(torch.cat([piece.images_BCHW for piece in cut]), odd.images_BCHW)
        assert rows.soft_logit is not None
        soft = [piece.rows.soft_logit for piece in cut if piece.rows.soft_logit is not None]
        assert torch.equal(torch.cat(soft), rows.soft_logit)


def test_a_resume_may_change_it(digits: Path, tmp_path: Path) -> None:
    tree = settings(digits, tmp_path)
    assert not differences(check_config(tree, "one"), check_config(in_pieces(tree, 4), "two"))

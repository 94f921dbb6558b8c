"""Rows over time, the same over resumes and ranks; pictures made again, against those that a real run's model got."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import RankPool
from test_autodo import learning
from test_train import cut_back, run_train, settings
from typer.testing import CliRunner

from autodo_dist import train
from autodo_dist.build import build
from autodo_dist.build_data import build_split, choose_kept
from autodo_dist.cli import app
from autodo_dist.contact_sheet import Cell, picture, sheet
from autodo_dist.data.loader import Batch
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.history import kept
from autodo_dist.learnt import open_source
from autodo_dist.load_config import check_config
from autodo_dist.replay import PASSES, TASK, NotSeen, course_of, rows_over_time, view


def wanted(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Three epochs of four task steps, learnt from the second on, saved every three steps and at epochs' ends."""
    small = {"data__image_size": 16, "train__batch_size": 60, "train__steps_per_pass": 4, "checkpoint__every_steps": 3}
    changes = small | {"train__epochs": 3, "hyper__way": "shared", "train__evaluate_every": 3} | changes
    tree = learning(digits, folder, **changes)
    return tree | {"history": {"samples": 4, "ids": sorted(train_ids(digits, folder)[:5])}}


def train_ids(digits: Path, folder: Path) -> list[int]:
    """The run's train samples, by its split alone."""
    config = check_config(settings(digits, folder), "test")
    ids: list[int] = build_split(config, read_manifest(digits)).train.tolist()
    return ids


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def recorded(tree: dict[str, Any], ids: list[int], done: int = 0) -> list[dict[str, Any]]:
    """Train on, and keep what the loader gave and the encoder got of some samples, for each step that had one."""
    found: list[dict[str, Any]] = []
    going: list[torch.Tensor] = []
    count = done

    def built(*args: Any) -> Any:
        parts = build(*args)
        parts.model.encoder.register_forward_pre_hook(lambda _, inputs: going.append(inputs[0].detach().clone()))
        return parts

    def noting(step: Any, kind: str) -> Any:
        def call(*args: Any, **words: Any) -> Any:
            nonlocal count
            count += 1
            batch = next(arg for arg in args if isinstance(arg, Batch))
            going.clear()
            answer = step(*args, **words)
            seen = torch.cat(going)  # a hyper step may take pieces through the encoder twice
            for place, id_ in enumerate(batch.ids_B.tolist()):
                if id_ in ids:
                    pair = {"loaded": batch.images_BCHW[place].clone(), "seen": seen[place].clone()}
                    found.append({"kind": kind, "step": count, "id": id_} | pair)
            return answer

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", built)
        for name, kind in (("task_step", "task"), ("shared_step", "task"), ("hyper_step", "hyper")):
            patch.setattr(train, name, noting(getattr(train, name), kind))
        run_train(tree)
    return found


SHARED_ROW = {"learn__augment": "shared", "checkpoint__every_steps": 1}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {"hyper__way": "separate"}),
        (1, {"hyper__way": "separate", "train__precision": "fp64", "data__policy": "randaugment"}),
        (2, {"train__accumulate": 2, "learn__color": True, "hyper__table_dtype": "bfloat16", "data__erase": "cutout"}),
        (2, SHARED_ROW | {"hyper__validation_every": 2}),
        (1, SHARED_ROW | {"hyper__way": "separate"}),
        (1, {"compat": "autodo2021", "hyper__start_epoch": 0}),
        (1, {"learn__augment": "none"}),
        (2, {"learn__clean_folds": 3}),
    ],
    ids=str,
)
def test_pictures_are_to_the_bit_those_that_the_model_got(
    pool: RankPool, digits: Path, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    compat = {"compat": changes["compat"]} if "compat" in changes else {}
    tree = wanted(digits, tmp_path, **{name: value for name, value in changes.items() if name != "compat"}) | compat
    ids = tree["history"]["ids"]
    given = {(it["id"], it["kind"], it["step"]): it for part in pool.run(ranks, recorded, tree, ids) for it in part}
    source = open_source(tmp_path / "run")
    warped = 0
    for id_ in ids:
        course = course_of(source, id_)
        known = rows_over_time(source, course)
        for epoch in range(3):
            for pass_ in course.passes(epoch):
                try:
                    found = view(source, course, known, epoch, pass_)
                except NotSeen:
                    continue
                expected = given.pop((id_, PASSES[pass_], found.step))
                assert found.exact
                assert found.ranks == ranks
                assert torch.equal(found.loaded_CHW, expected["loaded"])
                assert torch.equal(found.seen_CHW, expected["seen"])
                warped += not torch.equal(found.loaded_CHW.to(found.seen_CHW.dtype), found.seen_CHW)
    assert not given
    assert (warped > 2) == (changes.get("learn__augment") != "none")


def test_history_says_what_checkpoints_hold(digits: Path, tmp_path: Path) -> None:
    """Every number, of every sample, at the end of every epoch in which rows were learnt; logits to the bit."""
    run = run_train(wanted(digits, tmp_path, hyper__way="separate"))
    lines = history(run)
    ids = sorted({line["id"] for line in lines})
    assert len(ids) in range(5, 10)
    assert [(it["step"], it["epoch"], it["id"]) for it in lines] == [
        (step, epoch, id_) for step, epoch in ((12, 2), (20, 3)) for id_ in ids
    ]
    for step in (12, 20):
        source = open_source(run, step)
        rows_n = np.searchsorted(source.split.train, ids)
        reader, layout = source.reader, source.layout
        groups = layout.split(reader.rows("hyper.rows.value", rows_n).double())
        soft_nC = groups["soft_logit"].softmax(1)
        updated = reader.rows("hyper.rows.touched", rows_n).tolist()
        for at, line in enumerate(it for it in lines if it["step"] == step):
            assert line["gate_logit"] == groups["gate_logit"][at].tolist()
            assert line["magnitude_logit"] == groups["magnitude_logit"][at].tolist()
            weight = torch.nn.functional.softplus(groups["weight_logit"][at]).item() / math.log(2)
            assert line["weight"] == pytest.approx(weight, rel=1e-12)
            given = source.split.label_N[line["id"]]
            assert line["given_probability"] == pytest.approx(soft_nC[at, given].item(), rel=1e-12)
            likeliest, probability = next(iter(line["soft_label"].items()))
            assert likeliest == source.manifest.classes[int(soft_nC[at].argmax())]
            assert probability == pytest.approx(soft_nC[at].max().item(), rel=1e-12)
            assert line["last_hyper_step"] == updated[at]
            for name, gate, magnitude in zip(
                layout.operations, line["gate_logit"], line["magnitude_logit"], strict=True
            ):
                both = {"probability": 1 / (1 + math.exp(-gate)), "magnitude": 1 / (1 + math.exp(-magnitude))}
                assert line["augment"][name] == pytest.approx(both, rel=1e-12)
    assert len({line["last_hyper_step"] for line in lines}) > 3


def test_history_is_the_same_over_resumes_and_ranks(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """Byte for byte after a kill at two places, one of them while lines were being written; close on two ranks."""
    tree = wanted(digits, tmp_path / "one", hyper__way="separate")
    run = pool.run(1, run_train, tree)[0]
    expected = (run / "history.jsonl").read_bytes()
    for step, left in ((15, expected + b'{"step": 20, "epo'), (8, expected[:-20])):
        cut_back(run, step)
        (run / "history.jsonl").write_bytes(left)
        pool.run(1, run_train, tree)
        assert (run / "history.jsonl").read_bytes() == expected
    other = pool.run(2, run_train, wanted(digits, tmp_path / "two", hyper__way="separate"))[0]
    for one, two in zip(history(run), history(other), strict=True):
        keys = ("step", "epoch", "id", "last_hyper_step")
        assert [one[key] for key in keys] == [two[key] for key in keys]
        assert one["weight"] == pytest.approx(two["weight"], abs=1e-3)


def test_lines_are_kept_as_far_as_their_epochs_are_done(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert kept(path, 5) == 0
    path.write_text('{"epoch": 1}\n{"epoch": 1}\n{"epoch": 2}\n{"epoch": 4}\n{"epo')
    assert [kept(path, epochs) for epochs in range(6)] == [0, 2, 3, 3, 4, 4]


def test_samples_are_drawn_by_the_seed_beside_the_wanted(digits: Path, tmp_path: Path) -> None:
    train_part = np.arange(100, 1100, 2)
    ids = choose_kept(train_part, 8, (200, 202), seed=5)
    assert {200, 202} < set(ids.tolist()) <= set(train_part.tolist())
    assert len(ids) in (8, 9, 10)
    assert ids.tolist() == choose_kept(train_part, 8, (202, 200), seed=5).tolist()
    assert ids.tolist() != choose_kept(train_part, 8, (200, 202), seed=6).tolist()
    assert choose_kept(train_part, 10_000, (), seed=5).tolist() == train_part.tolist()
    tree = wanted(digits, tmp_path) | {"history": {"ids": [1_000_000]}}
    with pytest.raises(AutodoError, match=r"history.ids: 1000000 is none of the 636 train samples") as caught:
        run_train(tree)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/ledger.jsonl").exists()  # before it counts as a start


def test_samples_to_keep_where_nothing_is_learnt_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match=r"history.ids: nothing is learnt"):
        check_config(settings(digits, tmp_path) | {"history": {"ids": [3]}}, "test")


def test_nothing_is_kept_where_none_is_wanted_or_learnt(digits: Path, tmp_path: Path) -> None:
    for name, tree in (
        ("off", wanted(digits, tmp_path) | {"history": {"samples": 0}}),
        ("plain", settings(digits, tmp_path, data__image_size=16, train__steps_per_pass=1)),
    ):
        assert not (run_train(tree | {"run": {"root": str(tmp_path), "name": name}}) / "history.jsonl").exists()


def assert_replayed(run: Path, given: dict[tuple[int, str, int], dict[str, Any]], ranks: dict[int, int]) -> None:
    """Every recorded picture is made again; `ranks` says how many made each step."""
    source = open_source(run)
    for id_, kind, step in given:
        course = course_of(source, id_)
        known, views = rows_over_time(source, course), []
        for epoch in range(course.begun[0], 3):
            with contextlib.suppress(NotSeen):
                views.append(view(source, course, known, epoch, PASSES.index(kind)))
        (found,) = (it for it in views if it.step == step)
        assert found.exact
        assert found.ranks == ranks[step]
        assert torch.equal(found.loaded_CHW, given[id_, kind, step]["loaded"])
        assert torch.equal(found.seen_CHW, given[id_, kind, step]["seen"])


def by_step(parts: list[list[dict[str, Any]]]) -> dict[tuple[int, str, int], dict[str, Any]]:
    return {(it["id"], it["kind"], it["step"]): it for part in parts for it in part}


def test_a_run_that_went_on_with_other_ranks_and_a_fork(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    tree = wanted(digits, tmp_path)
    ids = tree["history"]["ids"]
    given = by_step(pool.run(1, recorded, tree, ids))
    cut_back(tmp_path / "run", 6)
    later = by_step(pool.run(2, recorded, tree, ids, 6))
    given = {key: it for key, it in given.items() if key[2] <= 6} | later
    assert {2 if step > 6 else 1 for _, _, step in given} == {1, 2}
    assert_replayed(tmp_path / "run", given, {step: 1 + (step > 6) for step in range(1, 13)})

    plain = wanted(digits, tmp_path, learn__augment="none", learn__weight=False, learn__soft_label=False)
    run_train(plain | {"history": {}, "run": {"root": str(tmp_path), "name": "plain"}})
    run = {"root": str(tmp_path), "name": "fork", "fork": f"{tmp_path / 'plain'}@8"}
    forked = wanted(digits, tmp_path, hyper__start_epoch=0, hyper__way="separate") | {"run": run}
    given = by_step([recorded(forked, ids, 8)])
    assert {kind for _, kind, _ in given} == {"task", "hyper"}
    assert_replayed(tmp_path / "fork", given, dict.fromkeys(range(9, 17), 1))
    source = open_source(tmp_path / "fork")
    course = course_of(source, ids[0])
    with pytest.raises(NotSeen, match="forked"):
        view(source, course, rows_over_time(source, course), 0, TASK)


def call(*words: object) -> str:
    result = CliRunner().invoke(app, ["explain", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose shared augmentation changes in every second step, of which few rows are kept."""
    changes = {"learn__augment": "shared", "checkpoint__every_steps": 10, "train__steps_per_pass": 8}
    changes |= {"hyper__validation_every": 2}
    return run_train(wanted(digits, tmp_path_factory.mktemp("explain"), **changes))


def test_the_command_speaks_and_draws(run: Path, tmp_path: Path) -> None:
    line = next(it for it in history(run) if it.get("last_hyper_step", 0) > 2)  # changed after step 10, which is kept
    said = call(run, line["id"], "--epoch", "1-3").splitlines()
    key = read_manifest(open_source(run).config.data.root).keys[line["id"]].as_py()
    assert said[0] == f"id {line['id']}: {key}"
    assert said[1].startswith("  given label ")
    assert re.fullmatch(r"  start +0 +0 +1  0\.9100  \d 0\.9100, .*", said[3])
    end = next(text for text in said if text.startswith("  end of epoch 2"))
    assert f" {line['step']} " in end
    assert f"{line['given_probability']:.4f}" in end
    assert "  augmentation at checkpoint of step 24, shared by all samples" in said
    (place,) = (at for at, text in enumerate(said) if text.startswith("  pictures: "))
    assert f"{run}/explain-{line['id']}.png;" in said[place]
    assert [text.partition(":")[0] for text in said[place + 1 :]] == [f"  epoch {k}, task pass" for k in (1, 2, 3)]
    image = Image.open(run / f"explain-{line['id']}.png")
    assert (image.format, image.mode) == ("PNG", "RGB")

    assert call(run, key, "--out", tmp_path / "a.png").splitlines()[:2] == said[:2]
    assert (tmp_path / "a.png").is_file()
    asked = call(run, line["id"], "--step", 8, "--epoch", 3, "--out", tmp_path / "b.png")
    seen = "row of checkpoint of step 8, as asked" in asked
    assert seen or "not in this pass" in asked


def test_a_row_that_is_not_known_is_said_to_be_the_nearest(run: Path) -> None:
    """All samples' one row changes in steps 9, 11, …: exact are the steps between a kept row and the next change."""
    source = open_source(run)
    exact = {}
    for id_ in source.split.train[:10].tolist():
        course = course_of(source, id_)
        known = rows_over_time(source, course)
        for epoch in range(3):
            with contextlib.suppress(NotSeen):
                found = view(source, course, known, epoch, TASK)
                exact[found.step] = found.exact
                assert found.exact or found.kept.step < found.step
    kept_between = (16, 17, 20, 21, 24)  # kept: the start, 8, 10, 16, 20, 24
    expected = {step: step <= 11 or step in kept_between for step in exact}
    assert len(set(expected.values())) == 2
    assert exact == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["4000"], "id 4000: the data set has ids 0 to 1796"),
        (["digit-x"], "'digit-x': neither an id (0 to 1796) nor a key of "),
        (["VALIDATION"], "of the validation part; only train samples have a row"),
        (["TRAIN", "--step", "7"], "keeps no checkpoint of it; those there: 8, 10, 16, 20, 24"),
        (["TRAIN", "--epoch", "4"], "--epoch 4: the run has epochs 1 to 3"),
        (["TRAIN", "--epoch", "x"], "'x' is neither a number nor a range; write e.g. --epoch 3,17,40-45"),
        (["TRAIN", "--out", "a.jpg"], "--out a.jpg: the sheet is a PNG"),
        (["TRAIN", "--out", "/proc/none/a.png"], "/proc/none/a.png: cannot be written (No such file or directory)"),
    ],
)
def test_slips_are_one_line(run: Path, words: list[str], message: str) -> None:
    split = open_source(run).split
    places = {"VALIDATION": str(split.validation[0]), "TRAIN": str(split.train[0])}
    with pytest.raises(AutodoError) as caught:
        call(run, *(places.get(word, word) for word in words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_sheet_has_the_pixels() -> None:
    """A pixel of 32 × 32 is a square of 3 × 3 there; beyond 0 and 1 it is cut off."""
    pixels = torch.arange(3 * 32 * 32).reshape(3, 32, 32).double() / (3 * 32 * 32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    image = picture(normal.float(), mean, std)
    expected = (pixels.permute(1, 2, 0) * 255).round().byte().numpy()
    assert (np.abs(np.asarray(image).astype(int) - expected) <= 1).all()
    assert np.asarray(picture(normal + 9, mean, std)).min() == 255
    page = np.asarray(sheet([Cell(("one", "two"), (image, image)), Cell(("three",), (image,))]))
    large = np.asarray(image).repeat(3, 0).repeat(3, 1)
    found = [
        (top, left)
        for top in range(page.shape[0] - 95)
        for left in range(page.shape[1] - 95)
        if (page[top, left : left + 96] == large[0]).all() and (page[top : top + 96, left : left + 96] == large).all()
    ]
    assert len(found) == 3
    assert found[0][0] == found[1][0] < found[2][0]
    assert found[0][1] == found[2][1] < found[1][1]

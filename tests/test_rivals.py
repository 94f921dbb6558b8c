"""Rivals as whole trainings: the loop is the trainer's, each sees the pictures that it should, refusals, operations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cleanlab.filter import find_label_issues
from test_train import run_train, settings, weights
from torch.utils.flop_counter import FlopCounterMode

from autodo_dist.build import Parts
from autodo_dist.build_data import build_split, read_data
from autodo_dist.config import Config
from autodo_dist.data.loader import Batch
from autodo_dist.errors import AutodoError
from autodo_dist.experiment import rivals
from autodo_dist.experiment.rivals import confident_learning, elr, fine_tune, loop, meta_weight_net
from autodo_dist.experiment.rivals.loop import Phase, Rule, Site, fit, parts_of, phase, plain, site
from autodo_dist.load_config import check_config


def small(digits: Path, **changes: Any) -> dict[str, Any]:
    """Two epochs of a few steps, with a clean part of a fifth."""
    return settings(digits, Path("/nowhere"), data__validation_fraction=0.2, **changes)


def config_of(digits: Path, **changes: Any) -> Config:
    return check_config(small(digits, **changes), "test")


@contextmanager
def opened(config: Config) -> Iterator[tuple[Site, Parts]]:
    with site(config) as here, parts_of(here) as parts:
        yield here, parts


class Spy:
    """Records the ids, labels and rates of all steps of a training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[list[int], list[int], float]] = []
        real = loop.step

        def step(parts: Parts, each: Phase, batch: Batch, lr: float) -> None:
            self.steps.append((batch.ids_B.tolist(), batch.labels_B.tolist(), lr))
            real(parts, each, batch, lr)

        monkeypatch.setattr(loop, "step", step)
        monkeypatch.setattr(loop, "step_flops", lambda *_: 1.0)  # no step beside those of training

    def ids(self, part: slice = slice(None)) -> set[int]:
        return {id_ for ids, _, _ in self.steps[part] for id_ in ids}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__label_smoothing": 0.1},
        {
            "train__average": 0.9,
            "data__policy": "trivialaugment",
            "optim__clip_norm": 1.0,
            "train__logit_adjustment": 1.0,
        },
        {"model__name": "resnet18", "train__steps_per_pass": 2, "data__train_on": "all"},
    ],
    ids=["plain", "smoothing", "average, policy, clipping, adjustment", "BatchNorm, clean pictures too"],
)
def test_plain_loop_is_the_trainer_bit_for_bit(digits: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    tree = small(digits, **changes)
    folder = run_train(tree | {"run": {"root": str(tmp_path), "name": "run"}})
    summary = json.loads((folder / "summary.json").read_text())
    expected = weights(folder, summary["steps"])
    with opened(check_config(tree, "test")) as (here, parts):
        fit(parts, plain(here, parts), here.ranks)
        accuracy = loop.test_accuracy(here, parts)
        got = {f".model.{name}": value for name, value in parts.model.state_dict().items()}
        if parts.average is not None:
            got |= {f".average.{name}": value for name, value in parts.average.state().items()}
    assert len(got) == sum(name.startswith((".model.", ".average.")) for name in expected)
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name
    assert accuracy == summary["test_accuracy_final"]


def test_train_loss_alone_sees_adjusted_logits(digits: Path) -> None:
    """The rule gets z + τ log π, π of the given labels; the first step's gradient of the head's bias shows it."""
    seen: list[torch.Tensor] = []

    class Look(Rule):
        def losses(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
            seen.append(logits_BC.detach())
            return super().losses(logits_BC, labels_B, ids_B)

    config = config_of(digits, train__logit_adjustment=0.7)
    with opened(config) as (here, parts):
        train, label_N = here.split.train, here.split.label_N
        (each,) = [phase(here, parts.loaders.task, train, label_N, Look())]
        batch = next(each.loader.batches(0))
        logits_BC = parts.model(batch.images_BCHW)[1].detach()
        loop.step(parts, each, batch, 0.01)
        share_C = torch.bincount(torch.from_numpy(label_N[train]).long(), minlength=10) / len(train)
        torch.testing.assert_close(seen[0], logits_BC + 0.7 * share_C.log())
        assert loop.test_accuracy(here, parts) == float((predicted(here, parts) == true_test(here)).mean())


def predicted(here: Site, parts: Parts) -> np.ndarray:
    """The likeliest class of each test picture, by its plain logits."""
    with torch.no_grad():
        found = [parts.model.eval()(batch.images_BCHW)[1].argmax(1) for batch in parts.loaders.test.batches(0)]
    return torch.cat(found).numpy()


def true_test(here: Site) -> np.ndarray:
    return here.manifest.label_N[here.split.test]


@pytest.mark.parametrize(
    ("rival", "train_on"),
    [("elr", "train"), ("sop", "train"), ("meta_weight_net", "train"), ("meta_weight_net", "all")],
)
def test_a_rival_sees_its_pictures_and_can_be_repeated(
    digits: Path, rival: str, train_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(digits, data__train_on=train_on, data__label_noise=0.5)
    found = []
    for _ in range(2):
        spy = Spy(monkeypatch)
        found.append(rivals.run(config, rival, {}))
        monkeypatch.undo()
    split = build_split(config, read_data(config))
    assert spy.ids() <= set(split.train.tolist())
    assert bool(spy.ids() & set(split.validation.tolist())) == (train_on == "all")
    assert len(spy.steps) == 2 * (len(split.train) // 100)
    assert all((split.label_N[ids] == labels).all() for ids, labels, _ in spy.steps)
    assert found[0].test_accuracy == found[1].test_accuracy
    assert found[0].test_accuracy_best_epoch >= found[0].test_accuracy
    assert found[0].seconds > 0
    assert not Path("/nowhere").exists()


def test_neutral_options_are_plain_training(digits: Path) -> None:
    """λ = 0 of ELR, and u = v = 0 to rounding of SOP, whose rates are 0: the same accuracies as of the plain loop."""
    config = config_of(digits, train__precision="fp64", train__steps_per_pass=2)
    with site(config) as here:
        expected = loop.run(here, plain)
    for rival, options in (("elr", {"coefficient": 0.0}), ("sop", {"lr_u": 0.0, "lr_v": 0.0})):
        found = rivals.run(config, rival, options)
        assert (found.test_accuracy, found.flops) == (expected.test_accuracy, expected.flops), rival


def test_elr_keeps_a_target_for_each_picture_that_came(digits: Path) -> None:
    """A picture's target sums to 1 − β^(its visits)."""
    with opened(config_of(digits)) as (here, parts):
        (each,) = elr.phases(elr.Options(momentum=0.5), here, parts)
        fit(parts, [each], here.ranks)
        visits_N = torch.zeros(len(here.split.train))
        for epoch in each.epochs:
            for batch in each.loader.batches(epoch):
                visits_N[np.searchsorted(here.split.train, batch.ids_B.numpy())] += 1
        assert isinstance(each.rule, elr.Elr)
        torch.testing.assert_close(each.rule.target_NC.sum(1), 1 - 0.5**visits_N, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [100, 400])
def test_fine_tune_ends_on_clean_pictures_alone(digits: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 epochs, share 0.4: three of train and clean part, two of the clean part with its true labels.

    Batches of 400 are more than the clean part has: it comes whole.
    """
    config = config_of(digits, train__epochs=5, train__batch_size=batch, data__label_noise=0.5)
    manifest = read_data(config)
    split = build_split(config, manifest)
    both, clean = len(split.train) + len(split.validation), len(split.validation)
    assert 100 < clean < 400
    first, second = 3 * (both // batch), 2 * (clean // min(batch, clean))
    spy = Spy(monkeypatch)
    outcome = rivals.run(config, "fine_tune", {"share": 0.4, "lr_factor": 0.25})
    assert len(spy.steps) == first + second == outcome.flops
    everything = set(split.train.tolist()) | set(split.validation.tolist())
    assert spy.ids(slice(0, first)) <= everything
    assert (
        len(spy.ids(slice(0, first))) > 0.95 * both
    )  # an epoch loses its last incomplete batch, another one each time
    assert spy.ids(slice(first, None)) <= set(split.validation.tolist())
    assert len(spy.ids(slice(first, None))) > 0.9 * min(clean, batch * (clean // batch or 1))
    for ids, labels, _ in spy.steps[first:]:
        assert (manifest.label_N[ids] == labels).all()
    assert max(lr for _, _, lr in spy.steps[:first]) == config.lr
    assert [lr for _, _, lr in spy.steps[first:]] == pytest.approx(
        [0.25 * config.lr * 0.5 * (1 + np.cos(np.pi * step / second)) for step in range(second)]
    )


@pytest.mark.parametrize(("epochs", "share", "expected"), [(10, 0.2, 8), (3, 0.1, 2), (3, 0.9, 1), (2, 0.5, 1)])
def test_each_phase_of_fine_tuning_has_an_epoch(epochs: int, share: float, expected: int) -> None:
    assert fine_tune.before_tuning(epochs, share) == expected


def test_confident_learning_predicts_each_picture_once_by_a_model_that_did_not_see_it(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left for the last training is what cleanlab leaves of exactly these predictions."""
    config = config_of(digits, data__label_noise=0.4, data__imbalance_ratio=1)
    split = build_split(config, read_data(config))
    clean = set(split.validation.tolist())
    predicted, share_NC = [], np.full((len(split.train), 10), np.nan)
    real = confident_learning.probabilities
    spy = Spy(monkeypatch)

    def probabilities(here: Site, parts: Parts, each: Phase, ids: np.ndarray) -> np.ndarray:
        predicted.append((ids, len(spy.steps)))
        found = real(here, parts, each, ids)
        share_NC[np.searchsorted(split.train, ids)] = found
        return found

    monkeypatch.setattr(confident_learning, "probabilities", probabilities)
    rivals.run(config, "confident_learning", {"folds": 3})
    assert sorted(np.concatenate([ids for ids, _ in predicted]).tolist()) == split.train.tolist()
    begun = 0
    for ids, ended in predicted:
        trained = spy.ids(slice(begun, ended))
        assert not trained & set(ids.tolist())
        assert len(trained & clean) > 0.8 * len(clean)  # two epochs, each without its last incomplete batch
        assert trained <= clean | set(split.train.tolist())
        begun = ended
    wrong_N = find_label_issues(split.label_N[split.train], share_NC, n_jobs=1)
    assert 0 < wrong_N.sum() < len(wrong_N)
    last = spy.ids(slice(begun, None))
    assert last <= clean | set(split.train[~wrong_N].tolist())
    assert len(spy.steps) - begun == 2 * ((len(clean) + (~wrong_N).sum()) // 100)
    assert share_NC.sum(1) == pytest.approx(1.0)
    assert len(last & clean) > 0.8 * len(clean)


def test_folds_have_the_given_labels_in_equal_shares() -> None:
    ids, label_N = np.arange(7, 307, 3), np.random.default_rng(0).integers(4, size=400).astype(np.int32)
    dealt = list(confident_learning.folds(ids, label_N, 5, seed=3))
    assert sorted(np.concatenate([outside for _, outside in dealt]).tolist()) == ids.tolist()
    for inside, outside in dealt:
        assert not set(inside) & set(outside)
        assert len(inside) + len(outside) == len(ids)
        shares = np.bincount(label_N[outside], minlength=4) - np.bincount(label_N[ids], minlength=4) / 5
        assert np.abs(shares).max() < 1


def test_more_folds_than_there_are_pictures_of_a_label_are_refused() -> None:
    with pytest.raises(AutodoError, match=r"confident_learning: folds = 11: n_splits=11 cannot be .*; lower it"):
        list(confident_learning.folds(np.arange(20), np.arange(20, dtype=np.int32) % 2, 11, seed=0))


def test_a_picture_without_a_prediction_is_kept() -> None:
    """Cleanlab sees the others alone."""
    given_N = np.array([0, 1] * 20, np.int32)
    share_NC = np.where(np.eye(2)[given_N] > 0, 0.9, 0.1)
    share_NC[4], share_NC[6] = (0.05, 0.95), (np.nan, np.nan)
    wrong_N = confident_learning.suspected(given_N, share_NC)
    assert np.flatnonzero(wrong_N).tolist() == [4]


def convnet_operations(batch: int, side: int, classes: int) -> tuple[float, float]:
    """Of a forward and of a whole step of the convnet: the backward is two forwards, but for the pictures' gradient."""
    layers = [(3, 32, side), (32, 64, side // 2), (64, 128, side // 4), (128, 128, side // 8)]
    convolutions = [2.0 * 9 * inputs * outputs * at * at * batch for inputs, outputs, at in layers]
    forward = sum(convolutions) + 2.0 * 128 * classes * batch
    return forward, 3 * forward - convolutions[0]


def test_operations_are_those_of_the_layers(digits: Path) -> None:
    """Counted by hand for the convnet: a step, times the steps of each kind; the run's own count is the same."""
    config = config_of(digits)
    split = build_split(config, read_data(config))
    train, clean = len(split.train), len(split.validation)
    forward, step = convnet_operations(100, 16, 10)
    assert rivals.flops(config, "elr", {}) == rivals.flops(config, "sop", {}) == 2 * (train // 100) * step
    assert rivals.run(config, "elr", {}).flops == 2 * (train // 100) * step
    tuned = check_config(small(digits, optim__warmup_epochs=0), "test")
    expected = ((train + clean) // 100 + clean // 100) * step
    assert rivals.flops(tuned, "fine_tune", {"share": 0.5}) == expected
    dealt = confident_learning.folds(split.train, split.label_N, 2, config.train.seed)
    steps = 2 * sum((len(inside) + clean) // 100 for inside, _ in dealt) + 2 * ((train + clean) // 100)
    found = rivals.flops(config, "confident_learning", {"folds": 2})
    assert found == pytest.approx(steps * step + train * forward / 100)
    done = rivals.run(config, "confident_learning", {"folds": 2}).flops
    assert done <= found
    assert (found - done) / step == pytest.approx(round((found - done) / step))


@pytest.mark.parametrize("train_on", ["train", "all"])
def test_operations_of_meta_weight_net_are_those_of_its_training(digits: Path, train_on: str) -> None:
    """Its virtual step has no formula as short as a layer's, so every step of a training is counted."""
    config = config_of(digits, data__train_on=train_on)
    with opened(config) as (here, parts):
        phases = meta_weight_net.phases(meta_weight_net.Options(), here, parts)
        with FlopCounterMode(display=False) as counter:
            fit(parts, phases, here.ranks)
    assert counter.get_total_flops() == rivals.flops(config, "meta_weight_net", {})


@pytest.mark.parametrize(
    ("rival", "options", "message"),
    [
        ("meta_weigth_net", {}, "rival 'meta_weigth_net' is unknown; did you mean meta_weight_net"),
        ("elr", {"momentun": 0.5}, "elr: unknown option momentun; did you mean momentum"),
        ("sop", {"lr": 1.0}, "sop: unknown option lr; did you mean lr_"),
        ("elr", {"momentum": 1.0}, "elr: momentum = 1: not at least 0 and below 1"),
        ("elr", {"coefficient": float("nan")}, "elr: coefficient = nan"),
        ("sop", {"lr_v": -1}, "sop: lr_v = -1"),
        ("meta_weight_net", {"lr": float("inf")}, "meta_weight_net: lr = inf"),
        ("fine_tune", {"share": 1.0}, "fine_tune: share = 1"),
        ("fine_tune", {"lr_factor": 0}, "fine_tune: lr_factor = 0"),
        ("confident_learning", {"folds": 2.5}, "confident_learning: folds = 2.5"),
    ],
)
def test_an_unknown_name_or_value_is_refused(digits: Path, rival: str, options: dict[str, float], message: str) -> None:
    for call in (rivals.run, rivals.flops):
        with pytest.raises(AutodoError, match=message):
            call(config_of(digits), rival, options)


@pytest.mark.parametrize(
    ("rival", "changes", "message"),
    [
        ("elr", {"train__accumulate": 2}, "train.accumulate = 2: rivals train as one rank"),
        ("elr", {"train__on_nonfinite": "rollback"}, "without checkpoints, .* set train.on_nonfinite=stop"),
        ("fine_tune", {"data__train_on": "all"}, "data.train_on = all: fine_tune uses the clean"),
        ("confident_learning", {"data__train_on": "clean"}, "data.train_on = clean: confident_learning uses"),
        ("meta_weight_net", {"data__validation_fraction": 0.0}, "meta_weight_net: no clean validation picture"),
        ("meta_weight_net", {"data__train_on": "clean"}, "its own way; set data.train_on=train or all"),
        ("fine_tune", {}, "optim.warmup_epochs = 1: not below the 1 epochs of a phase"),
        ("sop", {"optim__lr": 1e30}, "epoch 1: the weights are not finite; lower optim.lr"),
    ],
)
def test_settings_that_do_not_fit_are_refused(digits: Path, rival: str, changes: dict[str, Any], message: str) -> None:
    """And nothing of it stays in the process: the same call is refused again for the same reason."""
    tree = settings(digits, Path("/nowhere"), **({"data__validation_fraction": 0.2} | changes))
    for _ in range(2):
        with pytest.raises(AutodoError, match=message):
            rivals.run(check_config(tree, "test"), rival, {})


def test_learnt_rows_are_refused(digits: Path) -> None:
    tree = small(digits) | {"learn": {"weight": True}, "hyper": {"start_epoch": 1}}
    with pytest.raises(AutodoError, match=r"learn: rivals train as one rank, .* learn no rows"):
        rivals.run(check_config(tree, "test"), "elr", {})

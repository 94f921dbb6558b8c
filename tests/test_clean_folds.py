"""The clean part trained on in folds, and adjusted logits: which pictures come when, with which rows, and π."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_autodo import learning
from test_train import lines, run_train, settings

from autodo_dist import build, build_data, class_prior
from autodo_dist.data import order, split
from autodo_dist.data.manifest import Manifest, read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.hyperparameters import Hyperparameters, Layout
from autodo_dist.load_config import check_config
from autodo_dist.method.hypergrad import Rows
from autodo_dist.method.losses import soft_logit_start
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.parallel import comm
from autodo_dist.parallel.comm import Ranks

CPU = torch.device("cpu")
FOLDED = {"learn__clean_folds": 3, "hyper__way": "shared", "train__batch_size": 20}


@pytest.fixture(scope="module")
def manifest(digits: Path) -> Manifest:
    return read_manifest(digits)


def loaders_of(tree: dict[str, Any], manifest: Manifest) -> tuple[split.Split, build_data.Loaders]:
    config = check_config(tree, "test")
    found = build_data.build_split(config, manifest)
    return found, build_data.build_loaders(config, manifest, found, Ranks(0, 1, CPU))


# --- which pictures come when


@pytest.mark.parametrize("count", [2, 3, 7])
def test_folds_part_every_class_evenly(count: int) -> None:
    label_N = np.random.default_rng(0).integers(4, size=200).astype(np.int32)
    ids = np.arange(3, 190)
    folds = split.folds(ids, label_N, 4, count, seed=5)
    assert np.array_equal(np.sort(np.concatenate(folds)), ids)
    for members in (ids, *(ids[label_N[ids] == label] for label in range(4))):
        sizes = [len(np.intersect1d(fold, members)) for fold in folds]
        assert max(sizes) - min(sizes) <= 1
    assert not all(np.array_equal(*pair) for pair in zip(folds, split.folds(ids, label_N, 4, count, 6), strict=True))


def test_an_epoch_trains_on_all_but_the_fold_that_judges_it(digits: Path, tmp_path: Path, manifest: Manifest) -> None:
    parts, loaders = loaders_of(learning(digits, tmp_path, **FOLDED), manifest)
    task, judges = loaders.task, loaders.hyper_validation
    seen = []
    for epoch in range(6):
        trained = np.concatenate([batch.ids_B.numpy() for batch in task.batches(epoch)])
        count = loaders.validation_passes * judges.steps  # batches, some never asked for
        judging = [batch.ids_B.numpy() for batch in itertools.islice(loaders.validations(epoch), count)]
        left_out = np.setdiff1d(parts.validation, order.present(task.ids, task.absent, epoch))
        assert not set(trained) & set(left_out)
        assert len(trained) == task.steps * 20 > len(parts.train)
        assert all(set(turn) <= set(left_out) for turn in judging)
        assert loaders.validation_passes * judges.steps >= task.steps
        seen.append(left_out)
    assert np.array_equal(np.sort(np.concatenate(seen[:3])), parts.validation)
    assert all(np.array_equal(seen[epoch], seen[epoch + 3]) for epoch in range(3))
    assert np.array_equal(loaders.hyper.ids, parts.train)


def test_an_epoch_is_evaluated_on_the_fold_that_it_left_out(digits: Path, tmp_path: Path, manifest: Manifest) -> None:
    tree = learning(digits, tmp_path, **FOLDED, learn__augment="none")
    _, loaders = loaders_of(tree, manifest)
    for epoch in range(4):
        assert not np.intersect1d(
            loaders.unseen(epoch).ids, order.present(loaders.task.ids, loaders.task.absent, epoch)
        ).size
    evaluations = [row for row in lines(run_train(tree)) if row["kind"] == "evaluation"]
    assert [row["validation_pictures"] for row in evaluations] == [len(loaders.unseen(epoch).ids) for epoch in range(2)]


def test_clean_pictures_have_true_labels_and_train_pictures_given_ones(
    digits: Path, tmp_path: Path, manifest: Manifest
) -> None:
    parts, loaders = loaders_of(learning(digits, tmp_path, **FOLDED, data__label_noise=0.5), manifest)
    wrong = 0
    for batch in loaders.task.batches(0):
        ids = batch.ids_B.numpy()
        label_N = np.where(np.isin(ids, parts.train), parts.label_N[ids], manifest.label_N[ids])
        assert np.array_equal(batch.labels_B.numpy(), label_N)
        wrong += int((label_N != manifest.label_N[ids]).sum())
    assert wrong > 100


@pytest.mark.parametrize("what", ["all", "clean"])
def test_what_is_trained_on(digits: Path, tmp_path: Path, manifest: Manifest, what: str) -> None:
    tree = settings(digits, tmp_path)
    plain, _ = loaders_of(tree, manifest)
    tree["data"] = tree["data"] | {"train_on": what}
    found, loaders = loaders_of(tree, manifest)
    expected = plain.validation if what == "clean" else np.union1d(plain.train, plain.validation)
    assert np.array_equal(found.train, expected)
    assert np.array_equal(loaders.task.ids, expected)
    assert np.array_equal(found.validation, plain.validation)
    assert np.array_equal(found.label_N[plain.validation], manifest.label_N[plain.validation])


# --- rows


def test_a_sample_without_a_row_is_as_one_starts_and_stays_so() -> None:
    layout, label_N = Layout("per_sample", ("rotate",), True, 3, 0.1), np.array([2, 0, 1, 1, 0], np.int32)
    ids = torch.tensor([4, 1, 0, 3])
    started = layout.start(label_N[ids.numpy()], torch.float64)
    grads_BP = torch.randn(4, layout.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with comm.process_group(comm.place(), CPU) as ranks:
        rows = Hyperparameters(
            layout, np.array([1, 3]), label_N, ranks, Rmsprop(0.99, 1e-8), torch.float64, 0, guests=True
        )
        before = layout.join(rows.fetch(ids), ids)
        rows.apply_grads(ids, Rows(**layout.split(grads_BP)), lr=0.1, step=1)
        rows.rest()
        changed = (layout.join(rows.fetch(ids), ids) != before).any(1)
    assert torch.equal(before, started)
    assert changed.tolist() == [False, True, False, True]


# --- class shares


def test_the_loss_of_everything_is_the_balanced_softmax(digits: Path, tmp_path: Path, manifest: Manifest) -> None:
    """Ren et al. 2020, eq. 4: -log(n_y exp(z_y) / Σ_j n_j exp(z_j))."""
    tree = settings(digits, tmp_path)
    tree["data"] = tree["data"] | {"train_on": "all", "imbalance_ratio": 20}
    tree["train"] = tree["train"] | {"logit_adjustment": 1.0}
    config = check_config(tree, "test")
    with comm.process_group(comm.place(), CPU) as ranks:
        parts = build.build(config, manifest, ranks)
        adjustment_C = parts.objective.adjustment_C
        assert adjustment_C is not None
        class_prior.renew(adjustment_C, 1.0, parts.loaders.task, 0, None)
        label_n = parts.loaders.task.labels(parts.loaders.task.ids)
        parts.engine.close()
    count_C = torch.bincount(label_n, minlength=10)
    assert count_C.max() > 1.5 * count_C.min()
    logits_BC, labels_B = torch.randn(10, 10, dtype=torch.float64), torch.arange(10)
    weighted_BC = count_C * logits_BC.exp()
    written = -(weighted_BC.gather(1, labels_B[:, None])[:, 0] / weighted_BC.sum(1)).log()
    found = F.cross_entropy(logits_BC + adjustment_C, labels_B, reduction="none")
    torch.testing.assert_close(found, written, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_shares_are_by_learnt_weights_and_labels(
    digits: Path, tmp_path: Path, manifest: Manifest, soft: bool, tau: float
) -> None:
    tree = learning(
        digits, tmp_path, **FOLDED, learn__soft_label=soft, data__imbalance_ratio=10, train__logit_adjustment=tau
    )
    with comm.process_group(comm.place(), CPU) as ranks:
        parts = build.build(check_config(tree, "test"), manifest, ranks)
        hyper, task = parts.hyper, parts.loaders.task
        assert hyper is not None
        table = hyper.parameters.table
        table.value_nP += torch.randn(table.value_nP.shape, generator=torch.Generator().manual_seed(3))
        found_C = torch.zeros(10)
        class_prior.renew(found_C, tau, task, 1, hyper.parameters)
        ids = order.present(task.ids, task.absent, 1)
        rows = hyper.parameters.fetch(torch.from_numpy(ids))
        parts.engine.close()
    assert rows.weight_logit is not None
    weight_n = np.log1p(np.exp(rows.weight_logit.double().numpy())) / np.log(2)
    label_n = task.labels(ids).numpy()
    target_nC = np.eye(10)[label_n]
    if rows.soft_logit is not None:
        target_nC = np.exp(rows.soft_logit.double().numpy())
        target_nC /= target_nC.sum(1, keepdims=True)
    mass_C = weight_n @ target_nC
    np.testing.assert_allclose(found_C.numpy(), tau * np.log(mass_C / mass_C.sum()), rtol=1e-5)
    inside = np.isin(ids, table.ids)
    assert (weight_n[~inside] == 1).all()
    if soft:
        start = soft_logit_start(10, 0.1)
        expected = np.exp(start) / (np.exp(start) + 9 * np.exp(-start))
        np.testing.assert_allclose(target_nC[~inside, label_n[~inside]], expected, rtol=1e-5)


def test_a_class_without_a_label_has_a_finite_share() -> None:
    class Task:
        ids, absent = np.arange(4), ()

        @staticmethod
        def labels(ids: np.ndarray) -> torch.Tensor:
            return torch.tensor([0, 0, 2, 2])

    found_C = torch.zeros(3)
    class_prior.renew(found_C, 1.0, Task, 0, None)  # type: ignore[arg-type]  # what it reads of a loader
    torch.testing.assert_close(found_C, torch.tensor([2 / 5, 1 / 5, 2 / 5]).log())


# --- what is refused, and what is not


def test_a_class_with_fewer_clean_pictures_than_folds_is_in_some(
    digits: Path, tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    """Every picture is in one fold, and the folds differ by one picture at most; a line says that they lack a class."""
    tree = learning(digits, tmp_path, **FOLDED | {"learn__clean_folds": 50})
    _, loaders = loaders_of(tree, manifest)
    folds = loaders.task.absent
    assert np.array_equal(np.sort(np.concatenate(folds)), loaders.validation.ids)
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert min(len(np.unique(manifest.label_N[fold])) for fold in folds) < 10
    assert re.search(r"class \d has \d+ clean pictures for 50 folds: in the other epochs", caplog.text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn__clean_folds": 1}, r"learn.clean_folds = 1: no clean picture would be trained on; set 0, or 2"),
        (
            {"learn__clean_folds": 500},
            r"learn.clean_folds = 500: there are \d+ clean pictures; lower it, or raise data.validation_fraction",
        ),
        ({"data__train_on": "all"}, r"data.train_on = all: rows are learnt from clean pictures .* learn.clean_folds"),
    ],
    ids=str,
)
def test_uses_of_the_clean_part_that_exclude_each_other(
    digits: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AutodoError, match=message):
        run_train(learning(digits, tmp_path, **changes))


def test_folds_where_nothing_is_learnt_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match=r"clean_folds = 5: nothing is learnt; set data.train_on=all"):
        check_config(settings(digits, tmp_path) | {"learn": {"clean_folds": 5}}, "test")

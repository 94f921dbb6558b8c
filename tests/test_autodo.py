"""AutoDO in whole runs: exact over ranks and resumes, what it leaves alone, what it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, RankPool
from test_train import (
    assert_equal_states,
    check_four_ranks_then_three,
    cut_back,
    lines,
    run_train,
    settings,
    weights,
)

from autodo_dist.build import build
from autodo_dist.config import check_config
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.method.hypergrad import Rows
from autodo_dist.parallel import comm
from autodo_dist.steps import hyper_step, task_step

EVERYTHING = {"learn__augment": "per_sample", "learn__weight": True, "learn__soft_label": True}


def learning(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two epochs: six task steps; then six hyper steps and six task steps. Every group unless `changes` says."""
    tree = settings(digits, folder) | {"learn": {}, "hyper": {"start_epoch": 1}}
    for name, value in (EVERYTHING | changes).items():
        section, key = name.split("__")
        tree[section] = tree[section] | {key: value}
    return tree


def pass_states(tree: dict[str, Any], steps: int) -> dict[str, torch.Tensor]:
    """Rows, weights and facts after some hyper steps and some task steps from the start."""
    config = check_config(tree, "test")
    torch.set_num_threads(1)
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        assert parts.hyper is not None
        facts = []
        batches = zip(parts.loaders.hyper.batches(0), parts.loaders.hyper_validation.batches(0), strict=False)
        before = {name: value.clone() for name, value in parts.model.state_dict().items()}
        parts.model.eval()
        for step, (batch, validation) in enumerate(batches, start=1):
            if step > steps:
                break
            facts.append(hyper_step(parts, parts.hyper, batch, validation, 0.05, step, ranks))
        unchanged = all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
        no_grads = all(parameter.grad is None for parameter in parts.model.parameters())
        parts.model.train()
        for step, batch in enumerate(parts.loaders.task.batches(0)):
            if step >= steps:
                break
            task_step(parts, batch, step, ranks)
        rows = [part for part in ranks.gather(parts.hyper.parameters.table.value_nP) if len(part)]
        return {
            "rows": torch.cat(rows),
            "shared": parts.hyper.parameters.shared.value_P,
            "facts": torch.stack(facts),
            "unchanged": torch.tensor(unchanged and no_grads),
            **{f"weights.{name}": value for name, value in parts.model.state_dict().items()},
        }


@pytest.mark.parametrize("augment", ["per_sample", "shared"])
@pytest.mark.parametrize("solver", ["identity", "neumann"])
def test_steps_are_equal_on_any_number_of_ranks(
    pool: RankPool, digits: Path, tmp_path: Path, augment: str, solver: str
) -> None:
    """Direction, row gradients (through the rows) and weights to 1e-10 in float64, after one hyper step and several."""
    for steps in (1, 3):
        tree = learning(
            digits, tmp_path / str(steps), learn__augment=augment, hyper__solver=solver, train__precision="fp64"
        )
        alone = pool.run(1, pass_states, tree, steps)[0]
        assert bool(alone["unchanged"])
        moved = alone["rows"].std(0)
        assert (moved > 0).all()
        for ranks in (2, 4) if augment == "per_sample" and solver == "neumann" else (3,):
            for result in pool.run(ranks, pass_states, tree, steps):
                for name, value in alone.items():
                    torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_a_hyper_step_leaves_batchnorm_alone(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    tree = learning(digits, tmp_path, model__name="resnet18", train__batch_size=20)
    assert bool(pool.run(1, pass_states, tree, 1)[0]["unchanged"])


@pytest.mark.parametrize(("ranks", "step"), [(1, 10), (3, 10), (2, 15)])
def test_resume_with_tables_is_bit_exact(pool: RankPool, digits: Path, tmp_path: Path, ranks: int, step: int) -> None:
    """Step 10 is inside the hyper pass, 15 inside the task pass after it."""
    tree = learning(digits, tmp_path)
    folder = pool.run(ranks, run_train, tree)[0]
    final, metrics, labels = weights(folder, 18), lines(folder), (folder / "labels.csv").read_text()
    assert [(row["kind"], row["step"]) for row in metrics if row["kind"] == "hyper"] == [("hyper", 10), ("hyper", 12)]
    cut_back(folder, step)
    pool.run(ranks, run_train, tree)
    assert_equal_states(weights(folder, 18), final)
    assert lines(folder) == metrics
    assert (folder / "labels.csv").read_text() == labels


def test_resume_on_another_number_of_ranks(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    check_four_ranks_then_three(pool, learning(digits, tmp_path, train__precision="fp64"), cut=10, last=18)


def test_labels_and_hyper_lines(digits: Path, tmp_path: Path) -> None:
    folder = run_train(learning(digits, tmp_path))
    manifest = read_manifest(digits)
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "key", "given_label", "weight", "suggested_label", "suggested_probability"]
    assert len(rows) == 636
    assert all(row["key"] == manifest.keys[int(row["id"])].as_py() for row in rows)
    assert {row["given_label"] for row in rows} == set(manifest.classes)
    hyper = [row for row in lines(folder) if row["kind"] == "hyper"][-1]
    small = sum(float(row["weight"]) < 0.5 for row in rows) / 636
    changed = sum(row["given_label"] != row["suggested_label"] for row in rows) / 636
    assert hyper["weights_below_half"] == pytest.approx(small)
    assert hyper["changed_labels"] == pytest.approx(changed)
    assert -1 <= hyper["cosine"] <= 1
    assert hyper["largest_eigenvalue"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert "hyper" in summary["seconds"]


def test_start_values_train_as_smoothed_labels_do(digits: Path, tmp_path: Path) -> None:
    """Weight 1 and q = (1 − α)y + α/C: cross entropy with label smoothing has the same gradient as KL(q‖p)."""
    tree = learning(digits, tmp_path, learn__augment="none", learn__loss="kl", train__precision="fp64")
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        parts = build(check_config(tree, "test"), read_manifest(Path(tree["data"]["root"])), ranks)
        other = build(check_config(tree | {"learn": {}}, "test"), read_manifest(digits), ranks)
        batch = next(parts.loaders.task.batches(0))
        task_step(parts, batch, 0, ranks)
        logits = other.engine.forward(batch.images_BCHW.double())
        loss = torch.nn.functional.cross_entropy(logits, batch.labels_B, label_smoothing=0.1)
        other.engine.step(loss, other.lr(0))
        for ours, theirs in zip(parts.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def apply_bad(tree: dict[str, Any], bad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give rank 0 some rows with NaN gradients; the rows of its batch before and after."""
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(check_config(tree, "test"), read_manifest(Path(tree["data"]["root"])), ranks)
        assert parts.hyper is not None
        batch = next(parts.loaders.hyper.batches(0))
        weight = torch.ones(len(batch))
        if ranks.main:
            weight[:bad] = torch.nan
        parameters = parts.hyper.parameters
        before = parameters.table.fetch(batch.ids_B)
        parameters.apply_grads(batch.ids_B, Rows(weight_logit=weight), lr=0.1, step=1)
        return before, parameters.table.fetch(batch.ids_B)


def test_rows_with_nan_gradients_are_skipped_and_counted(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    only_weights = {"learn__augment": "none", "learn__soft_label": False, "hyper__most_bad_rows": 2}
    tree = learning(digits, tmp_path, **only_weights)
    (before, after), (other_before, other_after) = pool.run(2, apply_bad, tree, 2)
    assert torch.equal(after[:2], before[:2])
    assert (after[2:] < before[2:]).all()
    assert (other_after < other_before).all()
    with pytest.raises(RankError, match=r"3 row gradients were not finite, last of ids \[\d+, \d+, \d+\]"):
        pool.run(2, apply_bad, tree, 3)


def test_fork_starts_from_a_plain_run(digits: Path, tmp_path: Path) -> None:
    plain = settings(digits, tmp_path, run__name="plain", checkpoint__every_steps=None)
    run_train(plain)
    tree = learning(digits, tmp_path, run__name="forked", run__fork=f"{tmp_path / 'plain'}@6")
    folder = run_train(tree)
    rows = lines(folder)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("hyper", 10),
        ("hyper", 12),
        ("task", 16),
        ("task", 18),
        ("evaluation", 18),
    ]
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    ("fork", "changes", "message"),
    [
        ("plain@6", {"optim__lr": 0.3}, "other settings there"),
        ("plain@7", {}, "no checkpoint of step 7; those there: 5, 6, 10, 12"),
        ("plain@5", {}, "inside an epoch"),
        ("plain", {}, "not of the form RUN@STEP"),
        ("nowhere@5", {}, "no run there"),
        ("plain@6", {"run__name": "plain"}, "made with other settings .run.fork:"),
    ],
)
def test_bad_forks_are_refused(
    digits: Path, tmp_path_factory: pytest.TempPathFactory, fork: str, changes: dict[str, Any], message: str
) -> None:
    root = tmp_path_factory.getbasetemp() / "forks"
    if not (root / "plain" / "summary.json").exists():
        run_train(settings(digits, root, run__name="plain"))
    with pytest.raises(AutodoError, match=message):
        run_train(learning(digits, root, **({"run__name": "forked"} | changes), run__fork=f"{root}/{fork}"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn__smoothing": 0.0}, r"learn.smoothing = 0.0: not between 0 and C/\(C-1\) = 1.1111"),
        ({"learn__smoothing": 1.2}, "for 10 classes; 0.1 is usual"),
        ({"hyper__start_epoch": 2}, "hyper.start_epoch = 2: not below train.epochs = 2"),
        ({"data__validation_fraction": 0.0}, "validation part: no picture of class 0, 1, 2, 3, 4"),
        ({"data__validation_fraction": 0.002}, "validation part: no picture of class"),
        ({"model__name": "squeezenet1_1"}, "not in a linear layer"),
    ],
)
def test_what_cannot_learn_is_refused(digits: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodoError, match=message):
        run_train(learning(digits, tmp_path, **changes))

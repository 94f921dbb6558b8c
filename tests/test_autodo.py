"""AutoDO in whole runs: exact over ranks and resumes, what it leaves alone, what it writes."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
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

from autodo_dist import class_prior, labels_csv
from autodo_dist.build import Hyper, build
from autodo_dist.data.loader import Batch, Loader, endless
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.hyperparameters import SharedRow
from autodo_dist.load_config import check_config
from autodo_dist.method.hypergrad import Rows
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.method.solvers import Solver
from autodo_dist.parallel import comm
from autodo_dist.steps import hyper_step, renew_validation, shared_step, task_step
from autodo_dist.train import train

# Conjugate gradients amplify rounding until they have converged: ranks agree on the solution, not on the way to it.
CONVERGED = {"hyper__solver": "cg", "hyper__damping": 0.1, "hyper__cg_iterations": 500, "hyper__cg_tolerance": 1e-14}
EVERYTHING = {"learn__augment": "per_sample", "learn__weight": True, "learn__soft_label": True}
# What `recipe: autodo` consists of, for runs of a few steps.
RECIPE = {
    "train__logit_adjustment": 1.0,
    "learn__augment": "shared",
    "learn__clean_folds": 3,
    "learn__ensembling": 0.7,
    "hyper__way": "shared",
    "hyper__solver": "identity",
    "hyper__validation_every": 2,
}


def learning(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two epochs: six task steps; then six hyper steps and six task steps. Every group unless `changes` says."""
    tree = settings(digits, folder) | {"learn": {}, "hyper": {"start_epoch": 1, "way": "separate"}}
    for name, value in (EVERYTHING | changes).items():
        section, key = name.split("__")
        tree[section] = tree[section] | {key: value}
    return tree


def first(loader: Loader, steps: int) -> Iterator[Batch]:
    """The first batches of epoch 0, as a pass of so many steps."""
    for step, batch in enumerate(itertools.islice(loader.batches(0), steps), start=1):
        yield batch if step < steps else replace(batch, next_ids_B=None)


def all_rows(hyper: Hyper, ranks: comm.Ranks) -> torch.Tensor:
    """The whole table, after the gradients that are under way."""
    hyper.parameters.state()
    return torch.cat(ranks.gather(hyper.parameters.table.value_nP))


def pass_states(tree: dict[str, Any], steps: int) -> dict[str, torch.Tensor]:
    """Rows and figures after each of some hyper steps from the start, and weights after as many task steps."""
    config = check_config(tree, "test")
    torch.set_num_threads(1)
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        hyper = parts.hyper
        assert hyper is not None
        if parts.objective.adjustment_C is not None:
            class_prior.renew(parts.objective.adjustment_C, 1.0, parts.loaders.task, 0, hyper.parameters)
        figures, rows, unchanged = [], [], True
        batches = [first(loader, steps) for loader in (parts.loaders.hyper, parts.loaders.task)]
        validations = endless(parts.loaders.hyper_validation, 0)
        before = {name: value.clone() for name, value in parts.model.state_dict().items()}
        if hyper.way == "separate":
            parts.model.eval()
            for step, batch in enumerate(batches[0], start=1):
                renew_validation(parts, hyper, next(validations), ranks)
                figures.append(hyper_step(parts, hyper, batch, 0.05, step, ranks))
                rows.append(all_rows(hyper, ranks))
            unchanged = all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
            unchanged &= all(parameter.grad is None for parameter in parts.model.parameters())
        parts.model.train()
        for step, batch in enumerate(batches[1]):
            if hyper.way == "separate":
                task_step(parts, batch, step, ranks)
            else:
                if renewed := step % hyper.validation_every == 0:
                    renew_validation(parts, hyper, next(validations), ranks)
                trained = shared_step(parts, hyper, batch, step, 0.05, step + 1, ranks, renewed=renewed)
                figures.append(trained.figures)
                hyper.parameters.follow_predictions(step)  # all ranks' predictions count
                rows.append(all_rows(hyper, ranks))
        return {
            "rows": torch.stack(rows),
            "shared": hyper.parameters.shared.value_P,
            "moved": hyper.parameters.shared.touched,
            "figures": ranks.sum(torch.stack(figures))[:, 3:5] / ranks.ranks,
            "unchanged": torch.tensor(unchanged),
            **{f"weights.{name}": value for name, value in parts.model.state_dict().items()},
        }


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({}, (2, 4)),
        ({"learn__augment": "shared"}, (3,)),
        ({"hyper__solver": "identity"}, (3,)),
        (CONVERGED | {"learn__normalize_weights": True}, (4,)),
        ({"hyper__solver": "fisher", "learn__color": True}, (3,)),
        ({"hyper__way": "shared", "learn__normalize_weights": True}, (2, 4)),
        ({"hyper__way": "shared", "hyper__solver": "fisher", "learn__augment": "shared"}, (3,)),
        (RECIPE, (2, 3)),
        (RECIPE | {"learn__augment": "per_sample"}, (3,)),
    ],
    ids=str,
)
def test_steps_are_equal_on_any_number_of_ranks(
    pool: RankPool, digits: Path, tmp_path: Path, changes: dict[str, Any], numbers: tuple[int, ...]
) -> None:
    """Direction, row gradients (through the rows) and weights to 1e-10 in float64, after each of three hyper steps."""
    tree = learning(digits, tmp_path, train__precision="fp64", **changes)
    alone = pool.run(1, pass_states, tree, 3)[0]
    assert bool(alone["unchanged"])
    assert (alone["rows"][-1].std(0) > 0).all()
    assert int(alone["moved"]) == (3 if changes.get("learn__augment") == "shared" else 0)
    for ranks in numbers:
        for result in pool.run(ranks, pass_states, tree, 3):
            for name, value in alone.items():
                torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_curvature_per_rank_is_another_direction(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """On one rank it is the global one; on two it is not, and every rank still has the same weights."""
    alike = []
    for curvature in ("global", "per_rank"):
        tree = learning(digits, tmp_path, train__precision="fp64", hyper__curvature=curvature)
        alike.append((pool.run(1, pass_states, tree, 1)[0], pool.run(2, pass_states, tree, 1)))
    (alone, _), (alone_too, (one, two)) = alike
    torch.testing.assert_close(alone["rows"], alone_too["rows"], rtol=1e-12, atol=1e-12)
    assert (one["figures"] - alone["figures"]).abs().max() > 1e-3
    assert torch.equal(one["weights.head.weight"], two["weights.head.weight"])


def same_batch_both_ways(tree: dict[str, Any]) -> list[torch.Tensor]:
    """The rows after one step on the same batch and the same draws, each way, with the model in eval mode."""
    found = []
    for way in ("separate", "shared"):
        config = check_config(tree | {"hyper": tree["hyper"] | {"way": way}}, "test")
        with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
            parts = build(config, read_manifest(config.data.root), ranks)
            assert parts.hyper is not None
            batch, validation = next(first(parts.loaders.hyper, 1)), next(parts.loaders.hyper_validation.batches(0))
            parts.model.eval()
            renew_validation(parts, parts.hyper, validation, ranks)
            if way == "separate":
                hyper_step(parts, parts.hyper, batch, 0.05, 1, ranks)
            else:
                shared_step(parts, parts.hyper, batch, 0, 0.05, 1, ranks)
            parts.hyper.parameters.state()  # waits for the gradients
            found.append(parts.hyper.parameters.table.second_nP)
    return found


@pytest.mark.parametrize("model", ["convnet", "resnet18"])
@pytest.mark.parametrize("solver", get_args(Solver))
def test_shared_is_separate_where_batchnorm_is_frozen(digits: Path, tmp_path: Path, model: str, solver: str) -> None:
    """The second moments of the rows after one step are the squares of its gradients."""
    tree = learning(
        digits, tmp_path, train__precision="fp64", model__name=model, train__batch_size=20, hyper__solver=solver
    )
    separate, shared = same_batch_both_ways(tree)
    assert (separate != 0).any(0).all()
    # A gradient near 0 has no more digits than the sum that it came from.
    torch.testing.assert_close(shared.sqrt(), separate.sqrt(), rtol=1e-8, atol=1e-12 * float(separate.sqrt().max()))


def test_a_hyper_step_leaves_batchnorm_alone(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    tree = learning(digits, tmp_path, model__name="resnet18", train__batch_size=20)
    assert bool(pool.run(1, pass_states, tree, 1)[0]["unchanged"])


@pytest.mark.parametrize(("ranks", "step"), [(1, 10), (3, 10), (2, 15)])
def test_resume_with_tables_is_bit_exact(pool: RankPool, digits: Path, tmp_path: Path, ranks: int, step: int) -> None:
    """Step 10 is inside the hyper pass, 15 inside the task pass after it; 10 between renewals of the gradient."""
    tree = learning(digits, tmp_path, hyper__validation_every=3)
    folder = pool.run(ranks, run_train, tree)[0]
    final, metrics, labels = weights(folder, 18), lines(folder), (folder / "labels.csv").read_text()
    assert [(row["kind"], row["step"]) for row in metrics if row["kind"] == "hyper"] == [("hyper", 10), ("hyper", 12)]
    cut_back(folder, step)
    pool.run(ranks, run_train, tree)
    assert_equal_states(weights(folder, 18), final)
    assert lines(folder) == metrics
    assert (folder / "labels.csv").read_text() == labels


@pytest.mark.parametrize(
    ("ranks", "changes", "logged"),
    [(1, {}, [10, 12]), (2, {"hyper__solver": "fisher"}, [10, 12]), (2, RECIPE, [12, 16])],
    ids=str,
)
def test_resume_of_a_shared_pass_is_bit_exact(
    pool: RankPool, digits: Path, tmp_path: Path, ranks: int, changes: dict[str, Any], logged: list[int]
) -> None:
    """Step 10 is in the second pass, between renewals: the validation gradient of the step before is still in use."""
    tree = learning(digits, tmp_path, **({"hyper__way": "shared", "hyper__validation_every": 2} | changes))
    folder = pool.run(ranks, run_train, tree)[0]
    last = logged[-1]
    final, metrics, labels = weights(folder, last), lines(folder), (folder / "labels.csv").read_text()
    assert [row["step"] for row in metrics if "cosine" in row] == logged
    cut_back(folder, 10)
    (folder / "labels.csv").unlink()
    pool.run(ranks, run_train, tree)
    assert_equal_states(weights(folder, last), final)
    assert lines(folder) == metrics
    assert (folder / "labels.csv").read_text() == labels


def test_shortened_passes(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """Two global batches of each: 2 task, 2 hyper and 2 task steps, the lr at its peak after one such epoch."""
    tree = learning(digits, tmp_path, train__steps_per_pass=2, checkpoint__every_steps=3, train__log_every=1)
    folder = pool.run(2, run_train, tree)[0]
    final, metrics = weights(folder, 6), lines(folder)
    assert [(row["kind"], row["step"]) for row in metrics] == [
        *[("task", 1), ("task", 2), ("evaluation", 2)],
        *[("hyper", 3), ("hyper", 4), ("task", 5), ("task", 6), ("evaluation", 6)],
    ]
    assert [row["lr"] for row in metrics if row["kind"] == "task"] == pytest.approx([0.025, 0.05, 0.05, 0.025])
    assert [row["epoch"] for row in metrics if row["kind"] == "task"] == [0.5, 1, 1.5, 2]
    evaluation = metrics[-1]
    assert (evaluation["validation_pictures"], evaluation["test_pictures"]) == (200, 200)
    cut_back(folder, 3)
    pool.run(2, run_train, tree)
    assert_equal_states(weights(folder, 6), final)
    assert lines(folder) == metrics
    (folder / "summary.json").unlink()
    with pytest.raises(RankError, match=r"other settings \(train\.steps_per_pass: 2 -> None\)"):
        pool.run(1, run_train, learning(digits, tmp_path, checkpoint__every_steps=3, train__log_every=1))


def test_resume_on_another_number_of_ranks(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    check_four_ranks_then_three(pool, learning(digits, tmp_path, train__precision="fp64"), cut=10, last=18)


def test_labels_and_hyper_lines(digits: Path, tmp_path: Path) -> None:
    folder = run_train(learning(digits, tmp_path))
    manifest = read_manifest(digits)
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(labels_csv.HEADER)
    assert len(rows) == 636
    assert all(row["key"] == manifest.keys[int(row["id"])].as_py() for row in rows)
    assert {row["given_label"] for row in rows} == set(manifest.classes)
    hyper = [row for row in lines(folder) if row["kind"] == "hyper"][-1]
    small = sum(float(row["weight"]) < 0.5 for row in rows) / 636
    changed = sum(row["given_label"] != row["learnt_label"] for row in rows) / 636
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
        _, logits = other.engine.forward(batch.images_BCHW.double())
        loss = torch.nn.functional.cross_entropy(logits, batch.labels_B, label_smoothing=0.1)
        other.engine.backward(loss)
        other.engine.step(other.lr(0))
        for ours, theirs in zip(parts.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def renewed(tree: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, bool, list[torch.Tensor]]:
    """The validation gradient taken in train mode and in eval mode, whether the mode is as before, the statistics."""
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(check_config(tree, "test"), read_manifest(Path(tree["data"]["root"])), ranks)
        hyper = parts.hyper
        assert hyper is not None
        parts.model.train()
        # Each rank's own pictures, so that their running statistics differ from rank to rank.
        task_step(parts, next(parts.loaders.task.batches(0)), 0, ranks)
        validation = next(parts.loaders.hyper_validation.batches(0))
        renew_validation(parts, hyper, validation, ranks)
        found, training = hyper.valid_grad_CD.clone(), parts.model.training
        statistics = [buffer.clone() for buffer in parts.model.buffers()]
        parts.model.eval()
        renew_validation(parts, hyper, validation, ranks)
        return found, hyper.valid_grad_CD, training, statistics


def test_validation_gradient_uses_rank_0s_statistics(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """In eval mode whatever the mode, which it leaves as it was, and without changing a statistic."""
    tree = learning(digits, tmp_path, model__name="resnet18", train__batch_size=20, train__precision="fp64")
    (one, again, training, statistics), (two, _, _, theirs) = pool.run(2, renewed, tree)
    assert training
    assert torch.equal(one, two)
    torch.testing.assert_close(one, again, rtol=1e-12, atol=0)
    assert all(torch.equal(ours, other) for ours, other in zip(statistics, theirs, strict=True))


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
        parameters.state()  # waits for it, and raises its error
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


def test_a_shared_row_skips_bad_samples_and_counts_them(digits: Path, tmp_path: Path) -> None:
    """And the count goes on after a resume."""
    tree = learning(digits, tmp_path, learn__augment="shared", learn__weight=False, learn__soft_label=False)
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        parts = build(check_config(tree, "test"), read_manifest(digits), ranks)
        assert parts.hyper is not None
        parameters, ids = parts.hyper.parameters, next(parts.loaders.hyper.batches(0)).ids_B
        grads = torch.ones(len(ids), 7)
        grads[3, 2] = torch.nan
        before = parameters.shared.value_P.clone()
        parameters.apply_grads(ids, Rows(gate_logit=grads, magnitude_logit=grads), lr=0.1, step=1)
        state = parameters.state()  # waits for the gradients
        assert (parameters.shared.value_P < before).all()
        parameters.bad_rows = 0
        parameters.restore(state)
        assert parameters.bad_rows == 1


def shared_steps(tree: dict[str, Any]) -> list[tuple[int, float]]:
    """Hyper step and rate of each step of the shared row in a run."""
    config, found, plain = check_config(tree, "test"), [], SharedRow.apply_grad

    def noted(row: SharedRow, grad_P: torch.Tensor, *, lr: float, step: int) -> None:
        assert (grad_P != 0).any()
        found.append((step, lr))
        plain(row, grad_P, lr=lr, step=step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedRow, "apply_grad", noted)
        assert train(config)
    return found


@pytest.mark.parametrize("way", ["separate", "shared"])
@pytest.mark.parametrize("solver", ["identity", "fisher"])
def test_a_shared_augmentation_is_learnt_at_renewals_alone(digits: Path, tmp_path: Path, way: str, solver: str) -> None:
    """Every third step from the first of each pass of six, at √3 times the rate of that step."""
    steps = []
    for every in (1, 3):
        changes = {"hyper__way": way, "hyper__solver": solver, "hyper__validation_every": every}
        steps.append(shared_steps(learning(digits, tmp_path / str(every), learn__augment="shared", **changes)))
    always, rarely = (dict(found) for found in steps)
    assert len(always) == 6
    assert list(rarely) == [step for step in always if step % 3 == 1]
    for step, lr in rarely.items():
        assert lr == pytest.approx(math.sqrt(3) * always[step])


def moved_by(every: int, steps: int) -> float:
    """How far a shared row goes by a constant gradient in so many hyper steps, one in `every` of them its own."""
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        row = SharedRow(torch.zeros(1, dtype=torch.float64), ranks, Rmsprop(0.99, 1e-12))
        own = range(1, steps + 1, every)
        for step in own:
            row.apply_grad(torch.ones(1, dtype=torch.float64), lr=0.01 * math.sqrt(steps / len(own)), step=step)
        return -float(row.value_P)


def test_rare_steps_of_a_shared_row_go_as_far_as_all_of_them() -> None:
    """To the few percent by which second moments wane between two steps, once they are what the gradient makes them."""
    for every in (3, 8):
        late = moved_by(every, 4000) - moved_by(every, 2000)
        assert late == pytest.approx(moved_by(1, 4000) - moved_by(1, 2000), rel=0.03)


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (4, 4), (6, 3), (None, 3)])
def test_a_shared_row_keeps_its_pace_in_short_passes(
    digits: Path, tmp_path: Path, steps: int | None, expected: float
) -> None:
    """Every pass begins with a renewal, so E is the pass' steps over its renewals: six steps and two."""
    changes = {"learn__augment": "shared", "hyper__validation_every": 4, "train__steps_per_pass": steps}
    config = check_config(learning(digits, tmp_path, **changes), "test")
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        hyper = build(config, read_manifest(digits), ranks).hyper
        assert hyper is not None
        assert hyper.parameters.shared_every == expected


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
    ("changes", "message"),
    [
        ({"data__imbalance_ratio": 2.0}, r"does not fit this model \(Size mismatch .* for hyper"),
        ({"data__split_seed": 9}, "its rows are of other samples than the train part of this run"),
        ({"learn__augment": "none"}, r"does not fit this model \(Size mismatch .* for hyper"),
    ],
)
def test_a_table_of_another_run_is_refused(digits: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Of another size, of as many other samples, or of other columns: its checkpoints copied into this run."""
    split = {"data__validation_fraction": 0.3}
    mine = run_train(learning(digits, tmp_path, run__name="mine", **split))
    other = run_train(learning(digits, tmp_path, run__name="other", **(split | changes)))
    shutil.rmtree(mine / "checkpoints")
    shutil.copytree(other / "checkpoints", mine / "checkpoints")
    (mine / "summary.json").unlink()
    with pytest.raises(AutodoError, match=message):
        run_train(learning(digits, tmp_path, run__name="mine", **split))


@pytest.mark.parametrize(
    ("fork", "changes", "message"),
    [
        ("plain@6", {"optim__lr": 0.3}, "other settings there"),
        ("plain@7", {}, "no checkpoint of step 7; those there: 5, 6, 10, 12"),
        ("plain@5", {}, "inside an epoch"),
        ("plain", {}, "not of the form RUN@STEP"),
        ("nowhere@5", {}, "no run there"),
        ("plain@12", {}, "at the end of training; choose a checkpoint of an earlier epoch"),
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
        ({"hyper__solver": "cg", "hyper__damping": 1e-5}, "hyper.damping = 1e-05: below optim.weight_decay = 0.0001"),
        ({"hyper__damping": 0.0}, r"hyper.damping = 0.0: input should be greater than 0 \(cg, fisher: μ, added"),
        (
            {"hyper__solver": "fisher", "hyper__damping": 1e-5, "hyper__most_gathered": 99},
            "hyper.damping = 1e-05: below optim.weight_decay",
        ),
        ({"hyper__terms": -1}, "hyper.terms = -1: input should be greater than or equal to 0"),
        ({"hyper__neumann_step": 1e6}, "hyper.neumann_step = 1e[+]06: the series diverges, the largest eigenvalue is"),
        ({"learn__augment": "none", "learn__color": True}, "learn.color = true: a part of learnt augmentation"),
        ({"learn__weight": False, "learn__normalize_weights": True}, "there are no weights; set learn.weight=true"),
    ],
)
def test_what_cannot_learn_is_refused(digits: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodoError, match=message):
        run_train(learning(digits, tmp_path, **changes))


def test_fisher_above_the_gathering_limit_is_cg(
    pool: RankPool, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so; on any number of ranks, so that their numbers agree."""
    few = CONVERGED | {"hyper__most_gathered": 99, "train__precision": "fp64"}
    cg, fisher = learning(digits, tmp_path, **few), learning(digits, tmp_path, **few | {"hyper__solver": "fisher"})
    rows = [pool.run(ranks, pass_states, tree, 1)[0]["rows"] for tree, ranks in ((fisher, 1), (fisher, 2), (cg, 1))]
    assert torch.equal(rows[0], rows[2])
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-10, atol=1e-10)
    pass_states(fisher, 1)
    assert "a batch of 100 is more than hyper.most_gathered = 99; cg takes its place" in caplog.text


def test_compat_sets_what_changes_numbers(digits: Path, tmp_path: Path) -> None:
    """A setting that is given comes before; the best epoch by test is in the summary; nothing moves the bias."""
    tree = learning(digits, tmp_path, train__evaluate_every=1) | {"compat": "autodo2021"}
    config = check_config(tree, "test")
    assert config.learn.smoothing == 0.05
    assert (config.hyper.solver, config.hyper.terms, config.hyper.neumann_step) == ("neumann", 5, 0.01)
    given = check_config(tree | {"learn": tree["learn"] | {"smoothing": 0.2}}, "test")
    assert given.learn.smoothing == 0.2
    assert check_config(yaml.safe_load(config.to_yaml()), "test") == config
    with pytest.raises(AutodoError, match="hyper = 5: input should be"):
        check_config(tree | {"hyper": 5}, "test")
    folder = run_train(tree)
    summary = json.loads((folder / "summary.json").read_text())
    tested = [row["test_accuracy"] for row in lines(folder) if row["kind"] == "evaluation"]
    assert summary["test_accuracy_best_epoch"] == max(tested)
    assert (weights(folder, 18)[".hyper.valid_grad"][:, -1] == 0).all()


def two_passes(tree: dict[str, Any], overlapping: bool) -> tuple[torch.Tensor, int]:
    """All rows, and that which is shared, after two passes of hyper steps, each batch's rows fetched one step before,
    or when they are needed.

    Also how many ids the last batch of the first pass shares with the first of the second.
    """
    config = check_config(tree, "test")
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        hyper = parts.hyper
        assert hyper is not None
        parts.model.eval()
        renew_validation(parts, hyper, next(parts.loaders.hyper_validation.batches(0)), ranks)
        batches = [list(parts.loaders.hyper.batches(epoch)) for epoch in range(2)]
        for step, batch in enumerate(itertools.chain(*batches), start=1):
            taken = batch if overlapping else replace(batch, next_ids_B=None)
            renewed = (step - 1) % hyper.validation_every == 0
            hyper_step(parts, hyper, taken, 0.05, step, ranks, renewed=renewed)
        ends = [set().union(*ranks.gather(batch.ids_B.tolist())) for batch in (batches[0][-1], batches[1][0])]
        return torch.cat([all_rows(hyper, ranks).flatten(), hyper.parameters.shared.value_P]), len(ends[0] & ends[1])


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"learn__augment": "shared", "hyper__validation_every": 3}])
def test_rows_fetched_ahead_are_those_of_the_plain_order(
    pool: RankPool, digits: Path, tmp_path: Path, changes: dict[str, Any], ranks: int
) -> None:
    """Bit for bit, an id that is in two batches in a row (the end of a pass and the start of the next) included."""
    tree = learning(digits, tmp_path, **changes)
    plain, ahead = (pool.run(ranks, two_passes, tree, how)[0] for how in (False, True))
    assert torch.equal(plain[0], ahead[0])
    assert plain[1] > 0


def test_a_table_that_cannot_fit_is_refused(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings that help, before a byte of it is made."""
    monkeypatch.setattr("autodo_dist.build.memory_of", lambda device, ranks: 100_000.0)
    with pytest.raises(AutodoError, match=r"row table: .* does not fit into .*; try .*hyper.table_dtype=bfloat16"):
        run_train(learning(digits, tmp_path))

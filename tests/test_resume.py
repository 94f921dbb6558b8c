"""A resume is the run that would have been: shown with every part of the state left out once, and from every step."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import RankPool, hang_up
from test_autodo import learning
from test_nonfinite import poisoned
from test_train import assert_equal_states, cut_back, lines, run_train, weights
from torch import nn
from torch.distributed.tensor import DTensor

from autodo_dist import build
from autodo_dist.data.loader import Batch
from autodo_dist.data.manifest import read_manifest
from autodo_dist.hyperparameters import Hyperparameters
from autodo_dist.load_config import check_config
from autodo_dist.method.hypergrad import Rows
from autodo_dist.models import Classifier
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.parallel.checkpoint_header import read_header
from autodo_dist.progress import Progress, resume, tensors
from autodo_dist.run import Run
from autodo_dist.steps import Trained

MEASURED = {"seconds", "seconds_total"}  # of progress and summary.json: times, which no two runs share


def small_model(name: str, classes: int, seed: int, image_size: int) -> Classifier:
    """Every kind of state and of randomness that a model has, at the price of milliseconds a step. For 8 pixels."""
    assert image_size == 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.CELU(), nn.Dropout(0.1)
        return Classifier(nn.Sequential(*layers), nn.Linear(16, classes))


@contextmanager
def one_bad_row(hyper_step: int) -> Iterator[None]:
    """A row gradient that is NaN, in this hyper step."""
    apply_grads = Hyperparameters.apply_grads

    def spoiled(self: Hyperparameters, ids_B: torch.Tensor, grads: Rows, *, lr: float, step: int) -> None:
        if step == hyper_step:
            assert grads.weight_logit is not None
            weight_logit = grads.weight_logit.clone()
            weight_logit[0] = torch.nan
            grads = replace(grads, weight_logit=weight_logit)
        apply_grads(self, ids_B, grads, lr=lr, step=step)

    with patch.object(Hyperparameters, "apply_grads", spoiled):
        yield


def run_small(tree: dict[str, Any]) -> Path:
    """Train the small model; a batch of the first epoch and a row of the second have no finite gradient."""
    with patch.object(build, "build_model", small_model), poisoned({(0, 3): "loss"}), one_bad_row(2):
        return run_train(tree)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but times: its last checkpoint, lines of metrics, labels and summary."""
    path = checkpoint.complete(folder / "checkpoints")[-1]
    progress, summary = read_header(path).progress, json.loads((folder / "summary.json").read_text())
    tensors = weights(folder, checkpoint.step_of(path))
    return {
        "tensors": {name: (str(value.dtype), value.shape, value.numpy().tobytes()) for name, value in tensors.items()},
        "progress": {name: value for name, value in progress.items() if name not in MEASURED},
        "lines": lines(folder),
        "labels": (folder / "labels.csv").read_text(),
        "summary": {name: value for name, value in summary.items() if name not in MEASURED},
    }


def small(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """`learning` at 8 pixels."""
    return learning(digits, folder, **{"data__image_size": 8, "data__crop": "whole"} | changes)


FOLLOWING = {"learn__ensembling": 0.7, "learn__ensembling_from": 0.5}
FOLDED = {"learn__clean_folds": 3, "train__logit_adjustment": 1.0} | FOLLOWING

# --- nothing may be left out


@dataclass(frozen=True)
class Break:
    """Where a run is broken off: right after the save of `step`. foreign: its rows are those of other samples."""

    step: int
    foreign: bool = False


# In the second hyper pass, between renewals of the validation gradient; in a task pass; before the summary alone.
BREAKS = (Break(20), Break(15), Break(30), Break(20, foreign=True))


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings in which everything that is saved plays a part: six task steps, then twice six hyper and six task steps.

    All rows share the gates; the summary of a reproduction tells the best epoch by test; a batch is left out.
    """
    tree = small(
        digits,
        tmp_path_factory.mktemp("unbroken"),
        train__epochs=3,
        train__on_nonfinite="rollback",
        train__average=0.9,
        learn__augment="shared",
        train__steps_per_pass=6,
        hyper__validation_every=3,
        **FOLDED,
    )
    run_small(tree | {"compat": "autodo2021"})
    return tree | {"compat": "autodo2021"}


@contextmanager
def restoring_all_but(component: str | None, foreign: bool) -> Iterator[list[Path]]:
    """Have a resume keep what the new process made of one component; gives the checkpoints that were restored."""
    restore, done = checkpoint.restore, []

    @torch.no_grad()
    def but_one(path: Path, state: dict[str, Any], ranks: comm.Ranks) -> dict[str, Any]:
        made = {name: local(leaf).clone() for name, leaf in checkpoint.leaves(state)}
        progress = restore(path, state, ranks)
        if foreign:
            state["hyper"]["ids"] += 1
        restored = dict(checkpoint.leaves(state))
        if component in restored:
            local(restored[component]).copy_(made[component])
        elif component is not None:
            name = component.removeprefix("progress.")
            progress[name] = asdict(Progress())[name]
        done.append(path)
        return progress

    with patch.object(checkpoint, "restore", but_one):
        yield done


def local(leaf: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in its own memory."""
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf.detach()


def resumed(tree: dict[str, Any], folder: Path, broken: Break, component: str | None) -> Any:
    """What comes of a run that is broken off and resumed without one component; an error's words if it is one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(tree["run"]["root"]), folder)
    run = folder / "run"
    cut_back(run, broken.step)
    (run / "labels.csv").unlink()
    (run / "nonfinite.jsonl").unlink()  # a second list of the batches that are left out
    with restoring_all_but(component, broken.foreign) as done:
        try:
            return outcome(run_small(tree | {"run": {"root": str(folder), "name": "run"}}))
        except Exception as error:
            assert done, "the resume did not come as far as to leave something out"
            torch.distributed.destroy_process_group()
            return f"{type(error).__name__}: {error}"


def components(folder: Path) -> list[str]:
    """Every tensor and every field of the progress, as a real checkpoint has them."""
    path = checkpoint.complete(folder / "checkpoints")[-1]
    tensors = [name.removeprefix(".") for name in weights(folder, checkpoint.step_of(path))]
    return tensors + [f"progress.{field.name}" for field in fields(Progress) if field.name not in MEASURED]


@pytest.mark.slow(reason="45 runs, one for each component of the state")
def test_each_component_left_out_is_noticed(unbroken: dict[str, Any], tmp_path: Path) -> None:
    """With nothing left out the resumed run is the unbroken one; without any one component it is not."""
    whole = Path(unbroken["run"]["root"]) / "run"
    expected = {}
    for broken in BREAKS:
        expected[broken] = resumed(unbroken, tmp_path / "run", broken, None)
        if broken.foreign:
            assert str(expected[broken]).startswith("AutodoError: checkpoint: its rows are of other samples")
        else:
            assert expected[broken] == outcome(whole), broken
    found = {}
    for name in components(whole):
        caught = (it for it in BREAKS if resumed(unbroken, tmp_path / "run", it, name) != expected[it])
        found[name] = next(caught, None)
    print(f"{len(found)} components left out:", *(f"  {name}: {broken}" for name, broken in found.items()), sep="\n")
    assert [name for name, broken in found.items() if broken is None] == []


# --- from every step


@pytest.mark.parametrize(("way", "passes"), [("separate", 2), ("shared", 1)])
def test_a_resume_from_any_step_is_bit_exact(digits: Path, tmp_path: Path, way: str, passes: int) -> None:
    """From each of an epoch's steps, of both kinds of pass; lines between steps and at each, gradients of two ages."""
    tree = small(
        digits,
        tmp_path / "unbroken",
        checkpoint__every_steps=1,
        hyper__way=way,
        hyper__validation_every=2,
        train__log_every=3,
        train__on_nonfinite="rollback",
        train__steps_per_pass=6,
        **FOLDED if way == "shared" else FOLLOWING,
    )
    expected = outcome(run_small(tree))
    last = 6 + 6 * passes
    for step in range(6, last + 1):
        assert resumed(tree, tmp_path / "run", Break(step), None) == expected, step


# --- on another number of ranks


def saved_again(tree: dict[str, Any], step: int) -> None:
    """Resume, and save at once as checkpoint `step`."""
    config = check_config(tree, "test")
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build.build(config, read_manifest(config.data.root), ranks)
        progress, sums = resume(config, parts, ranks)
        progress.sums = ranks.gather(sums.tolist())
        checkpoint_save.save(config.folder / "checkpoints", step, tensors(parts), asdict(progress), ranks)


@pytest.mark.slow(reason="200 steps, made twice")
def test_an_elastic_resume_is_the_same_run(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """The state is equal to the bit right after it, on fewer ranks and on more; then 150 steps to 1e-5.

    At the usual learning rate, in float32. What differs is the order of summands: of pictures over the ranks.
    """
    tree = learning(
        digits,
        tmp_path,
        data__image_size=8,
        data__crop="whole",
        train__batch_size=40,
        train__epochs=14,
        train__log_every=5,
        train__evaluate_every=14,
        hyper__way="shared",
        hyper__validation_every=2,
        checkpoint__every_steps=20,
        learn__ensembling=0.7,
        learn__ensembling_from=0.1,
    )
    folder = pool.run(2, run_train, tree)[0]
    expected = lines(folder)
    cut_back(folder, 60)
    for ranks in (1, 3):
        pool.run(ranks, saved_again, tree, 61)
        assert_equal_states(weights(folder, 61), weights(folder, 60))
        shutil.rmtree(checkpoint.folder(folder / "checkpoints", 61))
    pool.run(3, run_train, tree)
    found = lines(folder)
    assert [row["step"] for row in found] == [*range(5, 211, 5), 210]
    assert found[:12] == expected[:12]
    gaps = [abs(row["loss"] - other["loss"]) for row, other in zip(found[12:-1], expected[12:-1], strict=True)]
    print(f"losses {expected[12]['loss']:.3f} … {expected[-2]['loss']:.3f} differ by at most {max(gaps):.1e}")
    assert 0 < max(gaps) < 1e-5


# --- on many other numbers of ranks, with crashes between

Seen = dict[int, list[int]]  # position in the epoch -> the ids of this rank's part of the batch
EVERY, STEPS = 3, 53  # steps between saves; steps of 12 pictures in the epoch


class Crash(Exception):
    """Of one rank."""


def train_until(tree: dict[str, Any], rank: int, step: int) -> Seen:
    """Train until a rank falls away right after a step, or to the end; what this rank really trained on.

    Its peers notice by themselves.
    """
    seen, note = {}, Run.note

    def noted(run: Run, batch: Batch, trained: Trained) -> None:
        seen[run.progress.position] = batch.ids_B.tolist()
        note(run, batch, trained)
        if (run.ranks.rank, run.progress.step + 1) == (rank, step):
            raise Crash

    with patch.object(Run, "note", noted):
        try:
            run_train(tree)
        except (Crash, RuntimeError):  # torch's DistBackendError is one
            assert step
            hang_up()
            torch.distributed.destroy_process_group()
    return seen


def global_batches(parts: list[Seen]) -> dict[int, list[int]]:
    """The batches that all ranks trained on, their parts in the order of ranks."""
    positions = set.intersection(*(set(part) for part in parts))
    return {position: [id_ for part in parts for id_ in part[position]] for position in sorted(positions)}


@pytest.mark.slow(reason="22 starts on changing ranks")
def test_many_numbers_of_ranks_and_crashes_in_one_epoch(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """The same ids in the same global batches; steps that are done again are done with the same ids."""
    tree = learning(
        digits,
        tmp_path,
        data__image_size=8,
        data__crop="whole",
        train__batch_size=12,
        train__epochs=1,
        train__log_every=1,
        optim__warmup_epochs=0,
        hyper__start_epoch=0,
        hyper__way="shared",
        checkpoint__every_steps=EVERY,
    )
    alone = tree | {"run": {"root": str(tmp_path), "name": "alone"}}
    expected = global_batches(pool.run(1, train_until, alone, 0, 0))
    assert sorted(expected) == list(range(STEPS))
    assert len({id_ for batch in expected.values() for id_ in batch}) == 12 * STEPS

    seed = 6
    draw = random.Random(seed)
    folder, numbers, done, history = tmp_path / "run", [], [], {}
    while True:
        ranks = draw.choice([number for number in (1, 2, 3, 4) if number not in numbers[-1:]])
        saved = checkpoint.complete(folder / "checkpoints")
        first = checkpoint.step_of(saved[-1]) if saved else 0
        crash = first + draw.randint(1, 2 * EVERY + 1)
        parts = pool.run(ranks, train_until, tree, draw.randrange(ranks), crash)
        numbers.append(ranks)
        found = global_batches(parts)
        # A peer may lose its connection in the last step.
        assert [*range(first, min(crash - 1, STEPS))] == [*found][: crash - 1 - first], numbers
        assert found == {position: expected[position] for position in found}, numbers
        assert all(set(ids) <= set(expected[position]) for part in parts for position, ids in part.items()), numbers
        done += found
        history |= found
        if (folder / "summary.json").is_file():
            break
    print(f"seed {seed}: ranks {numbers}; {len(done)} steps done, {len(done) - STEPS} of them again")
    assert len(numbers) > 20
    assert len(done) > STEPS
    assert history == expected
    assert [row["step"] for row in lines(folder)] == [*range(1, STEPS + 1), STEPS]
    for row, other in zip(lines(folder)[:-1], lines(tmp_path / "alone"), strict=False):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)

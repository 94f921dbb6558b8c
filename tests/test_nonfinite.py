"""Batches whose loss or gradient is not finite: the run stops, or goes on as if they had never been there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import RankError, RankPool
from test_autodo import learning
from test_train import assert_close_runs, assert_equal_states, cut_back, lines, run_train, settings, weights
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode

from autodo_dist import steps
from autodo_dist.build import build
from autodo_dist.data import order
from autodo_dist.data.loader import Batch, Loader
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.nonfinite import NotFinite, Watch, recorded, without
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.parallel.engine import held
from autodo_dist.progress import tensors
from autodo_dist.steps import Trained, renew_validation, shared_step, task_step

Bad = dict[tuple[int, int], str]  # (epoch, position in its task pass) -> what is not finite: loss or gradient
SOURCE, STEPS = Loader.batches, 6


def last_id(loader: Loader, epoch: int, position: int) -> int:
    """The last id of a global batch: on several ranks it is not rank 0's."""
    ids = order.shuffled(order.present(loader.ids, loader.absent, epoch), loader.seed, epoch, "task")
    return int(ids[(position + 1) * loader.batch_size - 1])


@contextmanager
def poisoned(bad: Bad) -> Iterator[None]:
    """One picture of NaN in a bad batch, on whichever rank; or a gradient that is NaN on the last rank alone.

    The root of 0 is 0, and its derivative times 0 is NaN.
    """
    forward, seed, now = steps.train_forward, steps.seed_dropout, [0]

    def batches(loader: Loader, epoch: int, start: int = 0) -> Iterator[Batch]:
        for position, batch in enumerate(SOURCE(loader, epoch, start), start):
            if loader.pass_ == "task" and bad.get((epoch, position)) == "loss":
                hit_B = batch.ids_B == last_id(loader, epoch, position)
                batch.images_BCHW[hit_B] = torch.nan
            yield batch

    def seed_dropout(parts: Any, done: int, ranks: comm.Ranks) -> None:
        now[0] = done
        seed(parts, done, ranks)

    def train_forward(parts: Any, piece: Any, weight_B: Any, ranks: comm.Ranks) -> steps.Forward:
        found = forward(parts, piece, weight_B, ranks)
        if bad.get(divmod(now[0], STEPS)) == "gradient" and ranks.rank == ranks.ranks - 1:
            return replace(found, loss=found.loss + (0 * found.loss).sqrt())
        return found

    with (
        patch.object(Loader, "batches", batches),
        patch.object(steps, "seed_dropout", seed_dropout),
        patch.object(steps, "train_forward", train_forward),
    ):
        yield


def run_poisoned(tree: dict[str, Any], bad: Bad) -> Path:
    with poisoned(bad):
        return run_train(tree)


def never_had(tree: dict[str, Any], bad: Bad, folder: Path) -> None:
    """The same training step by step, without the bad batches; its end is saved in `folder`."""
    config = check_config(tree, "test")
    torch.set_num_threads(1)
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        parts.model.train()
        task, hyper, hyper_steps = parts.loaders.task, parts.hyper, 0
        assert task.steps == STEPS
        for epoch in range(config.train.epochs):
            validations = parts.loaders.validations(epoch)
            for position, batch in enumerate(task.batches(epoch)):
                batch, done = replace(batch, next_ids_B=None), epoch * STEPS + position
                shared = hyper is not None and epoch >= hyper.start_epoch
                if shared:
                    renew_validation(parts, hyper, next(validations), ranks)
                    hyper_steps += 1
                if (epoch, position) in bad:
                    continue
                if shared:
                    shared_step(parts, hyper, batch, done, hyper.lr(done), hyper_steps, ranks)
                else:
                    task_step(parts, batch, done, ranks)
        checkpoint_save.save(folder / "checkpoints", config.train.epochs * STEPS, tensors(parts), {}, ranks)


@pytest.mark.parametrize(
    ("ranks", "bad", "every", "log_every"),
    [
        (1, {(0, 2): "loss"}, 5, 4),  # before there is a checkpoint
        (1, {(0, 4): "gradient"}, 5, 100),  # it would be saved right away
        (3, {(0, 5): "loss", (1, 0): "gradient"}, 5, 100),  # last and first of a pass
        (3, {(1, 2): "loss", (1, 3): "loss"}, None, 1),  # one after the other, and lines of metrics about no step
    ],
)
def test_rolled_back_run_is_the_run_that_never_had_the_batch(
    pool: RankPool, digits: Path, tmp_path: Path, ranks: int, bad: Bad, every: int | None, log_every: int
) -> None:
    tree = settings(digits, tmp_path, checkpoint__every_steps=every, train__on_nonfinite="rollback")
    tree["train"]["log_every"] = log_every
    folder = pool.run(ranks, run_poisoned, tree, bad)[0]
    pool.run(ranks, never_had, tree, bad, tmp_path / "oracle")
    assert_equal_states(weights(folder, 12), weights(tmp_path / "oracle", 12))
    faults = recorded(folder)
    assert [fault.place for fault in faults] == [(epoch, "task", position) for epoch, position in bad]
    assert [fault.step for fault in faults] == [epoch * STEPS + position + 1 for epoch, position in bad]
    assert [len(fault.ids) for fault in faults] == [1 if what == "loss" else 100 for what in bad.values()]
    assert [fault.loss == "nan" for fault in faults] == [what == "loss" for what in bad.values()]
    header = json.loads((checkpoint.folder(folder / "checkpoints", 12) / "checkpoint.json").read_text())
    assert header["progress"]["left_out"] == [list(fault.place) for fault in faults]
    assert header["progress"]["step"] == 12
    steps_of_lines = [row["step"] for row in lines(folder) if row["kind"] == "task"]
    assert steps_of_lines == {1: list(range(1, 13)), 4: [4, 6, 10, 12], 100: [6, 12]}[log_every]
    log = (folder / "logs" / "rank-00000.log").read_text()
    assert log.count("and on without this batch") == len(bad)
    assert ("the loss is nan, not finite for ids " in log) == ("loss" in bad.values())
    assert ("the gradient is not finite (loss " in log) == ("gradient" in bad.values())


def test_ids_are_those_of_the_bad_pictures(digits: Path, tmp_path: Path) -> None:
    """Checked against the order of the pass, and in the message of a run that stops."""
    tree = settings(digits, tmp_path)
    with pytest.raises(AutodoError) as caught:
        run_poisoned(tree, {(1, 1): "loss"})
    torch.distributed.destroy_process_group()
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        parts = build(check_config(tree, "test"), read_manifest(digits), ranks)
        id_ = last_id(parts.loaders.task, 1, 1)
    folder = tmp_path / "run"
    assert str(caught.value) == (
        f"step 8: the loss is nan, not finite for ids {id_}; nothing since {folder}/checkpoints/step-00000006 was "
        "saved; lower optim.lr (in another run.name), look at those pictures, or set train.on_nonfinite=rollback and "
        "run the same command again"
    )
    assert [checkpoint.step_of(path) for path in checkpoint.complete(folder / "checkpoints")] == [5, 6]
    assert not (folder / "nonfinite.jsonl").exists()
    run_poisoned(tree | {"train": tree["train"] | {"on_nonfinite": "rollback"}}, {(1, 1): "loss"})
    assert [fault.ids for fault in recorded(folder)] == [[id_]]


def test_every_rank_stops(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    def refused(bad: Bad) -> str:
        with pytest.raises(RankError) as caught:
            pool.run(3, run_poisoned, settings(digits, tmp_path, train__log_every=1), bad)
        return str(caught.value)

    assert "step 3: the loss is nan, not finite for ids " in refused({(0, 2): "loss"})
    message = refused({(0, 3): "gradient"})
    assert "step 4: the gradient is not finite (loss " in message
    assert message.split("batch of ids ")[1].split(";")[0].count(",") == 10  # ten of a hundred, and "…"


def test_ranks_and_kills_change_nothing(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """1 and 3 ranks agree to 1e-10. Killed before the next save, when no checkpoint knows of the second batch, runs go
    on without it all the same: bit for bit on as many ranks, to 1e-10 on others.
    """
    bad: Bad = {(0, 1): "loss", (1, 2): "loss"}
    folders = {}
    for ranks in (1, 3):
        tree = settings(digits, tmp_path / str(ranks), train__precision="fp64", train__on_nonfinite="rollback")
        folders[ranks] = pool.run(ranks, run_poisoned, tree, bad)[0]
    assert_close_runs(folders[3], folders[1])
    assert recorded(folders[3]) == recorded(folders[1])
    final, metrics = weights(folders[3], 12), lines(folders[3])
    for ranks, folder in folders.items():
        cut_back(folder, 6)
        faults = (folder / "nonfinite.jsonl").read_text()
        tree["run"]["root"] = str(tmp_path / str(ranks))
        pool.run(3, run_poisoned, tree, bad)
        assert (folder / "nonfinite.jsonl").read_text() == faults
        assert (folder / "logs" / "rank-00000.log").read_text().count("and on without this batch") == 2
    assert_equal_states(weights(folders[3], 12), final)
    assert lines(folders[3]) == metrics
    assert_close_runs(folders[1], folders[3])


@pytest.mark.parametrize(("ranks", "bad"), [(1, {(1, 2): "loss", (1, 3): "loss"}), (2, {(1, 0): "gradient"})])
def test_rows_come_back_too(pool: RankPool, digits: Path, tmp_path: Path, ranks: int, bad: Bad) -> None:
    """AutoDO in its default way: rows that are fetched ahead, bad row gradients that may not be counted for good."""
    tree = learning(digits, tmp_path, hyper__way="shared", hyper__most_bad_rows=0, train__on_nonfinite="rollback")
    folder = pool.run(ranks, run_poisoned, tree, bad)[0]
    pool.run(ranks, never_had, tree, bad, tmp_path / "oracle")
    assert [fault.place for fault in recorded(folder)] == [(epoch, "task", position) for epoch, position in bad]
    assert_equal_states(weights(folder, 12), weights(tmp_path / "oracle", 12))


def test_a_run_that_diverges_stops_after_so_many(digits: Path, tmp_path: Path) -> None:
    tree = settings(digits, tmp_path, optim__lr=1e30, train__on_nonfinite="rollback", train__most_rollbacks=2)
    with pytest.raises(AutodoError, match=r"step \d+: .*, or raise train\.most_rollbacks = 2: 2 batches were left"):
        run_train(tree)
    folder = tmp_path / "run"
    assert len(recorded(folder)) == 2
    assert len({fault.place for fault in recorded(folder)}) == 2
    for path in checkpoint.complete(folder / "checkpoints"):
        for value in weights(folder, checkpoint.step_of(path)).values():
            assert not isinstance(value, torch.Tensor) or value.isfinite().all()


@pytest.mark.parametrize("text", ["{", "[1]\n", '{"step": 3}\n'])
def test_a_list_that_cannot_be_read_is_one_line(digits: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "nonfinite.jsonl").write_text(text)
    with pytest.raises(AutodoError, match=r"nonfinite\.jsonl: cannot be read \(.*\); restore it from a copy, or"):
        run_train(settings(digits, tmp_path))


@given(st.integers(1, 8), st.data())
def test_batches_name_the_next_that_is_made(steps: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, steps))
    left_out = data.draw(st.sets(st.integers(0, steps - 1)))
    whole = [
        Batch(torch.empty(1), torch.empty(1), torch.tensor([i]), torch.empty(1), torch.tensor([i + 1]))
        for i in range(start, steps - 1)
    ]
    whole += [Batch(torch.empty(1), torch.empty(1), torch.tensor([steps - 1]), torch.empty(1), None)][: steps - start]
    got = list(without(iter(whole), start, left_out))
    assert [batch is None for batch in got] == [position in left_out for position in range(start, steps)]
    made = [batch for batch in got if batch is not None]
    following = [batch.ids_B for batch in made[1:]] + [None]
    for batch, ids in zip(made, following, strict=bool(made)):
        assert (batch.next_ids_B is None) == (ids is None)
        assert ids is None or torch.equal(batch.next_ids_B, ids)


class NoReading(TorchDispatchMode):
    """Raises where a value would go from the device to Python, for which a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def alone() -> comm.Ranks:
    return comm.Ranks(0, 1, torch.device("cpu"))


def watch_over(module: torch.nn.Module, ranks: comm.Ranks) -> Watch:
    return Watch(lambda: get_total_norm(held(module)), ranks)


def trained(loss_B: torch.Tensor) -> Trained:
    figures = torch.zeros(len(steps.FIGURES), dtype=torch.float64)
    figures[0] = loss_B.sum()
    return Trained(figures, loss_B, torch.zeros(len(loss_B), 10))


def test_a_step_is_watched_without_reading_from_the_device() -> None:
    watch = watch_over(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), alone())
    with NoReading():
        watch.note(1, (0, "task", 0), torch.arange(4), trained(torch.ones(4)))
    with pytest.raises(AssertionError), NoReading():
        float(torch.ones(()))


@pytest.mark.parametrize("where", ["weight", "running_var"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_of_the_model_is_enough(where: str, value: float) -> None:
    """Statistics can overflow while every loss is finite, and would spoil the checkpoint. Large ones are well."""
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        norm = torch.nn.BatchNorm1d(2)
        watch = watch_over(norm, ranks)
        getattr(norm, where).data[0] = 1e18
        watch.note(1, (0, "task", 0), torch.arange(4), trained(torch.ones(4)))
        watch.look()
        watch.note(2, (0, "task", 1), torch.arange(4), trained(torch.ones(4)))
        getattr(norm, where).data[1] = value
        watch.note(3, (0, "task", 2), torch.arange(4), trained(torch.ones(4)))
        watch.note(4, (0, "task", 3), torch.arange(4, 8), trained(torch.full((4,), torch.nan)))
        with pytest.raises(NotFinite, match=r"step 3: the gradient is not finite \(loss 1\), batch of ids 0, 1, 2, 3"):
            watch.look()


def first_bad_on_ranks() -> str:
    """Rank 1's loss is infinite in step 2, rank 0's in step 3; no weight ever is. What a rank is told."""
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        watch = watch_over(torch.nn.Linear(1, 1), ranks)
        for step in (1, 2, 3):
            loss_B = torch.ones(3)
            loss_B[1] = torch.inf if step == 3 - ranks.rank else 1.0
            watch.note(step, (0, "task", step - 1), torch.arange(3) + 10 * ranks.rank, trained(loss_B))
        try:
            watch.look()
        except NotFinite as found:
            return str(found)
        return "nothing"


def test_ranks_agree_on_the_first(pool: RankPool) -> None:
    assert pool.run(2, first_bad_on_ranks) == ["step 2: the loss is inf, not finite for ids 11"] * 2

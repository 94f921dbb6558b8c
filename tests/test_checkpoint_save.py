"""Saves that go on while training does: what they keep, which memory they take, how they end."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from ranks import RankPool

from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.parallel.checkpoint_rows import RowReader
from autodo_dist.parallel.checkpoint_save import Saver
from autodo_dist.parallel.row_table import RowTable

ROWS, WIDTH, SAVES = 1_000, 50, 8


class Gate:
    """The writing of a save, held back until `open`; what it was given to write."""

    def __init__(self) -> None:
        self.open, self.written, self._save = threading.Event(), list[Any](), checkpoint_save.save

    def __call__(self, root: Path, step: int, state: dict[str, Any], *rest: Any) -> None:
        assert self.open.wait(60)
        self.written.append(state)
        self._save(root, step, state, *rest)


def changed_after_each_save(root: Path, staged: bool) -> list[int]:
    """Rows and weights are k at save number k, and −1 right after the call, before a byte is written.

    Gives where the staged rows lay in memory.
    """
    beside = root.parent / "metrics.jsonl"
    beside.touch()
    gate = Gate()
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        ids = np.arange(ROWS, dtype=np.int64)
        table = RowTable(ids, lambda mine: torch.zeros(len(mine), WIDTH), ranks, Rmsprop(0.9, 1e-6))
        weight = torch.zeros(7, 3)
        values = [table.value_nP, table.second_nP, table.touched_n, weight]
        with Saver(root, ranks) as saver, patch.object(checkpoint_save, "save", gate):
            if not staged:
                saver._stager.stage = lambda state: state  # type: ignore[method-assign]
            for number in range(1, SAVES + 1):
                for value in values:
                    value.fill_(number)
                progress = {"number": number}
                state = {"rows": table.state(), "model": {"weight": weight}}
                saver.save(number, state, progress, keep=99, best=None, beside=beside)
                progress["number"] = -1
                for value in values:
                    value.fill_(-1)
                gate.open.set()
                assert saver.wait() == ""
                gate.open.clear()
        return [int(state["rows"]["value"].to_local().data_ptr()) for state in gate.written]


def saved_values(root: Path) -> dict[int, set[float]]:
    """By step: every value that its tensors hold."""
    found = {}
    for path in checkpoint.complete(root):
        reader = RowReader(path, contents_of=None)
        assert "rows.value" in reader.names
        found[checkpoint.step_of(path)] = {
            value for name in reader.names for value in reader.whole(name).unique().tolist()
        }
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_changed_after_the_call_is_not_saved(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    root = tmp_path / "checkpoints"
    places = pool.run(ranks, changed_after_each_save, root, True)
    assert saved_values(root) == {number: {float(number)} for number in range(1, SAVES + 1)}
    for mine in places:
        assert len(mine) == SAVES
        assert len(set(mine)) == 1  # one buffer for all of them


def test_the_test_above_can_fail(pool: RankPool, tmp_path: Path) -> None:
    """Without the buffer, later values are saved."""
    root = tmp_path / "checkpoints"
    pool.run(1, changed_after_each_save, root, False)
    assert saved_values(root) == {number: {-1.0} for number in range(1, SAVES + 1)}


def beside_training(root: Path) -> list[str]:
    """What happens, in order: a save is held back while this thread's collectives go on; the next one waits for it."""
    beside = root.parent / "metrics.jsonl"
    beside.touch()
    events, gate = list[str](), Gate()
    state = {"weight": torch.ones(3)}
    with (
        comm.process_group(comm.place(), torch.device("cpu")) as ranks,
        Saver(root, ranks) as saver,
        patch.object(checkpoint_save, "save", gate),
    ):
        saver.save(1, state, {}, keep=2, best=None, beside=beside)
        for _ in range(5):
            assert ranks.sum(torch.tensor(ranks.rank)).item() == sum(range(ranks.ranks))
        events.append(f"trained, {len(checkpoint.complete(root))} saved")
        ranks.barrier()
        gate.open.set()
        for step in (2, 3, 4):
            saver.save(step, state, {}, keep=2, best=1, beside=beside)
            # The save before is whole on every rank when the next one begins.
            events.append(f"{step - 1} is whole: {checkpoint.folder(root, step - 1).is_dir()}")
    events.append("left: " + ", ".join(str(checkpoint.step_of(path)) for path in checkpoint.complete(root)))
    return events


def test_training_goes_on_beside_a_save(pool: RankPool, tmp_path: Path) -> None:
    for events in pool.run(3, beside_training, tmp_path / "checkpoints"):
        assert events == [
            "trained, 0 saved",
            "1 is whole: True",
            "2 is whole: True",
            "3 is whole: True",
            "left: 1, 3, 4",  # the two newest, and the best
        ]


class Failure(Exception):
    """Of a rank."""


def fails_beside_a_save(root: Path) -> float:
    """Seconds until rank 0, which alone saves and fails, leaves; the others wait for it."""
    start = time.monotonic()
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        with patch.object(checkpoint_save, "PATIENCE", 0.5), suppress(Failure), Saver(root, ranks) as saver:
            if ranks.main:
                saver.save(1, {"weight": torch.ones(3)}, {}, keep=2, best=None, beside=root.parent)
                raise Failure
        waited = time.monotonic() - start
        ranks.barrier()
    return waited


def test_a_rank_that_fails_does_not_wait_for_ever(pool: RankPool, tmp_path: Path) -> None:
    waited = pool.run(2, fails_beside_a_save, tmp_path / "checkpoints")[0]
    assert 0.5 <= waited < 30
    assert checkpoint.complete(tmp_path / "checkpoints") == []


def test_a_rank_that_fails_has_its_save_ended(tmp_path: Path) -> None:
    gate = Gate()
    with (
        comm.process_group(comm.Place(), torch.device("cpu")) as ranks,
        patch.object(checkpoint_save, "save", gate),
        suppress(Failure),
        Saver(tmp_path / "checkpoints", ranks) as saver,
    ):
        saver.save(1, {"weight": torch.ones(3)}, {}, keep=2, best=None, beside=tmp_path)
        threading.Timer(0.5, gate.open.set).start()
        raise Failure
    assert len(checkpoint.complete(tmp_path / "checkpoints")) == 1


def test_an_error_that_is_not_the_disks_comes_up_at_the_next_look(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with (
        comm.process_group(comm.Place(), torch.device("cpu")) as ranks,
        Saver(tmp_path / "checkpoints", ranks) as saver,
    ):
        saver.save(1, {"rate": 0.1}, {}, keep=2, best=None, beside=tmp_path / "metrics.jsonl")
        with pytest.raises(TypeError, match="rate is no tensor but float"):
            saver.wait()

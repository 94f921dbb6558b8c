"""A crash at every operation of a save: a resume finds a right checkpoint, after a kill and after a power cut."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crashes import Disk, Operation, Tree, crashes, recorded, write_tree
from ranks import RankPool

from autodo_dist.errors import AutodoError
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.metrics import LineFile
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.parallel.checkpoint_header import read_header
from autodo_dist.parallel.row_table import RowTable

CPU = torch.device("cpu")
CHECKPOINTS, METRICS, SAVED, KEEP = "run/checkpoints", "run/metrics.jsonl", "checkpoint 3 is saved", 2


def model_and_table(value: float, ranks: comm.Ranks) -> dict[str, Any]:
    """A model and a table, of which every rank has a part."""
    table = RowTable(np.arange(5), lambda mine: torch.full((len(mine), 500), value), ranks, Rmsprop(0.9, 1e-6))
    return {"model": {"weight": torch.full((50, 40), value)}, "rows": table.state()}


def start_and_save(base: Path, step: int, value: float, keep_lines: int, ranks: comm.Ranks) -> None:
    """What a start and its first save do to the files of a run: lines of metrics and a checkpoint that counts them."""
    (base / "run").mkdir(parents=True, exist_ok=True)
    metrics = LineFile(base / METRICS, keep_lines) if ranks.main else None
    if metrics is not None:
        metrics.write({"step": step})
        metrics.write({"step": step, "value": value})
    progress = {"step": step, "lines": metrics.lines if metrics is not None else 0}
    checkpoint_save.save(base / CHECKPOINTS, step, model_and_table(value, ranks), progress, ranks, base / METRICS)
    if metrics is not None:
        metrics.write({"step": step, "more": "of steps that will be done again"})
        metrics.close()


def make_before(base: Path, steps: list[int]) -> None:
    with comm.process_group(comm.place(), CPU) as ranks:
        for number, step in enumerate(steps):
            start_and_save(base, step, float(step), 2 * number, ranks)


def make_recorded(base: Path, keep_lines: int) -> list[Operation]:
    """The operations of this rank in a start that saves checkpoint 3 and prunes."""
    with comm.process_group(comm.place(), CPU) as ranks, recorded(base) as log:
        start_and_save(base, 3, 3.5, keep_lines, ranks)
        if ranks.main:
            log.mark(SAVED)
        checkpoint.prune(base / CHECKPOINTS, KEEP, None, ranks)
    return log.operations


@dataclass(frozen=True)
class Case:
    """A save over what was there before. older: steps that a crash in its course may bring back."""

    before: tuple[int, ...]
    older: frozenset[int | None]
    left: bool = False  # a folder of a save that broke off


CASES = {
    "first": Case((), frozenset([None])),
    "one more": Case((1, 2), frozenset([2])),
    "after a save that broke off": Case((1, 2), frozenset([2]), left=True),
    "once more": Case((1, 2, 3), frozenset([3])),
    "once more, the only one": Case((3,), frozenset([3])),
}


@dataclass(frozen=True)
class Save:
    """A save that was recorded on two ranks: the disk before, the operations, the tree after."""

    case: Case
    before: Tree
    log: list[Operation]
    after: Tree


@pytest.fixture(scope="module")
def saves(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Save]:
    found = {}
    for name, case in CASES.items():
        base = tmp_path_factory.mktemp("recorded") / "runs"
        base.mkdir()
        if case.before:
            pool.run(2, make_before, base, case.before)
        if case.left:
            shutil.copytree(base / CHECKPOINTS / "step-00000002", base / CHECKPOINTS / "step-00000003.partial")
        before = Disk(base).killed()
        parts = pool.run(2, make_recorded, base, 2 * len(case.before))
        assert all(any(operation.kind == "write" for operation in part) for part in parts)
        found[name] = Save(case, before, sorted(itertools.chain(*parts)), Disk(base).killed())
    return found


def disk_of(tree: Tree, scratch: Path) -> Disk:
    """A disk on which a tree is durable."""
    shutil.rmtree(scratch, ignore_errors=True)
    write_tree(scratch, tree)
    return Disk(scratch)


def files(tree: Tree, step: int) -> Tree:
    """The files of a checkpoint, by name."""
    start = f"{CHECKPOINTS}/{checkpoint.folder(Path(), step).name}/"
    return {path.removeprefix(start): data for path, data in tree.items() if path.startswith(start)}


class Judge:
    """What a resume would find in the trees that crashes in the course of a save leave; each is looked at once."""

    def __init__(self, save: Save, scratch: Path, ranks: comm.Ranks) -> None:
        self.save, self.scratch, self.ranks = save, scratch, ranks
        self.seen: dict[int, str] = {}

    def find(self, tree: Tree) -> str:
        """Which checkpoint is found: old or new, and of which step; or what is wrong with it."""
        key = hash(frozenset(tree.items()))
        if key not in self.seen:
            shutil.rmtree(self.scratch, ignore_errors=True)
            write_tree(self.scratch, tree)
            self.seen[key] = self._find(tree)
        return self.seen[key]

    def _find(self, tree: Tree) -> str:
        try:
            path = checkpoint.newest(self.scratch / CHECKPOINTS, self.ranks)
        except AutodoError as error:
            return f"none: {error}"
        if path is None:
            return "old None"
        step, found = checkpoint.step_of(path), {file.name: file.read_bytes() for file in path.iterdir()}
        age = "new" if step == 3 and found == files(self.save.after, 3) else "old"
        if age == "old" and found != files(self.save.before, step):
            return f"wrong {step}"
        counted = read_header(path).progress["lines"]
        lines, expected = ((it.get(METRICS) or b"").splitlines()[:counted] for it in (tree, self.save.after))
        return f"{age} {step}" if len(lines) == counted and lines == expected else f"without its lines {step}"

    def faults(self, log: list[Operation]) -> Iterator[str]:
        """What is not as it should be, after which operation."""
        renamed = max(i for i, operation in enumerate(log) if operation.target.endswith("step-00000003"))
        saved = [operation.path for operation in log].index(SAVED)
        old, new = {f"old {step}" for step in self.save.case.older}, {"new 3"}
        for done, how, tree in crashes(disk_of(self.save.before, self.scratch), log):
            found = self.find(tree)
            if found not in (old if done <= renamed else new if done > saved or how == "killed" else old | new):
                yield f"{how} before {log[done] if done < len(log) else 'the end'}: found {found}"


def test_a_replay_is_what_really_happened(saves: dict[str, Save], tmp_path: Path) -> None:
    """So nothing that was done to a file is missing in the logs."""
    for name, save in saves.items():
        disk = disk_of(save.before, tmp_path / "disk")
        for operation in save.log:
            disk.apply(operation)
        assert disk.killed() == save.after, name


def test_a_crash_at_any_operation_leaves_a_right_checkpoint(saves: dict[str, Save], tmp_path: Path) -> None:
    """The new one from its rename on (after a power cut: at the latest when the save returns), else the one before."""
    with comm.process_group(comm.Place(), CPU) as ranks:
        for name, save in saves.items():
            judge = Judge(save, tmp_path / "tree", ranks)
            cases = sum(1 for _ in crashes(disk_of(save.before, tmp_path / "disk"), save.log))
            faults = list(judge.faults(save.log))
            print(f"{name}: {len(save.log)} operations, {cases} crashes, {len(judge.seen)} trees, {len(faults)} wrong")
            assert faults == [], name


def test_each_fsync_is_needed(saves: dict[str, Save], tmp_path: Path) -> None:
    """So the test above can fail: it does without any one of them, in one of two cases at least."""
    needed: dict[str, list[str]] = {}
    with comm.process_group(comm.Place(), CPU) as ranks:
        for name in ("first", "one more"):
            judge, log = Judge(saves[name], tmp_path / "tree", ranks), saves[name].log
            seen = Counter[str]()
            for i, operation in enumerate(log):
                if operation.kind == "fsync":
                    seen[operation.path] += 1
                    faults = needed.setdefault(f"{operation.path}, {seen[operation.path]}", [])
                    faults += itertools.islice(judge.faults(log[:i] + log[i + 1 :]), 1)
    assert len(needed) == 11
    assert [which for which, faults in needed.items() if not faults] == []


def test_the_next_save_needs_no_help(saves: dict[str, Save], tmp_path: Path) -> None:
    """After a kill at any operation: it is saved, and what the killed one left goes away."""
    done, base = 0, tmp_path / "runs"
    with comm.process_group(comm.Place(), CPU) as ranks:
        for save in saves.values():
            left = (tree for _, how, tree in crashes(disk_of(save.before, base), save.log) if how == "killed")
            for tree in {frozenset(tree.items()): tree for tree in left}.values():
                disk_of(tree, base)
                checkpoint.newest(base / CHECKPOINTS, ranks)
                start_and_save(base, 3, 3.5, 0, ranks)
                checkpoint.prune(base / CHECKPOINTS, KEEP, None, ranks)
                kept = checkpoint.complete(base / CHECKPOINTS)
                assert [checkpoint.step_of(path) for path in kept] == ([2, 3] if 2 in save.case.before else [3])
                assert checkpoint.newest(base / CHECKPOINTS, ranks) == kept[-1]
                assert not [*base.rglob("*.partial"), *base.rglob("*.replaced")]
                done += 1
    print(f"saved again after {done} crashes")

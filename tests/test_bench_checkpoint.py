"""The benchmark of checkpoints: that it measures saves of the state that it says, and its bar."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import RankPool

from autodo_dist.parallel import checkpoint, comm
from benchmarks.checkpoint import RANKS, P, Stall, figures, stall


def one(folder: Path, table_bytes: int, rounds: int) -> Stall:
    return stall(folder, comm.place(), table_bytes, rounds)


def test_saves_are_of_the_whole_table_and_kept_one_at_a_time(pool: RankPool, tmp_path: Path) -> None:
    found = pool.run(RANKS, one, tmp_path, 1_000_000, 3)
    rows = 1_000_000 // (8 * P + 8)
    assert {each.state_bytes for each in found} == {rows * (8 * P + 8)}
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path / "checkpoints")] == [2]
    assert [len(each.begin) for each in found] == [3, 3]


def test_the_slowest_rank_counts_and_the_first_save_does_not() -> None:
    found = [Stall([9, 2, 2], [50, 2, 3], [60, 20, 20], 10**9), Stall([9, 1, 1], [50, 4, 2], [60, 10, 30], 10**9)]
    by_name = {row["name"]: row for row in figures(found)}
    ratio = by_name["stall of a later save beside a copy"]
    assert (ratio["value"], ratio["bar"], ratio["holds"]) == (pytest.approx(1.75), "<= 1.50", False)
    assert by_name["a save until it is on the disk"]["value"] == 30

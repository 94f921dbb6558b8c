"""The benchmark of the sharded table: what it counts, and its bars."""

from __future__ import annotations

import pytest
import torch
from ranks import RankPool

from autodo_dist.parallel import comm
from autodo_dist.parallel.comm import Place
from benchmarks import row_table
from benchmarks.row_table import CPU, B, P, at_least, build, make_bench, ratio


def counted(count: int, apart: int) -> dict[str, float]:
    return row_table.count_bytes(comm.place(), count, apart)


def test_bytes_are_those_of_rows_and_ids_that_leave_their_rank(pool: RankPool) -> None:
    """Ids of two tables with the same owners; one rank sends nothing."""
    small, large = (pool.run(2, counted, 512 * times, times) for times in (1, 4))
    assert small == large
    total = sum(one["sent"] for one in small) - 2 * 2 * 8  # two counts a rank and step
    strangers = total / (2 * P * 4 + 16)  # ids of a step, over both ranks, that are another's
    assert strangers * 8 == pytest.approx(round(strangers * 8), abs=1e-6)  # a whole number over eight steps
    assert 0.8 * B < strangers < 1.2 * B
    assert [one["share"] for one in small] == [1, 1]
    assert row_table.count_bytes(Place(), 512, 1) == {"sent": 0, "share": 1}


def test_a_step_moves_the_rows_of_its_batch_and_a_copy_none() -> None:
    with comm.process_group(Place(), CPU) as ranks:
        bench = make_bench(build(1000, ranks), 2, 0)
        before = bench.table.value_nP.clone()
        bench.plain()
        assert torch.equal(bench.table.value_nP, before)
        bench.step()
    assert (bench.table.value_nP != before).any(1).sum() == B
    assert before.shape[1] == P == 1015


def test_bars() -> None:
    assert at_least("a", 99.0, "times", 100.0) == {
        "name": "a",
        "value": 99.0,
        "unit": "times",
        "bar": ">= 100.00",
        "holds": False,
    }
    assert ratio([2.0, 9.0, 3.0], [1.0, 1.0, 1.0]) == pytest.approx(3.0)

"""The sharded table against one dense table and dense RMSprop, on real ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankError, RankPool
from threads import ThreadRanks, over_threads

from autodo_dist.errors import AutodoError
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.parallel import comm
from autodo_dist.parallel.row_table import RowTable, find

RULE = Rmsprop(0.9, 1e-6)
CPU = torch.device("cpu")


def sparse_ids(count: int) -> np.ndarray:
    """Train ids have gaps: validation and test ids lie between them, and have no row."""
    return np.arange(count, dtype=np.int64) * 3 + 1


def start_values(ids: np.ndarray, width: int) -> torch.Tensor:
    return torch.from_numpy(np.sin(ids[:, None] * (1.0 + np.arange(width))))


def batches(count: int, steps: int, size: int, width: int) -> list[tuple[np.ndarray, torch.Tensor]]:
    """Global batches of ids, duplicates among them, and their row gradients."""
    generator = np.random.default_rng(count)
    ids = sparse_ids(count)
    return [
        (generator.choice(ids, size), torch.from_numpy(generator.standard_normal((size, width)))) for _ in range(steps)
    ]


def dense(count: int, steps: int, size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.optim.RMSprop over the whole table, zero gradients where a row is not in the batch."""
    ids = sparse_ids(count)
    value = torch.nn.Parameter(start_values(ids, width))
    optimizer = torch.optim.RMSprop([value], alpha=RULE.decay, eps=RULE.eps)
    for step, (batch, grads) in enumerate(batches(count, steps, size, width), start=1):
        value.grad = torch.zeros_like(value).index_add_(0, torch.from_numpy(np.searchsorted(ids, batch)), grads)
        optimizer.param_groups[0]["lr"] = 0.1 / step
        optimizer.step()
    return value.detach(), optimizer.state[value]["square_avg"]


def sharded(count: int, steps: int, size: int, width: int, save_to: Path | None = None) -> tuple[torch.Tensor, ...]:
    """The same on this rank's share of each batch; a second fetch by every rank of its own ids."""
    with comm.process_group(comm.place(), CPU) as ranks:
        ids = sparse_ids(count)
        table = RowTable(ids, lambda mine: start_values(mine, width), ranks, RULE)
        held = len(table.value_nP)
        for step, (batch, grads) in enumerate(batches(count, steps, size, width), start=1):
            mine = np.array_split(np.arange(size), ranks.ranks)[ranks.rank]
            table.apply_grads(torch.from_numpy(batch[mine]), grads[mine], lr=0.1 / step, step=step)
        wanted = torch.from_numpy(np.random.default_rng(ranks.rank).permutation(np.repeat(ids, 2))[: count + 1])
        got = table.fetch(wanted)
        if save_to is not None:
            dcp.save(table.state(), checkpoint_id=save_to)
        return wanted, got, table.second_nP.clone(), torch.tensor(held)


@pytest.mark.parametrize(("ranks", "count"), [(1, 7), (2, 7), (3, 40), (4, 41), (4, 3)])
def test_equal_to_a_dense_table(pool: RankPool, ranks: int, count: int) -> None:
    """Uneven last blocks and more ranks than rows among the cases."""
    steps, size, width = 60, 10, 5
    value, second = dense(count, steps, size, width)
    ids = sparse_ids(count)
    results = pool.run(ranks, sharded, count, steps, size, width)
    for wanted, got, _, _ in results:
        expected = value[np.searchsorted(ids, wanted.numpy())]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # A row's second moment decays only when it is touched again; the last touch brings it up to date.
    held = [int(rows) for _, _, _, rows in results]
    assert sum(held) == count
    assert max(held) <= -(-count // ranks)
    touched = np.searchsorted(ids, np.unique(batches(count, steps, size, width)[-1][0]))
    ours = torch.cat([part for _, _, part, _ in results])
    torch.testing.assert_close(ours[touched], second[touched], rtol=1e-12, atol=1e-12)


def rounded(count: int, steps: int, size: int, width: int) -> torch.Tensor:
    """The values of every row of a bfloat16 table after some steps."""
    with comm.process_group(comm.place(), CPU) as ranks:
        ids = sparse_ids(count)
        table = RowTable(ids, lambda mine: start_values(mine, width).to(torch.bfloat16), ranks, RULE)
        for step, (batch, grads) in enumerate(batches(count, steps, size, width), start=1):
            mine = np.array_split(np.arange(size), ranks.ranks)[ranks.rank]
            table.apply_grads(torch.from_numpy(batch[mine]), grads[mine], lr=0.1 / step, step=step)
        assert table.second_nP.dtype == torch.bfloat16
        return table.fetch(torch.from_numpy(ids))


def test_bfloat16_rows_are_alike_on_any_number_of_ranks(pool: RankPool) -> None:
    """The rounding is drawn by step and id; sums of duplicates may differ in their last bits, so there are none."""
    one = pool.run(1, rounded, 400, 12, 10, 5)[0]
    assert one.dtype == torch.float32
    exact = dense(400, 12, 10, 5)[0]
    assert 0 < float((one - exact).abs().max()) < 0.1
    for ranks in (2, 3):
        for other in pool.run(ranks, rounded, 400, 12, 10, 5):
            assert torch.equal(other, one)


def load(count: int, width: int, path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with comm.process_group(comm.place(), CPU) as ranks:
        table = RowTable(sparse_ids(count), lambda mine: torch.zeros(len(mine), width).double(), ranks, RULE)
        state = table.state()
        dcp.load(state, checkpoint_id=path)
        table.restore(state)
        return table.value_nP, table.second_nP, table.touched_n


def test_saved_on_four_ranks_loaded_on_any(pool: RankPool, tmp_path: Path) -> None:
    count, width = 41, 5
    results = pool.run(4, sharded, count, 20, 10, width, tmp_path / "table")
    second = torch.cat([part for _, _, part, _ in results])
    value = dense(count, 20, 10, width)[0]
    touched = None
    for ranks in (1, 2, 3, 5):
        parts = pool.run(ranks, load, count, width, tmp_path / "table")
        whole = [torch.cat([part[index] for part in parts]) for index in range(3)]
        torch.testing.assert_close(whole[0], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(whole[1], second)
        assert touched is None or torch.equal(whole[2], touched)
        touched = whole[2]


@pytest.mark.parametrize("count", [40, 43, 3])
def test_a_table_of_another_size_in_a_checkpoint_is_refused(pool: RankPool, tmp_path: Path, count: int) -> None:
    """By whichever rank finds that its block does not fit, before a value is taken."""
    pool.run(2, sharded, 41, 1, 10, 5, tmp_path / "table")
    with pytest.raises(RankError, match="Size mismatch"):
        pool.run(2, load, count, 5, tmp_path / "table")


def fetch_stranger() -> None:
    with comm.process_group(comm.place(), CPU) as ranks:
        RowTable(sparse_ids(9), lambda mine: start_values(mine, 2), ranks, RULE).fetch(torch.tensor([1, 2]))


def test_an_id_without_a_row_is_named(pool: RankPool) -> None:
    with pytest.raises(RankError, match="id 2 has no row; only the 9 train ids"):
        pool.run(2, fetch_stranger)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[list[int], int, list[list[list[int]]]]:
    """Ids with gaps, a number of ranks, and steps: each rank's batch, of any length, with duplicates."""
    ids = sorted(draw(st.sets(st.integers(0, 200), min_size=1, max_size=30)))
    ranks = draw(st.integers(1, 8))
    batch = st.lists(st.sampled_from(ids), max_size=8)
    return ids, ranks, draw(st.lists(st.lists(batch, min_size=ranks, max_size=ranks), min_size=1, max_size=4))


@settings(deadline=None, max_examples=150)
@given(exchanges(), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_exchange_is_one_dense_table(
    case: tuple[list[int], int, list[list[list[int]]]], width: int, seed: int
) -> None:
    """Whatever N, ranks, batches and duplicates: every fetch gives what one dense table with dense RMSprop holds."""
    listed, ranks, steps = case
    ids, generator = np.array(listed, np.int64), np.random.default_rng(seed)
    grads = [[torch.from_numpy(generator.standard_normal((len(mine), width))) for mine in step] for step in steps]
    value = torch.nn.Parameter(start_values(ids, width))
    optimizer = torch.optim.RMSprop([value], lr=0.1, alpha=RULE.decay, eps=RULE.eps)
    expected = []
    for batch, gradients in zip(steps, grads, strict=True):
        rows = [torch.from_numpy(find(ids, np.array(mine, np.int64))) for mine in batch]
        expected.append([value.detach()[mine] for mine in rows])
        value.grad = torch.zeros_like(value).index_add_(0, torch.cat(rows), torch.cat(gradients))
        optimizer.step()

    def rank_of(group: ThreadRanks) -> list[torch.Tensor]:
        table = RowTable(ids, lambda mine: start_values(mine, width), group, RULE)
        fetched = []
        for number, (batch, gradients) in enumerate(zip(steps, grads, strict=True), start=1):
            mine = torch.tensor(batch[group.rank], dtype=torch.int64)
            fetched.append(table.fetch(mine))
            table.apply_grads(mine, gradients[group.rank], lr=0.1, step=number)
        return [*fetched, table.value_nP]

    *fetched, blocks = zip(*over_threads(ranks, rank_of), strict=True)
    for got, wanted in zip(fetched, expected, strict=True):
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(blocks), value.detach(), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.sets(st.integers(0, 60)), st.lists(st.integers(-3, 66)))
def test_find(have: set[int], wanted: list[int]) -> None:
    ids, asked = np.array(sorted(have), np.int64), np.array(wanted, np.int64)
    if set(wanted) <= have:
        assert ids[find(ids, asked)].tolist() == wanted
    else:
        with pytest.raises(AutodoError, match="has no row"):
            find(ids, asked)

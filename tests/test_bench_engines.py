"""The benchmark of engines: that every way trains the same, and that rows and bars follow from given times."""

from __future__ import annotations

import importlib.util
import inspect
from itertools import islice

import pytest
import torch
from ranks import RankPool
from test_engines import fresh

from autodo_dist.parallel import comm
from benchmarks.engines import RANKS, WAYS, Turn, bare, begin, figures, turn
from benchmarks.hyper_step import CPU, Case

SMALL = Case("convnet", 10, 16, 10)
STEPS = 22  # beyond one look of the watch


def trained(way: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    with comm.process_group(comm.place(), CPU) as ranks:
        state, steps = begin(SMALL, way, ranks)
        losses = [float(loss) for loss in islice(steps, STEPS)]
        return losses, {name: value.clone() for name, value in state().items()}


def timed() -> Turn:
    with comm.process_group(comm.place(), CPU) as ranks:
        return turn(begin(SMALL, "bare", ranks)[1], 2, 0.0, ranks)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "bare"])
def test_every_way_trains_as_the_bare_loop(pool: RankPool, way: str) -> None:
    if WAYS[way] and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    expected = pool.run(RANKS, trained, "bare")
    found = pool.run(RANKS, fresh, trained, way)
    for (losses, state), (_, wanted) in zip(found, expected, strict=True):
        assert losses[-1] < losses[0]
        assert state.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6, msg=name)


def test_the_bare_loop_can_be_read_at_once() -> None:
    assert len(inspect.getsource(bare).splitlines()) <= 40


def test_a_turn_takes_time_and_memory(pool: RankPool) -> None:
    for one in pool.run(RANKS, timed):
        assert min(one.clock, one.processor, one.memory) > 0


def test_rows_and_bars_of_given_times() -> None:
    """Ratios are of one round; the slower rank's clock counts, the mean of processors, the larger last memory."""
    rounds = [(1.0, 1.0), (2.0, 2.0), (10.0, 10.0)]
    times = {"bare": (1.0, 1.0), "ddp": (1.06, 1.0), "deepspeed, stage 3": (2.0, 3.0)}
    turns = {
        way: [
            [Turn(k * clock, k * processor, 5.0 + k), Turn(k * clock / 2, 1.02 * k * processor, k)] for k, _ in rounds
        ]
        for way, (clock, processor) in times.items()
    }
    rows = {row["name"]: row for row in figures(SMALL, turns)}
    ending = ", convnet at 16, batch 10"
    assert rows["step of bare, clock" + ending]["value"] == pytest.approx(2000)
    assert rows["step of bare, processor" + ending]["value"] == pytest.approx(2020)
    late, good = rows["ddp beside bare, clock" + ending], rows["ddp beside bare, processor" + ending]
    assert (late["value"], late["bar"], late["holds"]) == (pytest.approx(1.06), "<= 1.05", False)
    assert (good["value"], good["holds"]) == (pytest.approx(1.0), True)
    assert rows["deepspeed, stage 3 beside bare, processor" + ending]["value"] == pytest.approx(3.0)
    assert rows["deepspeed, stage 3 beside bare, processor" + ending]["bar"] is None
    assert rows["memory of a rank, ddp" + ending]["value"] == 15.0

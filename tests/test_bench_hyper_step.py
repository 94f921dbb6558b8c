"""The benchmark of the hyper steps: its double backward, what its counts say of the project's steps, its table."""

from __future__ import annotations

import pytest
import torch

from autodo_dist.parallel import comm
from benchmarks import hyper_step
from benchmarks.hyper_step import ALPHA, CPU, EVERYTHING, LABELS, TERMS, Bench, Case, figure, interleaved, set_up, table

SMALL = Case("convnet", 4, 16, 3)


def test_the_reference_finds_the_gradients_of_the_hyper_step() -> None:
    """In float64; with a large ε RMSprop's step is in proportion to the gradient."""
    same = {"hessian": "exact", "neumann_step": ALPHA, "terms": TERMS, "eps": 1e6}
    with comm.process_group(comm.Place(), CPU) as ranks:
        ours, theirs = (set_up(SMALL, EVERYTHING, same, ranks, "fp64") for _ in range(2))
        start = ours.hyper.parameters.table.value_nP.clone()
        ours.separate()
        theirs.reference()
        for bench in (ours, theirs):
            bench.hyper.parameters.state()  # waits for the gradients
    moved, expected = (bench.hyper.parameters.table.value_nP - start for bench in (ours, theirs))
    assert (moved != 0).any(1).sum() == SMALL.batch
    assert all((part != 0).any() for part in ours.hyper.parameters.layout.split(moved).values())
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    assert all(parameter.grad is None for parameter in theirs.parts.model.parameters())


def test_counts_are_forwards_and_backwards() -> None:
    """Without λ^A `separate` is two forwards, and `shared` adds one to `plain`; a renewal every other step saves half.

    But for the last layer, which is small here.
    """
    with comm.process_group(comm.Place(), CPU) as ranks:
        bench, rarely = (set_up(SMALL, LABELS, {"validation_every": every}, ranks) for every in (1, 2))

        def count(one: Bench, name: str) -> float:
            return hyper_step.operations(getattr(one, name), one.hyper.validation_every)

        forward = hyper_step.operations(lambda: bench.parts.model(bench.train.images_BCHW))
        plain = count(bench, "plain")
        assert 2.5 < plain / forward < 3  # no gradient of the pictures
        assert count(bench, "separate") / forward == pytest.approx(2, rel=0.01)
        assert (count(bench, "shared") - plain) / forward == pytest.approx(1, rel=0.01)
        assert (count(rarely, "shared") - plain) / forward == pytest.approx(0.5, rel=0.02)


def test_rounds_rotate_and_the_first_one_is_not_counted() -> None:
    order: list[str] = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_missed_bar_stays_in_the_table() -> None:
    rows = [figure("a", 2.067, "F", 2.05), figure("b", 2.05, "F", 2.05), figure("c", 526.7, "MiB")]
    assert rows[0] == {"name": "a", "value": 2.067, "unit": "F", "bar": "<= 2.05", "holds": False}
    assert table(rows).splitlines()[2:] == [
        "| a | 2.067 F | <= 2.05 | **missed** |",
        "| b | 2.050 F | <= 2.05 | yes |",
        "| c | 527 MiB |  |  |",
    ]


def test_memory_is_that_of_two_steps() -> None:
    """In this process, whose peak may be older; at least it counts something."""
    assert hyper_step.memory(SMALL, "separate", torch.get_num_threads()) >= 0
    assert hyper_step.resident("VmHWM") >= hyper_step.resident("VmRSS") > 0

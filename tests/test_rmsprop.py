"""Lazy RMSprop on touched rows, against torch's dense RMSprop fed zeros for the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodo_dist.method.rmsprop import Rmsprop, sum_duplicates, touch
from autodo_dist.method.schedule import warmup_cosine

ROWS, WIDTH, STEPS = 40, 3, 1500


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("rule", [Rmsprop(), Rmsprop(decay=0.9, eps=1e-2)], ids=["defaults", "other"])
def test_touched_rows_move_as_in_dense_rmsprop(rule: Rmsprop, dtype: torch.dtype, tolerance: float) -> None:
    """1,500 steps of a learning rate that changes each time, up to three rows a step; one row waits 1,400 steps."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    second, touched = torch.zeros_like(value), torch.zeros(ROWS, dtype=torch.int64)
    dense = value.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([dense], alpha=rule.decay, eps=rule.eps)
    last = dict.fromkeys(range(ROWS), 0)
    for step in range(1, STEPS + 1):
        count = int(torch.randint(4, (), generator=generator))
        rows = torch.randperm(ROWS - 1, generator=generator)[:count]  # not the last row
        if step in (50, 1450):
            rows = torch.tensor([ROWS - 1, 3])
        sizes = 10.0 ** torch.randint(-4, 2, (len(rows), 1), generator=generator)
        grads = (sizes * torch.randn(len(rows), WIDTH, generator=generator, dtype=torch.float64)).to(dtype)
        lr = warmup_cosine(step, peak=0.05, warmup=100, total=STEPS + 100)
        before = value.clone()
        touch(value, second, touched, rows, rows, grads, lr=lr, step=step, rule=rule)
        last.update(dict.fromkeys(rows.tolist(), step))
        others = [row for row in range(ROWS) if row not in rows.tolist()]
        assert torch.equal(value[others], before[others])
        dense.grad = torch.zeros_like(dense).index_copy_(0, rows, grads)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        torch.testing.assert_close(value, dense.detach(), rtol=tolerance, atol=tolerance)
    assert touched.tolist() == list(last.values())
    waited = torch.tensor([rule.decay ** (STEPS - row) for row in touched.tolist()], dtype=torch.float64)
    caught_up = waited[:, None] * second
    dense_second = optimizer.state[dense]["square_avg"].double()
    torch.testing.assert_close(caught_up, dense_second, rtol=10 * tolerance, atol=1e-30)


def test_defaults_are_torchs() -> None:
    torch_rule = torch.optim.RMSprop([torch.zeros(1)]).defaults
    assert (Rmsprop().decay, Rmsprop().eps) == (torch_rule["alpha"], torch_rule["eps"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), max_size=40))
def test_duplicates_are_summed(asked: list[tuple[int, float, float]]) -> None:
    """Against a dictionary that adds in the same order: the same bits."""
    expected: dict[int, tuple[float, float]] = {}
    for row, a, b in asked:
        old = expected.get(row, (0.0, 0.0))
        expected[row] = (old[0] + a, old[1] + b)
    given_rows = torch.tensor([row for row, _, _ in asked], dtype=torch.int64)
    given_grads = torch.tensor([[a, b] for _, a, b in asked], dtype=torch.float64).reshape(-1, 2)
    rows, grads = sum_duplicates(given_rows, given_grads)
    assert rows.tolist() == sorted(expected)
    assert grads.shape == (len(rows), 2)
    assert [tuple(grad) for grad in grads.tolist()] == [expected[row] for row in rows.tolist()]

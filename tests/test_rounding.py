"""Stochastic rounding: right on average, the same on any number of ranks, and rows that move as in float32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodo_dist.method.losses import soft_logit_start
from autodo_dist.method.rmsprop import Rmsprop, touch
from autodo_dist.method.rounding import random_words, to_bfloat16


def neighbours(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 values next to float32 ones, the one nearer to 0 first; equal where it is one itself."""
    below = (value.view(torch.int32) & -0x10000).view(torch.float32)
    above = torch.nextafter(below.to(torch.bfloat16), torch.copysign(torch.tensor(math.inf), value).to(torch.bfloat16))
    return below, torch.where(below == value, value, above.float())


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), st.integers(0, 2**62))
def test_the_result_is_a_neighbour(values: list[float], word: int) -> None:
    value = torch.tensor(values)
    rounded = to_bfloat16(value, torch.full(value.shape, word)).float()
    below, above = neighbours(value)
    assert ((rounded == below) | (rounded == above)).all()


@pytest.mark.parametrize("value", [4.55, -4.55, 1e-3, 0.30001, 7.03125, 0.0])
def test_right_on_average(value: float) -> None:
    """40,000 roundings: the share rounded away from 0 is the distance from the nearer one, within 5 deviations."""
    samples = 40_000
    exact = torch.full((samples, 1), value)
    rounded = to_bfloat16(exact, random_words(3, torch.arange(samples), 1)).float()
    below, above = (side[0, 0] for side in neighbours(exact))
    share = float((exact[0, 0] - below) / (above - below)) if above != below else 0.0
    away = float((rounded != below).float().mean())
    assert abs(away - share) <= 5 * math.sqrt(share * (1 - share) / samples)


def test_infinite_stays_infinite() -> None:
    ends = torch.tensor([math.inf, -math.inf, math.nan])
    rounded = to_bfloat16(ends, torch.full((3,), 0xFFFF))
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2].isnan()


def test_words_are_uniform_and_depend_on_step_id_and_column() -> None:
    words = random_words(1, torch.arange(4000), 8)
    for bit in range(64):
        share = float(((words >> bit) & 1).float().mean())
        assert abs(share - 0.5) <= 5 * 0.5 / math.sqrt(words.numel()), bit
    assert len(words.unique()) == words.numel()
    assert torch.equal(random_words(1, torch.tensor([7, 3]), 8), words[[7, 3]])
    assert not (random_words(2, torch.arange(4000), 8) == words).any()


def drift(dtype: torch.dtype, rows: int, steps: int, lr: float) -> torch.Tensor:
    """How far rows of soft logits move under constant unit gradients, from ImageNet's start value."""
    start = torch.full((rows, 1), soft_logit_start(1000, 0.1)).to(dtype)
    value, second, touched = start.clone(), torch.zeros_like(start), torch.zeros(rows, dtype=torch.int64)
    all_rows = torch.arange(rows)
    for step in range(1, steps + 1):
        touch(value, second, touched, all_rows, all_rows, torch.ones(rows, 1), lr=lr, step=step, rule=Rmsprop())
    return value.double() - start.double()


def test_the_mean_drift_is_float32s() -> None:
    """Steps of at most a tenth of the spacing at the start value, 0.031: to nearest, no row would move."""
    spacing, rows, steps = 2.0**-5, 4000, 200
    lr = spacing / 100  # the first step is ten times the rate
    assert soft_logit_start(1000, 0.1) == pytest.approx(4.55, abs=0.01)
    exact, rounded = (drift(dtype, rows, steps, lr) for dtype in (torch.float32, torch.bfloat16))
    assert float(exact.std()) == 0
    deviation = float(rounded.std())
    assert spacing / 2 < deviation < spacing * math.sqrt(steps)  # rounding is a random walk of single spacings
    # The second moment is rounded too; its error of 2^-9 a step moves the rate by less than a per cent.
    tolerance = 5 * deviation / math.sqrt(rows) + 0.01 * abs(float(exact.mean()))
    assert abs(float(rounded.mean() - exact.mean())) <= tolerance
    assert abs(float(exact.mean())) > 10 * tolerance

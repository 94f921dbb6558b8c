"""Split and distortion: counts as documented, clean validation and test, the same for the same seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodo_dist.data.manifest import PARTS
from autodo_dist.data.split import Split, make_split, split_off

FRACTIONS = st.floats(0, 1, exclude_max=True)


@st.composite
def packed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels, parts and number of classes of a packed data set; classes and parts may be empty."""
    classes, samples, seed = draw(st.integers(1, 6)), draw(st.integers(0, 150)), draw(st.integers(0, 1000))
    generator = np.random.default_rng(seed)
    return (
        generator.integers(classes, size=samples, dtype=np.int32),
        generator.integers(len(PARTS), size=samples, dtype=np.int8),
        classes,
    )


def undistorted(**changes: Any) -> dict[str, Any]:
    return {"validation_fraction": None, "imbalance_ratio": 1.0, "label_noise": 0.0, "seed": 0} | changes


def count(ids: np.ndarray, label_N: np.ndarray, label: int) -> int:
    return int((label_N[ids] == label).sum())


@settings(deadline=None)
@given(packed(), st.integers(0, 2**63 - 1))
def test_no_distortion_keeps_the_packed_parts(data: Any, seed: int) -> None:
    label_N, part_N, classes = data
    split = make_split(label_N, part_N, classes, **undistorted(seed=seed))
    for part, ids in enumerate((split.train, split.validation, split.test)):
        assert np.array_equal(ids, np.flatnonzero(part_N == part))
    assert np.array_equal(split.label_N, label_N)


@settings(deadline=None)
@given(packed(), st.none() | FRACTIONS, st.floats(1, 200), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_counts_are_as_documented(data: Any, fraction: float | None, ratio: float, noise: float, seed: int) -> None:
    label_N, part_N, classes = data
    options = {"validation_fraction": fraction, "imbalance_ratio": ratio, "label_noise": noise, "seed": seed}
    before = label_N.copy()
    split: Split = make_split(label_N, part_N, classes, **options)
    assert np.array_equal(label_N, before)

    everything = np.concatenate([split.train, split.validation, split.test])
    assert len(np.unique(everything)) == len(everything)
    assert all(np.array_equal(ids, np.unique(ids)) for ids in (split.train, split.validation, split.test))
    assert np.array_equal(split.test, np.flatnonzero(part_N == 2))
    if fraction is None:
        assert np.array_equal(split.validation, np.flatnonzero(part_N == 1))
    for label in range(classes):
        packed_counts = [count(np.flatnonzero(part_N == part), label_N, label) for part in (0, 1)]
        validation = packed_counts[1] if fraction is None else round(fraction * sum(packed_counts))
        train = sum(packed_counts) - validation
        if label >= classes // 2 and train:
            train = max(1, round(train / ratio))
        assert count(split.validation, label_N, label) == validation
        assert count(split.train, label_N, label) == train

    changed = np.flatnonzero(split.label_N != label_N)
    assert np.isin(changed, split.train).all()
    assert len(changed) <= round(noise * len(split.train))
    assert split.label_N.dtype == np.int32
    assert not len(split.label_N) or 0 <= split.label_N.min() <= split.label_N.max() < classes

    again = make_split(label_N, part_N, classes, **options)
    for name in ("train", "validation", "test", "label_N"):
        assert np.array_equal(getattr(split, name), getattr(again, name))


@pytest.mark.parametrize(("classes", "noise"), [(2, 1.0), (10, 0.3), (100, 0.5)])
def test_redrawn_labels_are_uniform_over_all_classes(classes: int, noise: float) -> None:
    """K = round(NR·n) redrawn labels differ from the true one with probability 1 - 1/C: within five deviations."""
    samples = 20_000
    label_N, part_N = np.zeros(samples, np.int32), np.zeros(samples, np.int8)
    split = make_split(label_N, part_N, classes, **undistorted(label_noise=noise, seed=classes))
    redrawn = round(noise * samples)
    counts = np.bincount(split.label_N, minlength=classes)
    deviation = math.sqrt(redrawn * (1 / classes) * (1 - 1 / classes))
    assert abs((samples - counts[0]) - redrawn * (1 - 1 / classes)) < 5 * deviation
    assert np.abs(counts[1:] - redrawn / classes).max() < 5 * deviation


def test_seeds_draw_different_splits_and_different_noise() -> None:
    label_N, part_N = np.arange(400, dtype=np.int32) % 4, np.zeros(400, np.int8)
    a, b = (
        make_split(label_N, part_N, 4, validation_fraction=0.5, imbalance_ratio=2, label_noise=0.5, seed=seed)
        for seed in (0, 1)
    )
    assert not np.array_equal(a.validation, b.validation)
    assert not np.array_equal(a.train, b.train)
    assert not np.array_equal(a.label_N, b.label_N)


def test_every_sample_is_as_likely_to_be_split_off() -> None:
    """2,000 draws of 3 of 10: each id about 600 times, within five deviations."""
    generator = np.random.default_rng(0)
    ids, label_N = np.arange(10), np.zeros(10, np.int32)
    hits = np.zeros(10)
    for _ in range(2000):
        kept, off = split_off(ids, label_N, 1, 0.3, generator)
        assert sorted([*kept, *off]) == list(range(10))
        hits[off] += 1
    assert np.abs(hits - 600).max() < 5 * math.sqrt(2000 * 0.3 * 0.7)

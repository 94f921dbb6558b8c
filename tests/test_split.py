"""Split and distortion: counts as documented, clean validation and test, the same for the same seed."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autodo_dist.data.manifest import PARTS
from autodo_dist.data.split import Recipe, Split, count_left, make_split, split_off
from autodo_dist.errors import AutodoError

FRACTIONS = st.none() | st.floats(0, 1, exclude_max=True)
RATIOS, RATES, SEEDS = st.floats(1, 200), st.floats(0, 1), st.integers(0, 2**63 - 1)
IMBALANCES = st.sampled_from(("step", "exponential"))


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


@st.composite
def recipes(draw: st.DrawFn, classes: int) -> Recipe:
    noise = draw(st.sampled_from(("uniform", "asymmetric")))
    mappings = st.none() | st.tuples(*[st.integers(0, classes - 1)] * classes)
    return Recipe(
        draw(FRACTIONS),
        draw(IMBALANCES),
        draw(RATIOS),
        noise,
        draw(RATES),
        draw(mappings) if noise == "asymmetric" else None,
        draw(SEEDS),
    )


def count(ids: np.ndarray, label_N: np.ndarray, label: int) -> int:
    return int((label_N[ids] == label).sum())


@settings(deadline=None)
@given(packed(), SEEDS)
def test_no_distortion_keeps_the_packed_parts(data: Any, seed: int) -> None:
    label_N, part_N, classes = data
    split = make_split(label_N, part_N, classes, Recipe(seed=seed))
    for part, ids in enumerate((split.train, split.validation, split.test)):
        assert np.array_equal(ids, np.flatnonzero(part_N == part))
    assert np.array_equal(split.label_N, label_N)


@settings(deadline=None)
@given(packed(), st.data())
def test_counts_are_as_documented(data: Any, drawn: st.DataObject) -> None:
    label_N, part_N, classes = data
    recipe = drawn.draw(recipes(classes))
    before = label_N.copy()
    split: Split = make_split(label_N, part_N, classes, recipe)
    assert np.array_equal(label_N, before)

    everything = np.concatenate([split.train, split.validation, split.test])
    assert len(np.unique(everything)) == len(everything)
    assert all(np.array_equal(ids, np.unique(ids)) for ids in (split.train, split.validation, split.test))
    assert np.array_equal(split.test, np.flatnonzero(part_N == 2))
    if recipe.validation_fraction is None:
        assert np.array_equal(split.validation, np.flatnonzero(part_N == 1))
    for label in range(classes):
        packed_counts = [count(np.flatnonzero(part_N == part), label_N, label) for part in (0, 1)]
        fraction = recipe.validation_fraction
        validation = packed_counts[1] if fraction is None else round(fraction * sum(packed_counts))
        train = sum(packed_counts) - validation
        if recipe.imbalance == "exponential":
            train = count_left(train, label, classes, "exponential", recipe.imbalance_ratio)
        elif label >= classes // 2 and train:
            train = max(1, round(train / recipe.imbalance_ratio))
        assert count(split.validation, label_N, label) == validation
        assert count(split.train, label_N, label) == train

    changed = np.flatnonzero(split.label_N != label_N)
    assert np.isin(changed, split.train).all()
    assert split.label_N.dtype == np.int32
    assert not len(split.label_N) or 0 <= split.label_N.min() <= split.label_N.max() < classes
    if recipe.noise == "uniform":
        assert len(changed) <= round(recipe.noise_rate * len(split.train))

    again = make_split(label_N, part_N, classes, recipe)
    for name in ("train", "validation", "test", "label_N"):
        assert np.array_equal(getattr(split, name), getattr(again, name))


@settings(deadline=None)
@given(packed(), st.data())
def test_asymmetric_noise_changes_its_share_of_every_class_to_one_other(data: Any, drawn: st.DataObject) -> None:
    label_N, part_N, classes = data
    recipe = drawn.draw(recipes(classes))
    assume(recipe.noise == "asymmetric")
    split = make_split(label_N, part_N, classes, recipe)
    for label in range(classes):
        members = split.train[label_N[split.train] == label]
        mistaken = (label + 1) % classes if recipe.mapping is None else recipe.mapping[label]
        flipped = round(recipe.noise_rate * len(members))
        expected = sorted([label] * (len(members) - flipped) + [mistaken] * flipped)
        assert sorted(split.label_N[members].tolist()) == expected


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(2, 6), st.integers(1, 300), st.data())
def test_exponential_tail_in_whole_numbers(samples: int, classes: int, ratio: int, drawn: st.DataObject) -> None:
    """The k nearest to n·IR^(-c/(C-1)) if (2k-1)^(C-1)·IR^c <= (2n)^(C-1) <= (2k+1)^(C-1)·IR^c: no float's power."""
    label, last = drawn.draw(st.integers(0, classes - 1)), classes - 1
    left = count_left(samples, label, classes, "exponential", ratio)
    doubled, factor = (2 * samples) ** last, ratio**label
    if doubled < factor:  # less than half a sample
        assert left == 1
        return
    below, above = (2 * left - 1) ** last * factor, (2 * left + 1) ** last * factor
    assert below <= doubled <= above or left == 1
    if doubled in (below, above):  # a tie goes to the even number, as in Python's round; but never to none
        assert left % 2 == 0 or left == 1


@pytest.mark.parametrize(
    ("classes", "ratio", "expected"),
    [
        (
            10,
            100,
            [5000, 2997, 1797, 1077, 646, 387, 232, 139, 83, 50],
        ),  # to 40 digits; cut instead of rounded, their sum is 12,406
        (3, 100, [5000, 500, 50]),
        (1, 100, [5000]),
        (2, 1e6, [5000, 1]),
    ],
)
def test_exponential_tail_of_5000_pictures(classes: int, ratio: float, expected: list[int]) -> None:
    counts = [count_left(5000, label, classes, "exponential", ratio) for label in range(classes)]
    assert counts == expected


def test_an_empty_class_stays_empty() -> None:
    assert [count_left(0, 1, 2, kind, 10) for kind in ("step", "exponential")] == [0, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("classes", "noise"), [(2, 1.0), (10, 0.3), (100, 0.5)])
def test_redrawn_labels_are_uniform_over_all_classes(classes: int, noise: float) -> None:
    """K = round(NR·n) redrawn labels differ from the true one with probability 1 - 1/C: within five deviations."""
    samples = 20_000
    label_N, part_N = np.zeros(samples, np.int32), np.zeros(samples, np.int8)
    split = make_split(label_N, part_N, classes, Recipe(noise_rate=noise, seed=classes))
    redrawn = round(noise * samples)
    counts = np.bincount(split.label_N, minlength=classes)
    deviation = math.sqrt(redrawn * (1 / classes) * (1 - 1 / classes))
    assert abs((samples - counts[0]) - redrawn * (1 - 1 / classes)) < 5 * deviation
    assert np.abs(counts[1:] - redrawn / classes).max() < 5 * deviation


def test_seeds_draw_different_splits_and_different_noise() -> None:
    label_N, part_N = np.arange(400, dtype=np.int32) % 4, np.zeros(400, np.int8)
    a, b = (
        make_split(label_N, part_N, 4, Recipe(0.5, imbalance_ratio=2, noise_rate=0.5, seed=seed)) for seed in (0, 1)
    )
    assert not np.array_equal(a.validation, b.validation)
    assert not np.array_equal(a.train, b.train)
    assert not np.array_equal(a.label_N, b.label_N)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            Recipe(imbalance_ratio=10, noise_rate=0.1),
            "19e92401f3928336be4be89098f330639843fee93bb077dec9710d6e3fcdc668",
        ),
        (
            Recipe(0.2, imbalance_ratio=3.5, noise_rate=0.4, seed=7),
            "0e0091fcf8bcd7a46601d7ae902c2a467d836e381ac68cc05dcccfbee5d64628",
        ),
        (
            Recipe(0.2, "exponential", 20, "asymmetric", 0.3, seed=1),
            "a36b73a9ed1312a555bb53ffcdf4d7ab2afafce32d5f8f1889ba09759f36b92f",
        ),
        (
            Recipe(None, "exponential", 20, "asymmetric", 0.3, (0, 2, 1, 3, 3), seed=1),
            "81d12cac98fdcdbfc4df7dac2bc3fcf51634876948b4bfda09abaa2842d0cd30",
        ),
    ],
)
def test_draws_are_as_ever(recipe: Recipe, expected: str) -> None:
    """Runs of then and now see the same data. The first two digests are the first version's, which knew these only."""
    number = np.arange(600)
    label_N = (number * 7 % 13 % 5).astype(np.int32)
    part_N = ((number % 10 > 7).astype(np.int8) + (number % 10 > 8)).astype(np.int8)
    split = make_split(label_N, part_N, 5, recipe)
    digest = hashlib.sha256()
    for array in (split.train, split.validation, split.test, split.label_N):
        digest.update(array.tobytes())
    assert digest.hexdigest() == expected


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 1.0}, "validation fraction 1: not a share"),
        ({"validation_fraction": math.nan}, "validation fraction nan: not a share"),
        ({"imbalance_ratio": 0.5}, "imbalance ratio 0.5: not a finite number of at least 1"),
        ({"imbalance_ratio": math.inf}, "imbalance ratio inf: not a finite number"),
        ({"imbalance_ratio": math.nan}, "imbalance ratio nan: not a finite number"),
        ({"noise_rate": 1.5}, "noise rate 1.5: not a share"),
        ({"noise_rate": math.nan}, "noise rate nan: not a share"),
        ({"seed": -1}, "seed -1: not a whole number"),
        ({"seed": 2**63}, "seed 9223372036854775808: not a whole number"),
        ({"mapping": (1, 0)}, "uniform noise takes no mapping"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodoError, match=message):
        Recipe(**changes)

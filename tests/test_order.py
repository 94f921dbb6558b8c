"""Order and windows: exact epochs on any number of ranks, from any start; randomness from seed, epoch and id alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodo_dist.data.order import (
    PASSES,
    Crop,
    Pass,
    Window,
    evaluation_window,
    local_ids,
    shuffled,
    steps_per_pass,
    stream,
    training_window,
)

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10_000)
SIDES = st.integers(1, 3000)
RANKS = st.integers(1, 12)


def resized(low: float = 0.08, high: float = 1.0, evaluation: float = 0.875, flip: bool = True) -> Crop:
    return Crop("resized", (low, high), 0, 224, evaluation, flip)


def padded(padding: int, image_size: int) -> Crop:
    return Crop("padded", (0.08, 1.0), padding, image_size, 1.0, True)


# -------------------------------------------------------------------------------------------------------------- order


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 70), RANKS, st.booleans(), SEEDS, EPOCHS)
def test_an_epoch_is_exact_on_any_number_of_ranks(
    samples: int, batch_size: int, ranks: int, drop_last: bool, seed: int, epoch: int
) -> None:
    ids = np.arange(samples, dtype=np.int64) * 7  # ids of a split are not consecutive
    ordered = shuffled(ids, seed, epoch, "task")
    steps = steps_per_pass(samples, batch_size, drop_last=drop_last)
    seen: list[int] = []
    for step in range(steps):
        pieces = [local_ids(ordered, batch_size, step, rank, ranks) for rank in range(ranks)]
        lengths = [len(piece) for piece in pieces]
        assert np.array_equal(np.concatenate(pieces), ordered[step * batch_size : (step + 1) * batch_size])
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)
        assert sum(lengths) == batch_size or (step == steps - 1 and not drop_last)
        seen += np.concatenate(pieces).tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(ids.tolist())
    assert len(ids) - len(seen) == (samples % batch_size if drop_last else 0)


@given(st.integers(0, 300), st.integers(1, 70))
def test_steps_are_whole_batches_or_all(samples: int, batch_size: int) -> None:
    batches = [range(start, min(start + batch_size, samples)) for start in range(0, samples, batch_size)]
    assert steps_per_pass(samples, batch_size, drop_last=False) == len(batches)
    assert steps_per_pass(samples, batch_size, drop_last=True) == sum(len(batch) == batch_size for batch in batches)


@settings(deadline=None)
@given(st.data(), st.integers(1, 200), st.integers(1, 50), RANKS)
def test_a_start_at_any_step_on_other_ranks_reads_the_tail(
    data: st.DataObject, samples: int, batch_size: int, ranks: int
) -> None:
    ids = np.arange(samples)
    steps = steps_per_pass(samples, batch_size, drop_last=False)
    start = data.draw(st.integers(0, steps))
    whole = [local_ids(shuffled(ids, 1, 2, "task"), batch_size, step, 0, 1) for step in range(steps)]
    again = shuffled(ids, 1, 2, "task")  # as a resumed process computes it
    tail = [
        np.concatenate([local_ids(again, batch_size, step, rank, ranks) for rank in range(ranks)])
        for step in range(start, steps)
    ]
    assert [batch.tolist() for batch in tail] == [batch.tolist() for batch in whole[start:]]


def test_another_remainder_is_dropped_each_epoch() -> None:
    ids = np.arange(103)
    left = {frozenset(shuffled(ids, 0, epoch, "task")[100:].tolist()) for epoch in range(20)}
    assert len(left) == 20


def test_seed_epoch_and_pass_each_change_the_order() -> None:
    ids = np.arange(50)
    orders = {
        tuple(shuffled(ids, *key).tolist())
        for key in ((0, 0, "task"), (1, 0, "task"), (0, 1, "task"), (0, 0, "evaluation"))
    }
    assert len(orders) == 4
    assert all(sorted(order) == ids.tolist() for order in orders)


def test_every_permutation_is_as_likely() -> None:
    """2,400 orders of four ids: each of the 24 about 100 times; chi-square of 23 degrees, p = 1e-4 at 55.5."""
    orders = [tuple(shuffled(np.arange(4), 0, epoch, "task").tolist()) for epoch in range(2400)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 55.5


# ------------------------------------------------------------------------------------------------------------- streams


@settings(deadline=None)
@given(SEEDS, EPOCHS, st.sampled_from(PASSES), st.integers(0, 2**64 - 1))
def test_the_counter_is_the_id(seed: int, epoch: int, pass_: Pass, id_: int) -> None:
    """Oracle: numpy's own walk along one Philox sequence; ids lie 2^192 counts apart, so streams cannot overlap."""
    walk = np.random.Philox(key=np.array([seed, epoch * 256 + PASSES.index(pass_)], dtype=np.uint64))
    walk.advance(id_ * 2**192)
    assert np.array_equal(walk.random_raw(9), stream(seed, epoch, pass_, id_).bit_generator.random_raw(9))


def test_neighbouring_streams_differ() -> None:
    keys: list[tuple[int, int, Pass, int]] = [
        (seed, epoch, pass_, id_)
        for seed in (0, 1, 255, 2**63 - 1)
        for epoch in (0, 1, 256)
        for pass_ in PASSES
        for id_ in (0, 1, 2**32, 2**63)
    ]
    assert len({stream(*key).integers(2**63) for key in keys}) == len(keys)


# ------------------------------------------------------------------------------------------------------------- windows


def largest_within_ratios(height: int, width: int) -> Window:
    """Centred, as large as fits with width / height in [3/4, 4/3]; found by trying."""
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = (width, width / ratio) if width / ratio <= height + 1e-9 else (height * ratio, height)
    return Window((1 - h / height) / 2, (1 - w / width) / 2, h / height, w / width, False)


def near(a: Window, b: Window) -> bool:
    return all(
        math.isclose(getattr(a, name), getattr(b, name), abs_tol=1e-9) for name in ("top", "left", "height", "width")
    )


@settings(deadline=None, max_examples=300)
@given(SIDES, SIDES, st.floats(0.01, 1), st.floats(0.01, 1), SEEDS, st.integers(0, 2**40))
def test_resized_window_lies_inside_with_area_and_aspect_in_bounds(
    height: int, width: int, a: float, b: float, seed: int, id_: int
) -> None:
    low, high = min(a, b), max(a, b)
    window = training_window(stream(seed, 0, "task", id_), height, width, resized(low, high))
    for start, extent in ((window.top, window.height), (window.left, window.width)):
        assert 0 <= start <= 1
        assert 0 < extent <= 1
        assert start + extent <= 1 + 1e-9
    if near(window, largest_within_ratios(height, width)):
        return
    h, w = window.height * height, window.width * width
    assert math.isclose(h, round(h), abs_tol=1e-6)
    assert math.isclose(w, round(w), abs_tol=1e-6)
    # Sides were rounded by at most half a pixel.
    assert (h + 0.5) * (w + 0.5) >= low * height * width * (1 - 1e-9)
    assert (h - 0.5) * (w - 0.5) <= high * height * width * (1 + 1e-9)
    assert (w + 0.5) / (h - 0.5) >= 3 / 4 * (1 - 1e-9)
    assert (w - 0.5) / (h + 0.5) <= 4 / 3 * (1 + 1e-9)


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3000, 1), (10, 400), (400, 10)])
def test_narrow_pictures_get_the_largest_centred_window(height: int, width: int) -> None:
    """No window of half the area has these ratios, so all ten tries fail."""
    window = training_window(stream(0, 0, "task", 5), height, width, resized(0.5, 1.0))
    assert near(window, largest_within_ratios(height, width))


def test_resized_windows_spread_over_areas_ratios_and_places() -> None:
    """4,000 ids: area share U(0.2, 0.4), log ratio and places uniform, each mean within five deviations."""
    crop = resized(0.2, 0.4)
    windows = [training_window(stream(0, 0, "task", id_), 1000, 1000, crop) for id_ in range(4000)]
    five = 5 / math.sqrt(len(windows))
    areas = np.array([window.height * window.width for window in windows])
    ratios = np.array([math.log(window.width / window.height) for window in windows])
    tops = np.array([window.top / (1 - window.height) for window in windows])
    lefts = np.array([window.left / (1 - window.width) for window in windows])
    assert abs(areas.mean() - 0.3) < five * 0.2 / math.sqrt(12)
    assert abs(ratios.mean()) < five * 2 * math.log(4 / 3) / math.sqrt(12)
    assert abs(ratios.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    assert abs(tops.mean() - 0.5) < five / math.sqrt(12)
    assert abs(lefts.mean() - 0.5) < five / math.sqrt(12)
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < five


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(0, 40), st.integers(8, 300), SEEDS, st.integers(0, 2**40))
def test_padded_window_is_a_whole_picture_shifted_by_whole_pixels(
    height: int, width: int, padding: int, image_size: int, seed: int, id_: int
) -> None:
    window = training_window(stream(seed, 0, "task", id_), height, width, padded(padding, image_size))
    assert (window.height, window.width) == (1, 1)
    for start, side in ((window.top, height), (window.left, width)):
        assert math.isclose(start * side, round(start * side), abs_tol=1e-9)
        assert round(start * side) in {round(by * side / image_size) for by in range(-padding, padding + 1)}


def test_padded_window_reaches_every_shift() -> None:
    windows = [training_window(stream(0, 0, "task", id_), 32, 32, padded(2, 32)) for id_ in range(500)]
    assert {(window.top * 32, window.left * 32) for window in windows} == {
        (top, left) for top in range(-2, 3) for left in range(-2, 3)
    }


@settings(deadline=None)
@given(SIDES, SIDES, SEEDS)
def test_whole_is_the_whole_picture(height: int, width: int, seed: int) -> None:
    crop = Crop("whole", (0.08, 1.0), 4, 32, 0.5, False)
    whole = Window(0, 0, 1, 1, False)
    assert training_window(stream(seed, 0, "task", 0), height, width, crop) == whole
    assert evaluation_window(height, width, crop) == whole


@settings(deadline=None)
@given(SIDES, SIDES, st.floats(0.1, 1))
def test_evaluation_window_is_a_centred_square(height: int, width: int, share: float) -> None:
    window = evaluation_window(height, width, resized(evaluation=share))
    side = share * min(height, width)
    assert window.height * height == pytest.approx(side)
    assert window.width * width == pytest.approx(side)
    assert 2 * window.top + window.height == pytest.approx(1)
    assert 2 * window.left + window.width == pytest.approx(1)
    assert not window.flip
    assert evaluation_window(height, width, padded(4, 32)) == Window(0, 0, 1, 1, False)


@pytest.mark.parametrize("crop", [resized(), padded(4, 32)], ids=["resized", "padded"])
def test_windows_depend_on_id_and_epoch_and_not_on_who_asks(crop: Crop) -> None:
    def windows(ids: list[int], epoch: int) -> dict[int, Window]:
        return {id_: training_window(stream(3, epoch, "task", id_), 40 + id_ % 7, 50, crop) for id_ in ids}

    ids = list(range(200))
    forward = windows(ids, 1)
    assert windows(ids[::-1], 1) == forward
    assert {**windows(ids[50:], 1), **windows(ids[:50], 1)} == forward
    later = windows(ids, 2)
    assert sum(forward[id_] != later[id_] for id_ in ids) > 190
    assert len(set(forward.values())) > 80


def test_half_are_mirrored_and_flip_off_changes_nothing_else() -> None:
    on, off = resized(), resized(flip=False)
    pairs = [
        tuple(training_window(stream(0, 0, "task", id_), 30, 40, crop) for crop in (on, off)) for id_ in range(2000)
    ]
    assert abs(sum(a.flip for a, _ in pairs) - 1000) < 5 * math.sqrt(500)
    assert not any(b.flip for _, b in pairs)
    assert all(near(a, b) for a, b in pairs)

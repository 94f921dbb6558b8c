"""A policy's operations on natural pictures, by DALI and by torchvision, against PIL's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autodo_dist.data import order, policies
from autodo_dist.data.dali import DaliPixels
from autodo_dist.data.pixels import Finish
from autodo_dist.data.policies import OPERATIONS, Drawn, Policy, make_choice, make_erase
from benchmarks.policies import CASES, DECODERS, by_pil, bytes_of, natural, one_each, whole

SIZE = 128
FINISH = bytes_of(SIZE)
NORMALISED = Finish(FINISH.crop, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# Mean absolute difference to PIL, of 255; docs/policies.md gives the reason of the exception.
BOUND = dict.fromkeys(OPERATIONS, 2.0) | dict.fromkeys(GEOMETRY, 4.0)
EXCEPTIONS = {("dali", "equalize"): 6.0}


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_every_operation_is_that_of_pil(decoder: str) -> None:
    """All of them in one batch, so that each picture must get its own."""
    images = natural(SIZE, SIZE)
    order_ = np.random.default_rng(0).permutation(len(CASES))
    cases = [CASES[at] for at in order_]
    batch = whole([images[at] for _, _, at in cases], one_each(cases))
    found = DECODERS[decoder](FINISH, len(cases)).decode(batch).numpy()
    for (name, strength, at), image in zip(cases, found, strict=True):
        expected = by_pil(images[at], name, strength).transpose(2, 0, 1).astype(np.float32)
        difference = np.abs(image - expected).mean()
        assert difference <= EXCEPTIONS.get((decoder, name), BOUND[name]), (name, strength, at, difference)
        # The bound means something only where the operation changes much more than it allows.
        changed = np.abs(expected - images[at].transpose(2, 0, 1)).mean()
        assert changed < 3 or difference < 0.35 * changed, (name, strength, at, difference, changed)


@pytest.mark.parametrize("size", [32, 128])
def test_dali_equalizes_by_the_cumulated_histogram(size: int) -> None:
    """255 (cdf(v) - cdf(lowest)) / (N - cdf(lowest)) for each channel, as OpenCV; PIL divides by a whole number."""
    images, cases = natural(size, size), [("equalize", 0.0, at) for at in range(2)]
    finish = bytes_of(size)
    found = DaliPixels(finish, 2, 1, None).decode(whole(images, one_each(cases))).numpy()
    for image, equalized in zip(images, found, strict=True):
        for channel in range(3):
            below = np.bincount(image[..., channel].ravel(), minlength=256).cumsum()
            lowest = below[below > 0][0]
            expected = 255 * (below - lowest) / (size * size - lowest)
            assert np.abs(equalized[channel] - expected[image[..., channel]]).max() <= 1


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_a_picture_is_mirrored_before_its_operations_which_come_in_order(decoder: str) -> None:
    image = natural(SIZE, SIZE)[0]
    steps = [("translate_x", 30.0), ("invert", 0.0), ("rotate", 40.0)]
    drawn = Drawn(
        np.array([[OPERATIONS.index(name) for name, _ in steps]], np.int32),
        np.array([[strength for _, strength in steps]], np.float32),
        np.zeros((1, 4), np.int32),
    )
    finish = replace(FINISH, operations=3)
    (found,) = DECODERS[decoder](finish, 1).decode(whole([image], drawn, flip=1)).numpy()
    expected = image[:, ::-1]
    for name, strength in steps:
        expected = by_pil(expected, name, strength)
    assert np.abs(found - expected.transpose(2, 0, 1)).mean() < 1


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize("flip", [0, 1])
def test_a_policy_that_changes_nothing_changes_no_bit(decoder: str, flip: int) -> None:
    finish = NORMALISED
    plain = DECODERS[decoder](finish, 2).decode(whole(natural(SIZE, SIZE), None, flip))
    drawn = Drawn(np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32), np.zeros((2, 4), np.int32))
    changed = replace(finish, operations=2, erases=True)
    assert torch.equal(DECODERS[decoder](changed, 2).decode(whole(natural(SIZE, SIZE), drawn, flip)), plain)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize("operations", [0, 1])
def test_what_is_erased_is_the_mean_and_the_rest_as_it_was(decoder: str, operations: int) -> None:
    finish = replace(NORMALISED, operations=operations, erases=True)
    rectangles = [(0, 100, 20, 28), (5, 0, 123, 64), (0, 0, 0, 0), (0, 0, SIZE, SIZE)]
    nothing = np.zeros((4, operations))
    drawn = Drawn(nothing.astype(np.int32), nothing.astype(np.float32), np.array(rectangles, np.int32))
    images = natural(SIZE, SIZE) * 2
    plain = DECODERS[decoder](replace(finish, operations=0, erases=False), 4).decode(whole(images, None))
    found = DECODERS[decoder](finish, 4).decode(whole(images, drawn))
    for image, expected, (top, left, height, width) in zip(found, plain, rectangles, strict=True):
        expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(image, expected)


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment", *policies.PAPERS, "random_subset"])
def test_whole_policies_are_alike_in_dali_and_torchvision(name: str) -> None:
    """A difference of 1 may become one of many where a later operation has a step; hence quantiles."""
    policy = Policy(make_choice(name, 2, 9, (), SIZE), make_erase("random", None, None, SIZE))
    drawn = policy.draw([order.stream(3, 0, "task", id_) for id_ in range(120)])
    finish = replace(FINISH, operations=policy.operations, erases=True)
    batch = whole(natural(SIZE, SIZE) * 60, drawn)
    one, other = (DECODERS[decoder](finish, 120).decode(batch) for decoder in ("dali", "torchvision"))
    difference = (one - other).abs().mean((1, 2, 3)).numpy()
    equalized = (drawn.operation_BK == OPERATIONS.index("equalize")).any(1)
    assert equalized.any()
    assert np.median(difference[~equalized]) <= 1.0
    assert np.quantile(difference[~equalized], 0.9) <= 2.0
    assert np.median(difference[equalized]) <= 6.0
    before = torch.from_numpy(np.stack(natural(SIZE, SIZE) * 60)).permute(0, 3, 1, 2)
    assert (one - before).abs().mean((1, 2, 3)).median() > 4.0  # they do something

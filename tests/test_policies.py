"""Policies: what they draw, against their definitions, and that a picture gets the same wherever it is loaded."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali.auto_aug import auto_augment
from torchvision.transforms import autoaugment

from autodo_dist import build_data
from autodo_dist.data import order, policies
from autodo_dist.data.loader import Batch
from autodo_dist.data.manifest import read_manifest
from autodo_dist.data.policies import OPERATIONS, Erase, Policy, make_choice, make_erase
from autodo_dist.load_config import check_config
from autodo_dist.parallel.comm import Ranks

SIZE = 64
NAMES = {  # ours and torchvision's
    "".join(word.capitalize() for word in name.split("_")): name for name in OPERATIONS
}


def drawn(choice: policies.Choice, pictures: int, seed: int = 0) -> list[list[tuple[str, float]]]:
    return [choice.draw(order.stream(seed, 0, "task", id_)) for id_ in range(pictures)]


def choice(name: str, n: int = 2, m: int = 9, sub_policies: policies.SubPolicies = ()) -> policies.Choice:
    made = make_choice(name, n, m, sub_policies, SIZE)
    assert made is not None
    return made


def near(count: int, total: int, probability: float) -> bool:
    """Within five standard deviations of a binomial count."""
    return abs(count - total * probability) <= 5 * math.sqrt(total * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize(
    ("ranges", "space", "bins"),
    [
        (policies.autoaugment_ranges(SIZE), autoaugment.AutoAugment()._augmentation_space(10, (SIZE, SIZE)), 10),
        (policies.autoaugment_ranges(SIZE), autoaugment.RandAugment()._augmentation_space(31, (SIZE, SIZE)), 31),
        (policies.trivialaugment_ranges(SIZE), autoaugment.TrivialAugmentWide()._augmentation_space(31), 31),
    ],
    ids=["autoaugment", "randaugment", "trivialaugment"],
)
def test_strengths_are_those_of_torchvision(ranges: policies.Ranges, space: dict[str, Any], bins: int) -> None:
    for theirs, (magnitudes, signed) in space.items():
        ours = ranges[NAMES[theirs]]
        assert ours.signed == signed, theirs
        for at, magnitude in enumerate(magnitudes.tolist() if magnitudes.ndim else [0.0] * bins):
            expected = int(magnitude + 1e-4) if theirs.startswith("Translate") else magnitude  # as _apply_op does
            assert ours.at(at / (bins - 1)) == pytest.approx(expected, abs=1e-4), (theirs, at)
    assert set(space) | {"Identity"} == {theirs for theirs, name in NAMES.items() if name in ranges} - (
        {"Invert"} if "Invert" not in space else set()
    )


@pytest.mark.parametrize(
    ("data", "theirs"),
    [
        ("imagenet", auto_augment.get_reduced_image_net_policy()),
        ("cifar10", auto_augment.get_reduced_cifar10_policy()),
        ("svhn", auto_augment.get_svhn_policy()),
    ],
)
def test_published_sub_policies_are_those_that_dali_has_too(data: str, theirs: Any) -> None:
    """Two libraries' copies of the paper's tables; DALI leaves out a step whose probability is 0."""
    table = policies.published(data)
    ours = Counter(tuple((name, probability) for name, probability, _ in steps if probability) for steps in table)
    both = Counter(tuple((step.name, probability) for step, probability, _ in steps) for steps in theirs.sub_policies)
    assert sum(ours.values()) == 25
    assert ours == both


def test_randaugment_takes_operations_alike_at_one_strength_either_way() -> None:
    pictures = drawn(choice("randaugment", 3, 12), 4000)
    assert {len(steps) for steps in pictures} == {3}
    for place in range(3):  # each of the three, whatever the others are
        counts = Counter(steps[place][0] for steps in pictures)
        assert set(counts) == set(OPERATIONS) - {"invert"}
        assert all(near(count, 4000, 1 / 14) for count in counts.values())
    pairs = Counter((steps[0][0], steps[1][0]) for steps in pictures)
    assert near(sum(count for (one, other), count in pairs.items() if one == other), 4000, 1 / 14)
    angles = [strength for steps in pictures for name, strength in steps if name == "rotate"]
    assert set(angles) == {12.0, -12.0}
    signed = [
        strength for steps in pictures for name, strength in steps if policies.autoaugment_ranges(SIZE)[name].signed
    ]
    assert near(sum(strength > 0 for strength in signed), len(signed), 0.5)
    assert {strength for steps in pictures for name, strength in steps if name == "posterize"} == {6}


def test_trivialaugment_takes_one_operation_at_any_of_31_strengths() -> None:
    pictures = drawn(choice("trivialaugment"), 20000)
    assert {len(steps) for steps in pictures} == {1}
    assert all(near(count, 20000, 1 / 14) for count in Counter(steps[0][0] for steps in pictures).values())
    slopes = Counter(round(strength / 0.99 * 30) for ((name, strength),) in pictures if name == "shear_x")
    total = slopes.total()
    assert set(slopes) == set(range(-30, 31))
    assert near(slopes[0], total, 1 / 31)
    assert all(near(count, total, 1 / 62) for slope, count in slopes.items() if slope)


def test_random_subset_is_colour_only_with_factors_from_a_tenth_up() -> None:
    pictures = drawn(choice("random_subset", 2, 20), 6000)
    counts = Counter(name for steps in pictures for name, _ in steps)
    assert set(counts) == {"identity", "auto_contrast", "equalize", "invert", "color", "sharpness"}
    assert all(near(count, 12000, 1 / 6) for count in counts.values())
    factors = np.array([1 + strength for steps in pictures for name, strength in steps if name == "color"])
    assert factors.min() >= 0.1
    assert factors.max() <= 0.1 + 1.8 * 20 / 30
    assert factors.mean() == pytest.approx(0.7, abs=5 * 1.2 / math.sqrt(12 * len(factors)))


def test_a_sub_policy_is_taken_whole_each_step_with_its_probability() -> None:
    table = [[("rotate", 0.3, 5), ("invert", 0.8, None)], [("solarize", 1.0, 2.5)], [("equalize", 0.0, None)]]
    pictures = Counter(tuple(name for name, _ in steps) for steps in drawn(choice("custom", sub_policies=table), 9000))
    assert near(pictures[("solarize",)], 9000, 1 / 3)
    for steps, probability in {
        ("rotate", "invert"): 0.24,
        ("rotate",): 0.06,
        ("invert",): 0.56,
    }.items():
        assert near(pictures[steps], 9000, probability / 3)
    assert set(pictures) == {("rotate", "invert"), ("rotate",), ("invert",), ("solarize",), ()}
    strengths = {strength for steps in drawn(choice("custom", sub_policies=table), 300) for _, strength in steps}
    assert sorted(strengths) == pytest.approx([-30 * 5 / 9, 0.0, 30 * 5 / 9, 255 * (1 - 2.5 / 9)])


@pytest.mark.parametrize("name", sorted(policies.PAPERS))
def test_autoaugment_takes_each_of_its_sub_policies_alike(name: str) -> None:
    """Mean number of operations of a kind, against the table's probabilities."""
    table, pictures = policies.published(policies.PAPERS[name]), 10000
    counts = Counter(operation for steps in drawn(choice(name), pictures) for operation, _ in steps)
    for operation in OPERATIONS:
        each = [sum(p for step, p, _ in steps if step == operation) for steps in table]
        # The variance of a sum of two independent steps is at most its mean plus the spread between sub-policies.
        deviation = math.sqrt((np.mean(each) + np.var(each)) / pictures)
        assert abs(counts[operation] / pictures - np.mean(each)) <= 5 * deviation


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["cutout", "random"]), st.integers(8, 300), st.floats(0.001, 1.0), st.integers(0, 2**63 - 1))
def test_an_erased_rectangle_lies_in_the_picture(kind: Any, size: int, area: float, id_: int) -> None:
    top, left, height, width = Erase(kind, area, 1.0, size).draw(order.stream(0, 0, "task", id_))
    assert min(top, left, height, width) >= 0
    assert top + height <= size
    assert left + width <= size
    side = round(math.sqrt(area) * size)
    if kind == "cutout":
        assert height <= side
        assert width <= side
        assert (height, width) == (side, side) or 0 in (top, left) or size in (top + height, left + width)
    elif height:
        assert abs(height * width - area * size * size) <= (area - min(0.02, area)) * size * size + height + width


def test_cutout_has_its_centre_anywhere_and_random_erasing_its_ranges() -> None:
    streams = [order.stream(0, 0, "task", id_) for id_ in range(5000)]
    erased = Policy(None, make_erase("cutout", None, None, 32)).draw(streams).erased_B4
    # A square of 16 around any of 32 pixels a side: 17 of 32 places a side are wholly inside.
    assert near(int((erased[:, 2] == 16).sum()), 5000, 17 / 32)
    assert np.all(erased[:, 2:] >= 8)
    rows = np.bincount(erased[:, 0] + erased[:, 2] // 2, minlength=32)
    assert rows[8:24].min() > 0
    erased = Policy(None, make_erase("random", None, None, 224)).draw(streams).erased_B4
    some = erased[erased[:, 2] > 0].astype(float)
    assert 0.5 - 0.05 < len(some) / 5000 < 0.5 + 0.03
    share, ratio = some[:, 2] * some[:, 3] / 224**2, some[:, 2] / some[:, 3]
    assert 0.0195 < share.min() < 0.022
    assert 0.32 < share.max() < 0.332
    assert share.mean() == pytest.approx((0.02 + 0.33) / 2, abs=0.01)
    assert 0.28 < ratio.min() < 0.33
    assert 1 / 0.33 < ratio.max() < 1 / 0.28
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.1)
    assert near(int((make_policy_erased(0.2, streams)[:, 2] > 0).sum()), 5000, 0.2)


def make_policy_erased(probability: float, streams: list[np.random.Generator]) -> np.ndarray:
    return Policy(None, make_erase("cutout", 0.1, probability, 32)).draw(streams).erased_B4


def loaders(root: Path, words: dict[str, Any], rank: int = 0, ranks: int = 1) -> build_data.Loaders:
    tree = {"data": {"root": str(root), "image_size": 32, "crop": "padded", "validation_fraction": 0.2} | words}
    tree |= {"train": {"batch_size": 60}, "learn": {"augment": "per_sample"}}
    made, manifest = check_config(tree, ""), read_manifest(root)
    place = Ranks(rank, ranks, torch.device("cpu"))
    return build_data.build_loaders(made, manifest, build_data.build_split(made, manifest), place)


POLICY = {"policy": "randaugment", "erase": "random"}


def first(loader: Any, count: int = 2, start: int = 0) -> list[Batch]:
    batches = loader.batches(epoch=1, start=start)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def test_only_training_pictures_get_a_policy(digits: Path) -> None:
    plain, augmented = loaders(digits, {}), loaders(digits, POLICY)
    for use in ("hyper_validation", "validation", "test"):
        (one,), (other,) = (first(getattr(them, use), 1) for them in (plain, augmented))
        assert torch.equal(one.images_BCHW, other.images_BCHW), use
    for use in ("task", "hyper"):
        (one,), (other,) = (first(getattr(them, use), 1) for them in (plain, augmented))
        differ = (one.images_BCHW != other.images_BCHW).flatten(1).any(1)
        assert differ.float().mean() > 0.7, use
        for name in ("ids_B", "labels_B", "draws_BD"):
            assert torch.equal(getattr(one, name), getattr(other, name)), (use, name)


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_a_picture_gets_the_same_on_any_rank_from_any_position(digits: Path, decoder: str) -> None:
    words = POLICY | {"decoder": decoder}
    alone = first(loaders(digits, words).task, 3)
    parts = [first(loaders(digits, words, rank, 3).task, 2, start=1) for rank in range(3)]
    for step in range(2):
        together = torch.cat([part[step].images_BCHW for part in parts])
        assert torch.equal(together, alone[1 + step].images_BCHW)


def test_a_picture_gets_another_draw_in_another_epoch_and_pass() -> None:
    policy = Policy(choice("trivialaugment"), make_erase("random", None, None, SIZE))
    keys = [(seed, epoch, pass_) for seed in (0, 1) for epoch in (0, 1) for pass_ in ("task", "hyper")]
    seen = [policy.draw([order.stream(seed, epoch, pass_, id_) for id_ in range(200)]) for seed, epoch, pass_ in keys]
    again = policy.draw([order.stream(0, 0, "task", id_) for id_ in (7, 3)])
    assert np.array_equal(again.operation_BK, seen[0].operation_BK[[7, 3]])
    assert np.array_equal(again.strength_BK, seen[0].strength_BK[[7, 3]])
    assert np.array_equal(again.erased_B4, seen[0].erased_B4[[7, 3]])
    for at, one in enumerate(seen):
        for other in seen[at + 1 :]:
            assert near(int((one.operation_BK == other.operation_BK).sum()), 200, 1 / 14)


def test_a_broken_picture_takes_its_draws_along() -> None:
    policy = Policy(choice("randaugment"), make_erase("random", None, None, SIZE))
    keep = np.array([True, False, True, True])
    streams = [[order.stream(0, 0, "task", id_) for id_ in ids] for ids in (range(4), (0, 2, 3))]
    one, other = policy.draw(streams[0]).only(keep), policy.draw(streams[1])
    assert np.array_equal(one.operation_BK, other.operation_BK)
    assert np.array_equal(one.strength_BK, other.strength_BK)
    assert np.array_equal(one.erased_B4, other.erased_B4)

"""The benchmark of scaling: its fit finds constants that made the numbers, and its words follow from its curves."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import SIZES, Constants, crossings, curve, draw, fit, line, predicted, typical

TRUE = Constants(
    fixed=0.004,
    each=0.002,
    contention=1.2,
    others=1.0,
    cores=2,
    skew=5e-4,
    latency={"all_reduce": 1e-4, "all_to_all": 2e-4},
    bandwidth={"all_reduce": 2e9, "all_to_all": 1e9},
)


def made(pictures: int) -> dict[int, dict[str, list[float]]]:
    """What a machine with those constants would measure on 1 and 2 ranks, three times."""
    compute = 0.01
    one = {f"step {k}, processor": TRUE.fixed + TRUE.each * k * pictures for k in (1, 2)}
    one |= {"compute, processor": compute, "compute": compute * TRUE.slow(1)}
    one |= {"step 1": TRUE.compute(1, pictures)}
    two = {"compute, processor": compute * TRUE.contention, "compute": compute * TRUE.contention * TRUE.slow(2)}
    two |= {"step 1": sum(predicted(TRUE, 2, pictures))}
    for size in SIZES:  # on two ranks: two messages of half the buffer, or one
        two[f"all_reduce {size}"] = 2 * 1e-4 + size / 2e9
        two[f"all_to_all {size}"] = 2e-4 + size / 2 / 1e9
    return {ranks: {name: [value] * 3 for name, value in times.items()} for ranks, times in ((1, one), (2, two))}


def test_the_fit_finds_what_made_the_numbers() -> None:
    """1 rank beside one other thread has a core for itself, so that only 2 ranks tell of that thread."""
    found = fit(made(8), 8, cores=2)
    assert (found.fixed, found.each, found.contention) == pytest.approx((TRUE.fixed, TRUE.each, TRUE.contention))
    for kind in ("all_reduce", "all_to_all"):
        assert found.latency[kind] == pytest.approx(TRUE.latency[kind])
        assert found.bandwidth[kind] == pytest.approx(TRUE.bandwidth[kind])
    assert found.others == pytest.approx(TRUE.others)
    assert found.skew == pytest.approx(TRUE.skew)
    assert sum(predicted(found, 4, 8)) == pytest.approx(sum(predicted(TRUE, 4, 8)))


def test_four_ranks_share_two_cores() -> None:
    alone = Constants(0.0, 0.01, 1.0, 0.0, 2, 0.0, TRUE.latency, TRUE.bandwidth)
    assert alone.compute(2, 8) == pytest.approx(0.08)
    assert alone.compute(4, 8) == pytest.approx(0.16)
    assert predicted(alone, 1, 8) == pytest.approx((0.08, 0.0))


def test_lines_and_typical_times() -> None:
    assert line([3e-4 + 2e-9 * size for size in SIZES]) == pytest.approx((3e-4, 2e-9))
    assert typical([4.0, 1.0, 2.0, 3.0, 90.0, 5.0, 6.0]) == 2.0


def test_words_follow_from_curves() -> None:
    terms = {"compute": [3.0, 3.0, 3.0], "gradients": [1.0, 3.5, 1.0], "rows": [2.0, 2.0, 4.0]}
    assert crossings((1, 2, 4), terms) == [
        ("rows leads what is sent, from", 1),
        ("gradients leads what is sent, from", 2),
        ("rows leads what is sent, from", 4),
        ("gradients above compute, from", 2),
        ("rows above compute, from", 4),
        ("all that is sent above compute, from", 2),
    ]


def test_curves_and_plot(tmp_path: Path) -> None:
    """In weak scaling compute stays, in strong scaling it falls with the nodes; the plot is an svg, twice the same."""
    curves = {name: curve((1, 4), weak=name == "weak") for name in ("weak", "strong")}
    assert curves["weak"]["compute"][1] == pytest.approx(curves["weak"]["compute"][0], rel=0.05)
    assert curves["strong"]["compute"][1] == pytest.approx(curves["strong"]["compute"][0] / 4, rel=0.05)
    assert curves["weak"]["gradients"] == curves["strong"]["gradients"]
    for file in ("one.svg", "two.svg"):
        draw(tmp_path / file, curves, (1, 4))
    assert ET.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_real_ranks_are_measured() -> None:
    """One round of one repeat of 1, 2 and 4 ranks; of two quartiles need at least two, so two repeats."""
    found = scaling.measured(rounds=1, pictures=2, repeats=2)
    assert {ranks: len(times["step 1"]) for ranks, times in found.items()} == {1: 2, 2: 2, 4: 2}
    constants = fit(found, 2, cores=2)
    assert constants.each > 0
    assert all(value > 0 for value in (*constants.latency.values(), *constants.bandwidth.values()))
    names = [row["name"] for row in scaling.step_rows(found, constants, 2)]
    assert names[-1] == "step on 4 ranks: error"

"""benchmarks/fold_leak.py: that a blind network is blind, and what is compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autodo_dist.load_config import load_config
from benchmarks.fold_leak import compared, halved, words
from benchmarks.runs import CONFIG


def test_each_network_is_blind_to_the_half_that_judges_it(digits: Path, tmp_path: Path) -> None:
    found = halved(digits, "digits", 3)
    whole, blind = found["folded"], [found["blind 0"], found["blind 1"]]
    assert len(whole.validation) > 100
    for one, other in (blind, blind[::-1]):
        assert not np.intersect1d(one.train, one.validation).size
        assert np.array_equal(one.train, np.union1d(whole.train, other.validation))
        assert abs(len(one.validation) - len(whole.validation) / 2) <= 10
        assert np.array_equal(one.test, whole.test)
        assert np.array_equal(one.label_N, whole.label_N)
    for kind, split in found.items():
        config = load_config(CONFIG, words(tmp_path, digits, "digits", 3, kind, split, quick=True))
        assert config.learn.clean_folds == (2 if kind == "folded" else 0)
        assert (config.train.seed, config.train.epochs, config.learn.ensembling) == (3, 3, 0)
        assert config.data.split == tmp_path / f"{config.run.name}.split"
    halves = [load_config(CONFIG, words(tmp_path, digits, "digits", 3, k, found[k], quick=True)) for k in found]
    assert len({config.run.name for config in halves}) == 3


def test_differences_are_within_seeds() -> None:
    rows = compared("x", "%", [(0.5, 0.2, 0.4), (0.9, 0.6, 0.6)])
    assert [row["name"] for row in rows] == ["x, folded", "x, blind", "x, folded - blind"]
    assert [row["value"] for row in rows] == pytest.approx([0.7, 0.45, 0.25])
    assert rows[2]["standard_error"] == pytest.approx(0.05)

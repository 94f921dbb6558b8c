"""The comparison of plain training and AutoDO: what its table says of given results, and a short run of it."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from autodo_dist.errors import AutodoError
from benchmarks import results
from benchmarks.results import DISTORTIONS, METHODS, Cell, figures, table


def summaries(errors: dict[str, list[float]]) -> dict[Cell, dict[str, Any]]:
    """The same test errors (percent, one a seed) for each distortion."""
    return {
        Cell(*them, method, seed): {"test_accuracy_final": 1 - error / 100, "seconds": {"imports": 7.0, "task": 90.0}}
        for them in DISTORTIONS
        for method in METHODS
        for seed, error in enumerate(errors[method])
    }


def test_the_table_says_mean_deviation_and_paired_difference() -> None:
    rows = figures(summaries({"plain": [10.0, 12.0, 14.0], "AutoDO": [9.0, 12.5, 9.5]}), jobs=2)
    assert [row["value"] for row in rows] == pytest.approx([12, 31 / 3, -5 / 3] * 2 + [12 * 90 / 60 / 2])
    assert rows[0]["std"] == pytest.approx(2.0)
    assert rows[2]["std"] == pytest.approx(2.5658007)  # of -1, 0.5 and -4.5, divided by n - 1
    assert rows[-1]["holds"] is True
    assert "| IR 1, noise 0.4 | 12.00 ± 2.00 % | 10.33 ± 1.89 % | -1.67 ± 2.57 % (2 of 3 better) |" in table(rows, 3)


def test_it_trains_goes_on_and_names_a_run_that_failed(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four short runs; the second call only reads them."""
    monkeypatch.setattr(results, "DISTORTIONS", DISTORTIONS[1:])
    file = tmp_path / "rows.json"
    call = functools.partial(results.main, root=tmp_path, jobs=2, quick=True, json_file=file, readme=None)
    words = [f"data.root={digits}", "data.image_size=16", "train.steps_per_pass=4"]
    call(words=words)
    shown = capsys.readouterr().out
    with monkeypatch.context() as nothing_starts:
        nothing_starts.setattr(subprocess, "run", None)
        call(words=words)
    assert capsys.readouterr().out == shown
    starts = [json.loads(path.read_text())["starts"] for path in tmp_path.glob("quick/*/environment.json")]
    assert [len(each) for each in starts] == [1, 1, 1, 1]
    rows = json.loads(file.read_text())
    summary = json.loads((tmp_path / "quick/ir1-noise0.4-autodo-seed1/summary.json").read_text())
    assert rows[1]["seeds"][1] == pytest.approx(100 * (1 - summary["test_accuracy_final"]))
    assert summary["epochs"] == 2
    with pytest.raises(AutodoError, match=r"made with other settings \(optim.lr: 0.05 -> 0.1\)"):
        call(words=[*words, "optim.lr=0.1"])
    with pytest.raises(AutodoError, match=r"seed0: failed, see .*\.log: error: train.batch_size = 9000: more than"):
        call(root=tmp_path / "other", words=[f"data.root={digits}", "train.batch_size=9000"])

"""The benchmark of signals, dead and hung ranks: its figures, and a real trial of the quick kinds."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import slurm_faults
from benchmarks.chaos import CASES
from benchmarks.slurm_faults import dead_figures, hung_figures, percentile, quiet_figures, signal_figures, table


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [row["holds"] for row in rows]


def signals(*statuses_and_ends: tuple[int, bool]) -> list[dict[str, Any]]:
    return [{"status": status, "equal": equal} for status, equal in statuses_and_ends]


def test_figures_of_signals() -> None:
    rows = signal_figures(signals((75, True), (143, True), (1, True)))
    assert [row["value"] for row in rows] == [3, 2, 1]
    assert verdicts(rows) == [True, None, None]
    rows = signal_figures(signals((75, True), (75, False)))
    assert (rows[0]["value"], rows[0]["holds"], len(rows[0]["unequal"])) == (1, False, 1)


def test_figures_of_dead_ranks() -> None:
    trial = {"seen": 0.1, "stopped": 0.4, "said": True}
    assert verdicts(dead_figures([trial] * 20)) == [True, True, True]
    assert verdicts(dead_figures([trial] * 18 + [trial | {"stopped": 9.0}] * 2)) == [True, True, False]
    assert verdicts(dead_figures([trial] * 18 + [trial | {"seen": 3.0}] * 2)) == [True, False, True]
    assert verdicts(dead_figures([trial, trial | {"seen": None}])) == [False, True, True]
    assert verdicts(dead_figures([trial, trial | {"said": False}])) == [False, True, True]


def test_figures_of_hung_ranks() -> None:
    trial = {"right": True, "stack": True, "seconds": 12.0}
    assert verdicts(hung_figures([trial] * 20)) == [True, True]
    for bad in ({"right": False}, {"stack": False}):
        assert verdicts(hung_figures([trial] * 19 + [trial | bad])) == [False, True]
    assert verdicts(hung_figures([trial] * 18 + [trial | {"seconds": 40.0}] * 2)) == [True, False]
    assert percentile([]) == float("inf")


def test_figures_of_the_quiet_run_and_the_table() -> None:
    trial = {"minutes": 8.0, "stops": 90, "longest": 7.9, "alarms": 0}
    rows = [quiet_figures([trial])[0], quiet_figures([trial | {"alarms": 1}])[0]]
    assert verdicts(rows) == [True, False]
    rows[0] |= {"command": "python -m it", "machine": "here"}
    lines = table(rows).splitlines()
    assert lines[0] == "`python -m it` on here, local executor, warm starts"
    assert (
        lines[-2]
        == "| train.hang_after=20: false alarms in 8.0 minutes, 90 stops of up to 7.9 s | 0 alarms | <= 0 | holds |"
    )
    assert lines[-1].endswith("| DOES NOT HOLD |")


def test_real_trials(digits: Path, tmp_path: Path) -> None:
    """A signal at a drawn moment, and a rank that is killed; those that hang are in test_surviving.py."""
    config = CASES[1].config(tmp_path, [f"data.root={digits}"])
    row = slurm_faults.signalled(CASES[1], config, seed=3)
    assert row["equal"], row
    assert row["status"] in (1, 75, 138, 140, 143)
    row = slurm_faults.dead(CASES[1], config, seed=4)
    assert row["said"]
    assert 0 <= row["seen"] < 20
    assert 0 < row["stopped"] < 20


def test_it_goes_on_after_a_stop(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[tuple[str, int]] = []

    def stub(kind: str, row: dict[str, Any], *given: Any) -> dict[str, Any]:
        seeds.append((kind, given[-1]))
        return row

    rows = {
        "signalled": {"status": 75, "equal": True},
        "dead": {"seen": 0.1, "stopped": 0.4, "said": True},
        "hung": {"right": True, "stack": True, "seconds": 12.0},
        "quiet": {"minutes": 1.0, "stops": 9, "longest": 7.9, "alarms": 0},
    }
    for name, row in rows.items():
        monkeypatch.setattr(slurm_faults, name, functools.partial(stub, name, row))
    monkeypatch.setattr(slurm_faults.warm, "server", lambda: None)
    call = functools.partial(
        slurm_faults.main, root=tmp_path, kills=1, hangs=1, minutes=1.0, quick=False, words=[f"data.root={digits}"]
    )
    for count in (2, 3):
        with pytest.raises(typer.Exit) as ended:
            call(signals=count, json_file=tmp_path / "rows.json")
        assert ended.value.exit_code == 0
    assert [seed for kind, seed in seeds if kind == "signalled"] == [0, 1, 2]
    assert len(seeds) == 6
    written = json.loads((tmp_path / "rows.json").read_text())
    assert (written[0]["value"], written[0]["unit"]) == (3, "of 3")
    assert "| signal at a random moment: equal to the bit | 3 of 3 | >= 3 | holds |" in capsys.readouterr().out
    rows["hung"]["right"] = False
    with pytest.raises(typer.Exit) as ended:
        call(signals=3, hangs=2, json_file=None)
    assert ended.value.exit_code == 1

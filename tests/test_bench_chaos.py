"""The benchmark of many kills: its figures, a stop between trials, and trials of its own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from autodo_dist.errors import AutodoError
from autodo_dist.proof.plan import Place, named
from benchmarks import chaos
from benchmarks.chaos import CASES, PHASES, Case, draw, figures, kind, table


def trial(seed: int, **changes: Any) -> dict[str, Any]:
    row = {"seed": seed, "aim": "task", "fell": "data", "saving": False, "missed": 0, "equal": True, "lost": 2.0}
    return row | {"git_commit": "abc", "case": "shared-2", "kill": "there", "differences": []} | changes


def test_the_figures() -> None:
    rows = figures([trial(7), trial(8, saving=True, missed=2, lost=5.0), trial(9, aim="save", lost=3.0)], "all")
    assert {row["name"]: row["value"] for row in rows} == {
        "trials equal to the unbroken run": 3,
        "kills aimed at save": 1,
        "kills aimed at task": 2,
        "kills that fell in data": 3,
        "kills that broke off a save": 1,
        "kills drawn anew, as the run had ended": 2,
        "lost by a kill, all, median": 3.0,
    }
    assert (rows[0]["holds"], rows[0]["bar"], rows[0]["seeds"], rows[0]["commits"]) == (True, ">= 3", [7, 9], ["abc"])
    assert "| trials equal to the unbroken run | 3 of 3 |" in table(rows)


def test_one_unequal_trial_does_not_hold() -> None:
    bad = trial(8, equal=False, differences=["first", "second"])
    rows = figures([trial(7), bad], "all")
    assert (rows[0]["value"], rows[0]["holds"], rows[0]["unequal"]) == (1, False, [bad])
    assert chaos.told(bad).startswith("seed 8, shared-2: there; NOT EQUAL: first;")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kill_is_aimed_at_its_phase(case: Case) -> None:
    """A hyper step of the shared way is a task step of the second epoch, from step 8 on."""
    config = named(case.config(Path(), ["data.root=data"]), "", case.ranks)
    for phase in PHASES:
        aims = [draw(phase, config, np.random.default_rng(seed)) for seed in range(200)]
        assert {aim.rank for aim in aims} == set(range(case.ranks))
        assert {kind(config, aim.place.phase, aim.place.steps) for aim in aims} == {phase}
        steps = {aim.place.steps for aim in aims}
        if phase == "hyper":
            assert steps == set(range(8, 16))
            assert {aim.place.phase for aim in aims} == {"hyper" if case.way == "separate" else "task"}
        if phase == "evaluation":
            assert steps == ({8, 24} if case.way == "separate" else {8, 16})
        assert (aims[0].place == Place("start", 0)) == (phase == "start")


def test_it_goes_on_after_a_stop(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill in a start and one in a task step, both real; the second call only reads them."""
    call = functools.partial(chaos.main, root=tmp_path, seed=3, quick=False, cold=False)
    words = [f"data.root={digits}"]
    with pytest.raises(typer.Exit) as ended:
        call(trials=1, json_file=None, words=words)
    assert ended.value.exit_code == 0
    with pytest.raises(typer.Exit) as ended:
        call(trials=2, json_file=tmp_path / "rows.json", words=words)
    assert ended.value.exit_code == 0
    shown = capsys.readouterr().out.splitlines()[-6:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert (rows[0]["value"], rows[0]["unit"], rows[0]["seeds"]) == (2, "of 2", [3, 4])
    kept = [json.loads(line) for line in (tmp_path / "warm/trials.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["aim"]) for row in kept] == [(3, "start"), (4, "task")]
    assert len({digest for row in kept for digest in row["sha256"]}) == 1
    assert not list(tmp_path.glob("warm/*/trial-*/checkpoints"))
    with monkeypatch.context() as nothing_starts:
        nothing_starts.setattr(chaos, "run_trial", None)
        with pytest.raises(typer.Exit):
            call(trials=2, json_file=None, words=words)
    assert capsys.readouterr().out.splitlines()[-6:] == shown
    with pytest.raises(AutodoError, match=r"other settings \(optim\.lr: 0\.05 -> 0\.1\); choose another --root"):
        call(trials=3, json_file=None, words=[*words, "optim.lr=0.1"])

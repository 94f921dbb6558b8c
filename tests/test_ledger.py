"""The ledger of a run's starts, and what it makes of their time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autodo_dist import ledger
from autodo_dist.commands.goodput import goodput, table
from autodo_dist.errors import AutodoError

Event = dict[str, Any]


def start(attempt: str, begun: float, step: int, kept: dict[str, float], **more: Any) -> Event:
    event = {"event": "start", "attempt": attempt, "begun": begun, "time": begun + 10, "silent_since": begun - 5}
    event |= {"step": step, "ranks": 4, "seconds": {"imports": 7.0, "build": 3.0}, "kept": kept}
    return event | {"lost_steps": 0, "lost_seconds": 0.0} | more


def end(attempt: str, time: float, cause: str, **more: Any) -> Event:
    return {"event": "end", "attempt": attempt, "time": time, "cause": cause, "why": f"as {cause}", "at": ""} | more


# From 1000 to 1300: failed at step 60 after a save at 40, started again, stopped at 90, started again, finished.
RUN = [
    start("7/0", 1000, 0, {}),
    end("7/0", 1070, "failed"),
    start("7/1", 1080, 40, {"task": 30.0, "data": 4.0, "save": 1.0}, lost_steps=20, lost_seconds=15.0),
    end("7/1", 1150, "stopped", step=90, seconds={"task": 80.0, "data": 8.0, "save": 3.0}),
    start("7/2", 1200, 90, {"task": 80.0, "data": 8.0, "save": 3.0}),
    end("7/2", 1300, "finished", step=150, seconds={"task": 120.0, "hyper": 20.0, "evaluation": 10.0, "data": 12.0})
    | {"save": 5.0},
]


def test_where_the_time_went() -> None:
    found = ledger.goodput(RUN, now=9999.0)
    assert found["total"] == 300.0
    assert found["seconds"] == {
        "useful": 150.0,
        "data": 12.0,
        "save": 0.0,
        "start": 30.0,
        "lost": 15.0,
        "between": 60.0,
        "other": 33.0,
    }
    assert sum(found["seconds"].values()) == found["total"]
    assert (found["steps"], found["lost_steps"]) == (150, 20)
    assert [(it["step"], it["cause"], it["why"]) for it in found["attempts"]] == [
        (0, "failed", "as failed"),
        (40, "stopped", "as stopped"),
        (90, "finished", "as finished"),
    ]
    lines = table(found)
    assert "useful        150.0 s   50.0%" in lines[0]
    assert lines[-3].endswith("70.0 s  4 ranks from step 0, failed: as failed")
    assert "150 steps, 20 done again" in "\n".join(lines)


def test_a_run_that_goes_on_and_one_whose_end_nobody_saw() -> None:
    now = ledger.goodput(RUN[:1], now=1050.0)
    assert (now["total"], now["attempts"][0]["cause"]) == (50.0, "running")
    found = ledger.goodput([RUN[0], *RUN[2:]], now=9999.0)["attempts"]
    assert [it["cause"] for it in found] == ["lost", "stopped", "finished"]
    assert (found[0]["ended"], found[0]["why"]) == (1075.0, "no word: its node or its launcher died")


def test_lines_come_back_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    assert ledger.read(tmp_path) == []
    for event in RUN:
        ledger.add(tmp_path / "run", event)
    file = tmp_path / "run" / ledger.NAME
    with file.open("a") as half:
        half.write('{"event": "start", "atte')
    assert ledger.read(tmp_path / "run") == RUN
    ledger.add(tmp_path / "run", RUN[0])  # after the half line of a power cut
    assert ledger.read(tmp_path / "run") == [*RUN, RUN[0]]


def test_starts_ends_and_failures_are_of_their_job() -> None:
    events = [*RUN, start("8/0", 1400, 150, {}), end("8/0", 1500, "failed", kind="bug")]
    assert ledger.ended(events, "7/1") == RUN[3]
    assert ledger.ended(RUN[:1], "7/0") is None
    assert ledger.started(events, "7/2") == RUN[4]
    assert ledger.started(events, "7/3") is None
    assert [it["attempt"] for it in ledger.failures(events, "7")] == ["7/0"]
    assert [it["attempt"] for it in ledger.failures(events, "8")] == ["8/0"]


def test_steps_that_are_done_again(tmp_path: Path) -> None:
    rows = [{"step": 30, "seconds": 3.0}, {"step": 40, "seconds": 4.0}, {"step": 40, "kind": "evaluation"}]
    rows += [{"step": 50, "seconds": 5.0}, {"step": 60, "seconds": 6.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert ledger.lost(file, 40) == (20, 11.0)
    assert ledger.lost(file, 60) == (0, 0.0)
    assert ledger.lost(tmp_path / "none", 60) == (0, 0.0)


def test_the_attempt_is_job_and_restart() -> None:
    assert ledger.attempt({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "7/2"
    assert ledger.attempt({"SLURM_JOB_ID": "7"}) == "7/0"
    assert ledger.attempt({}) == ""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AutodoError, match=r"no ledger\.jsonl there; name the folder"):
        goodput(tmp_path)
    for event in RUN:
        ledger.add(tmp_path, event)
    goodput(tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out) == ledger.goodput(RUN, now=0.0)
    goodput(tmp_path)
    assert "between        60.0 s   20.0%  from an end to the next start: queue" in capsys.readouterr().out


def test_a_disk_that_takes_no_line_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the folder's place")
    ledger.add(tmp_path / "run", RUN[0])
    with pytest.raises(AutodoError, match="cannot be read"):
        ledger.read(tmp_path / "run")

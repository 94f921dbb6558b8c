"""Whether a run that failed is started again, and what the exit trap of a Slurm job makes of its end."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from autodo_dist import ledger
from autodo_dist.errors import AutodoError, OutageError
from autodo_dist.files import write_text
from launcher.failures import kind_of, record
from launcher.restart import after_job, decision, trap_line
from launcher.slurm_job import Answer
from launcher.verdict import check_start, first_cause, note_failure, place, refusal

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:2455: Connection reset by peer"


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start of job 7, of three ranks."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def restarted(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))


def fail(monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int, kind: str, message: str, at: str = "task:8") -> None:
    """What a rank leaves."""
    with monkeypatch.context() as environment:
        environment.setenv("SLURM_PROCID", str(rank))
        record(folder, kind, message, at)  # type: ignore[arg-type]
    time.sleep(0.002)


def failed(*kinds_and_places: str) -> list[dict[str, Any]]:
    return [dict(zip(("kind", "at"), text.split(), strict=True)) for text in kinds_and_places]


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        (failed("bug task:8"), ""),
        (failed("bug task:8", "bug task:9"), ""),
        (failed("bug task:8", "bug data:8"), "failed at the same place before (data:8)"),
        (failed("bug task:8", "death task:9", "hang task:8"), ""),  # it came further in between
        (failed("bug task:8", "slurm -", "bug task:8"), "same place"),
        (failed("outage start", "outage start"), "same place"),
        (failed("bug evaluation", "bug evaluation"), ""),  # of which epoch?
        (failed("bug metrics:8", "bug task:8"), ""),  # one is only about there
        (failed("lost metrics:8", "lost metrics:8"), "same place"),
        (failed("user task:8"), "this is to be mended first"),
        (failed("bug task:1", "bug task:2", "bug task:3"), ""),
        (failed("bug task:1", "bug task:2", "bug task:3", "bug task:4"), "launch.max_restarts = 3 restarts were made"),
        (failed("bug task:1", "lost task:2", "lost task:3", "slurm -", "bug task:4"), ""),  # nodes died
    ],
)
def test_what_is_not_started_again(failures: list[dict[str, Any]], said: str) -> None:
    found = refusal(failures, 3)
    assert said in found
    assert bool(found) == bool(said)


def test_no_restart_is_made_where_none_may_be() -> None:
    assert refusal(failed("bug task:8"), 0) == "launch.max_restarts = 0 restarts were made"


@pytest.mark.parametrize(
    ("at", "compared"),
    [("task:12", "12"), ("save:12", "12"), ("start", "start"), ("metrics:12", "metrics:12"), ("", ""), ("save", "")],
)
def test_the_place(at: str, compared: str) -> None:
    assert place(at) == compared


def test_the_cause_is_the_first_that_is_no_lost_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, tmp_path, 0, "peer", LOST, "task:9")
    fail(monkeypatch, tmp_path, 2, "death", "ended without a word")
    fail(monkeypatch, tmp_path, 1, "bug", "a later one")
    why, kind, at = first_cause(tmp_path, "7/0")
    assert (why.split(" on ")[0], kind, at) == ("rank 2", "death", "task:8")
    fail(monkeypatch, tmp_path, 1, "hang", "hangs in task")
    assert first_cause(tmp_path, "7/0")[1] == "hang"
    assert first_cause(tmp_path, "7/1") == ("", "bug", "")  # of another start


def test_where_peers_alone_speak_the_silent_ranks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, tmp_path, 1, "peer", LOST)
    write_text(tmp_path / "errors/rank-00002.json", '{"time": 1.0, "ra')  # its node died in the middle of it
    assert first_cause(tmp_path, "7/0")[0].startswith("no word from rank 0, 2: is a node dead? rank 1 on ")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AutodoError("x"), "user"),
        (OutageError("x"), "outage"),
        (ValueError("x"), "bug"),
        (RuntimeError(LOST), "peer"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:3"), "peer"),
    ],
)
def test_kinds(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


# After a job ---------------------------------------------------------------------------------------------------------


def start(folder: Path, attempt: str, step: int) -> None:
    ledger.add(folder, {"event": "start", "attempt": attempt, "step": step})


def end(folder: Path, attempt: str, cause: str) -> None:
    ledger.add(folder, {"event": "end", "attempt": attempt, "cause": cause, "why": "asked to; saved at step 9"})


def test_a_run_that_was_asked_to_stop_is_requeued_and_a_finished_one_is_not(tmp_path: Path) -> None:
    end(tmp_path, "7/0", "stopped")
    assert after_job(tmp_path, 0, 0, "") == "asked to; saved at step 9"
    assert after_job(tmp_path, 0, 143, "Slurm ends the job: COMPLETING") == ""
    end(tmp_path, "7/0", "finished")
    assert after_job(tmp_path, 3, 0, "") == ""
    assert len(ledger.read(tmp_path)) == 2


def test_what_slurm_does_by_itself_is_noted_and_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, tmp_path, 0, "peer", LOST)
    assert after_job(tmp_path, 3, 143, "Slurm ends the job: CANCELLED") == ""
    (noted,) = ledger.read(tmp_path)
    assert (noted["cause"], noted["kind"], noted["why"]) == ("failed", "slurm", "Slurm ends the job: CANCELLED")


def test_a_users_error_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, tmp_path, 1, "user", "data x: no such folder")
    with pytest.raises(AutodoError, match=r"rank 1 on .*: data x: no such folder; not started again: .* to be mended"):
        after_job(tmp_path, 3, 1, "")


def test_the_same_step_twice_ends_it_without_any_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks were killed at once, wardens and all: metrics.jsonl alone tells how far they came."""
    start(tmp_path, "7/0", 0)
    write_text(tmp_path / "metrics.jsonl", '{"step": 30, "seconds": 1.0}\n')
    assert after_job(tmp_path, 3, 137, "") == (
        "srun exited with status 137, and no rank left a word (restart 1 of at most 3)"
    )
    assert ledger.read(tmp_path)[-1]["at"] == "metrics:30"
    restarted(monkeypatch, 1)
    start(tmp_path, "7/1", 20)
    write_text(tmp_path / "metrics.jsonl", '{"step": 40, "seconds": 1.0}\n')
    assert after_job(tmp_path, 3, 137, "").endswith("(restart 2 of at most 3)")
    restarted(monkeypatch, 2)
    start(tmp_path, "7/2", 40)
    with pytest.raises(AutodoError, match=r"not started again: it failed at the same place before \(metrics:40\)"):
        after_job(tmp_path, 3, 137, "")


def test_restarts_are_counted_by_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        note_failure(tmp_path, f"6/{step}", "why", "bug", f"task:{step}")
    fail(monkeypatch, tmp_path, 1, "bug", "x", "task:2")
    assert after_job(tmp_path, 1, 1, "").endswith("(restart 1 of at most 1)")
    restarted(monkeypatch, 1)
    fail(monkeypatch, tmp_path, 1, "bug", "x", "task:3")
    with pytest.raises(AutodoError, match=r"launch\.max_restarts = 1"):
        after_job(tmp_path, 1, 1, "")


def test_a_start_notes_the_end_that_nobody_saw_and_refuses_the_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_start(tmp_path, 3)  # the first one
    start(tmp_path, "7/0", 20)
    restarted(monkeypatch, 1)
    check_start(tmp_path, 3)
    noted = ledger.ended(ledger.read(tmp_path), "7/0")
    assert noted is not None
    assert (noted["kind"], noted["at"], noted["why"]) == (
        "lost",
        "metrics:20",
        "no word from any rank: the first node died?",
    )
    check_start(tmp_path, 3)  # noted already
    assert len(ledger.read(tmp_path)) == 2
    start(tmp_path, "7/1", 20)
    restarted(monkeypatch, 2)
    with pytest.raises(AutodoError, match=r"same place before \(metrics:20\), and its job is not to go on"):
        check_start(tmp_path, 3)


def answer(state: str, restarts: int) -> Answer:
    return Answer("run", state, "None", "node[0-1]", "node0", 0, 0, restarts)


def test_what_slurm_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decision(answer("RUNNING", 0)) == ""
    assert decision(answer("COMPLETING", 1)) == "Slurm requeues the job by itself: preempted, or a node died"
    assert decision(answer("CANCELLED", 0)) == "Slurm ends the job: CANCELLED"
    assert "nothing" in decision(None)
    restarted(monkeypatch, 1)
    assert decision(answer("RUNNING", 1)) == ""


def test_the_trap_runs_in_a_shell_with_the_status(tmp_path: Path) -> None:
    logs = tmp_path / "a run's logs"
    script = f"{trap_line(logs, 'echo code')}\nexit 3\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (done.stdout, done.returncode) == (f"code -u -m launcher.restart {logs} 3\n", 3)

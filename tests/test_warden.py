"""The process beside a rank: which rank hangs, no false alarm where phases are slow, a word for a rank that died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autodo_dist import heartbeat
from autodo_dist.heartbeat import Heart
from launcher import warden
from launcher.failures import Failure, read_failures
from launcher.warden import POLL_S, Position, Warden, culprit


def position(rank: int, phase: str, step: int, stopped: bool = False, seconds: float = 60.0) -> Position:
    return Position("7/0", rank, "host", phase, step, stopped, seconds)


@pytest.mark.parametrize(
    ("positions", "hangs"),
    [
        ([position(0, "task", 9), position(1, "task", 9, stopped=True), position(2, "data", 9)], 1),
        ([position(0, "task", 9), position(1, "task", 8), position(2, "task", 9)], 1),
        ([position(0, "task", 9), position(1, "task", 9), position(2, "data", 9)], 2),  # it is waited for in the step
        ([position(0, "data", 9), position(1, "evaluation", 9), position(2, "data", 9)], 1),
        ([position(0, "data", 9), position(1, "data", 9), position(2, "save", 9)], 2),
        ([position(0, "task", 9, seconds=60), position(1, "task", 9, seconds=61)], 1),
    ],
)
def test_the_rank_that_hangs_is_the_one_that_the_others_wait_for(positions: list[Position], hangs: int) -> None:
    assert culprit(positions).rank == hangs
    assert culprit(positions[::-1]).rank == hangs


class World:
    """A rank with its warden, both on a clock that goes by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, floor: float) -> None:
        self.now, self.state = 1000.0, "R"
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(warden, "state_of", lambda _: self.state)
        self.heart = Heart(floor)
        self.warden = Warden(self.heart, 1, 0, folder, 0, 1)

    def late(self, seconds: float) -> bool:
        """Let time go by; whether the warden finds that too long."""
        end, found = self.now + seconds, False
        while self.now < end:
            self.now += POLL_S
            limit = self.warden.look()
            found = found or self.warden.here > limit or self.warden.stopped > warden.STOPPED_S
        return found


def test_an_hour_of_slow_phases_is_no_hang_and_a_hang_after_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = World(monkeypatch, tmp_path, floor=60.0)
    begun = world.now
    assert not world.late(900.0)  # imports, build
    step = 0
    while world.now - begun < 4500:
        for phase, seconds in (("data", 20.0), ("task", 2.0), ("hyper", 45.0), ("save", 150.0), ("evaluation", 240.0)):
            world.heart.beat(phase, step)
            assert not world.late(seconds), phase
        step += 1
    world.heart.beat("task", step)
    assert not world.late(55.0)
    assert world.late(10.0)


def test_the_limit_is_of_the_phase(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, floor=60.0)
    for step in range(5):
        for phase, seconds in (("task", 1.0), ("save", 100.0)):
            world.heart.beat(phase, step)
            world.late(seconds)
    world.heart.beat("save", 5)
    assert not world.late(1900.0)
    assert world.late(200.0)


def test_a_stopped_rank_is_seen_in_any_phase_and_a_stop_of_both_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = World(monkeypatch, tmp_path, floor=60.0)
    world.state = "T"
    assert not world.late(warden.STOPPED_S - 1)
    assert world.late(2.0)
    world.state = "R"
    world.heart.beat("task", 1)
    world.warden.look()
    world.now += 5000.0  # the machine stood still
    world.state = "T"
    assert not world.late(1.0)
    world.state = "R"
    world.heart.beat("task", 2)
    assert not world.late(5.0)


RANK = """
import os, signal, sys, time
from pathlib import Path
from autodo_dist import heartbeat
from launcher import failures, warden
folder = Path(sys.argv[1])
warden.guard(heartbeat.start(60.0), folder, 1, 2)
heartbeat.beat("task", 1207)
print("on", flush=True)
"""


def end_of(folder: Path, program: str, kill: bool = False) -> list[Failure]:
    """What is recorded of a rank with this program, once it and its warden are gone."""
    environment = os.environ | {"SLURM_PROCID": "1", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK + program, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "on\n"
    if kill:
        rank.kill()
    assert rank.stdout.read() == ""  # at its end, for which the warden keeps it open
    rank.wait()
    return read_failures(folder, "7/2")


def test_a_rank_that_is_killed_has_a_record_with_its_place(tmp_path: Path) -> None:
    begun = time.time()
    (found,) = end_of(tmp_path, "time.sleep(60)", kill=True)
    assert (found.rank, found.kind, found.at, found.attempt) == (1, "death", "task:1207", "7/2")
    assert begun < found.time < begun + 10


@pytest.mark.parametrize("program", ["os.fork() and os.kill(os.getpid(), signal.SIGSEGV); time.sleep(1)"])
def test_a_child_that_outlives_the_rank_does_not_hide_its_death(tmp_path: Path, program: str) -> None:
    (found,) = end_of(tmp_path, program)
    assert found.kind == "death"


def test_a_rank_that_ends_well_has_none(tmp_path: Path) -> None:
    assert end_of(tmp_path, "heartbeat.pause(heartbeat.OVER)") == []


def test_a_rank_that_said_why_keeps_its_record(tmp_path: Path) -> None:
    (found,) = end_of(tmp_path, "failures.record(folder, 'bug', 'mine', 'task:1207'); os._exit(1)")
    assert (found.kind, found.message) == ("bug", "mine")
    assert json.loads((tmp_path / "errors/rank-00001.json").read_text())["kind"] == "bug"


def test_a_warden_is_deaf_to_the_signals_of_its_rank(tmp_path: Path) -> None:
    program = "time.sleep(1); os.killpg(os.getpid(), signal.SIGUSR2); time.sleep(60)"  # as scancel does
    environment = os.environ | {"SLURM_PROCID": "1", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK + program, str(tmp_path)],
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    rank.communicate(timeout=20)
    assert rank.returncode == -signal.SIGUSR2
    (found,) = read_failures(tmp_path, "7/2")
    assert found.kind == "death"

"""Signs of life: limits that are learnt from the run, and memory that another process reads."""

from __future__ import annotations

import os

import pytest

from autodo_dist import heartbeat
from autodo_dist.heartbeat import KNOWN, LENIENCE, REMEMBERED, UNKNOWN, Heart


class Time:
    """A clock that goes by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)

    def phases(self, heart: Heart, name: str, *seconds: float) -> None:
        for taken in seconds:
            heart.beat(name, 7)
            self.now += taken
        heart.pause("start")


def test_a_phase_that_is_not_known_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    time, heart = Time(monkeypatch), Heart(60.0)
    assert heart.limit("task") == UNKNOWN * 60
    time.phases(heart, "task", *[0.1] * (KNOWN - 1))
    assert heart.limit("task") == UNKNOWN * 60
    time.phases(heart, "task", 0.1)
    assert heart.limit("task") == 60.0
    assert heart.limit("save") == UNKNOWN * 60


def test_limits_follow_the_run_and_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    time, heart = Time(monkeypatch), Heart(60.0)
    time.phases(heart, "task", 400.0, *[0.1] * 8)  # the first one compiles
    time.phases(heart, "hyper", *[30.0] * 5)
    assert heart.limit("task") == 60.0
    assert heart.limit("hyper") == LENIENCE * 30
    time.phases(heart, "hyper", *[1.0] * REMEMBERED)
    assert heart.limit("hyper") == 60.0


def test_what_lies_outside_of_a_phase_does_not_count_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    time, heart = Time(monkeypatch), Heart(1.0)
    for _ in range(KNOWN):
        heart.beat("save", 3)
        time.now += 0.01
        heart.pause("start")
        time.now += 5000.0
    heart.beat("save", 4)
    heart.rest()
    time.now += 5000.0
    assert heart.limit("save") == 1.0


def test_places_and_limits_are_read_by_another_process() -> None:
    heart = Heart(2.0)
    assert (heart.read().at, heart.read().limit) == ("start", float("inf"))
    heart.beat("evaluation", 1_234_567)
    child = os.fork()
    if not child:
        beat = heart.read()
        os._exit(0 if (beat.at, beat.limit) == ("evaluation:1234567", 20.0) else 1)
    assert os.waitpid(child, 0)[1] == 0
    before = heart.read().count
    heart.rest()
    assert (heart.read().at, heart.read().limit) == ("evaluation:1234567", float("inf"))
    assert heart.read().count > before


def test_nothing_without_a_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_heart", None)
    heartbeat.beat("task", 3)
    heartbeat.pause("start")
    heartbeat.rest()
    assert heartbeat.here() == ""
    heart = heartbeat.start(1.0)
    heartbeat.beat("task", None)  # there is no run yet
    assert heart.read().at == "start"
    heartbeat.beat("task", 3)
    assert heartbeat.here() == "task:3"

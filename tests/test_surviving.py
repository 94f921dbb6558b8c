"""Real runs that are asked to stop, killed or held up at any moment, against one that nothing happened to.

Ranks are forked from a process that has imported everything (benchmarks/warm.py).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from autodo_dist import ledger
from autodo_dist.config import Config
from autodo_dist.files import write_text
from autodo_dist.load_config import check_config
from autodo_dist.proof.compare import compare
from autodo_dist.proof.kill import Launcher, parted, shown
from benchmarks import warm

RANKS = 3
LIMIT_S = 90.0


def config(digits: Path, root: Path, name: str, **launch: Any) -> Config:
    """Three epochs of 8 steps, with hyper passes in the second and third; saved every 5 steps."""
    tree: dict[str, Any] = {
        "run": {"root": str(root), "name": name},
        "data": {"root": str(digits), "image_size": 16, "crop": "padded", "crop_padding": 1, "flip": False},
        "model": {"name": "convnet"},
        "optim": {"lr": 0.05, "warmup_epochs": 1},
        "train": {"epochs": 3, "batch_size": 32, "steps_per_pass": 8, "log_every": 3, "hang_after": 3.0},
        "learn": {"augment": "per_sample", "weight": True, "soft_label": True},
        "hyper": {"start_epoch": 1, "way": "separate", "validation_every": 2},
        "checkpoint": {"every_steps": 5, "keep": 9},
        "launch": {"ranks_per_node": RANKS, "max_restarts": 0} | launch,
    }
    return check_config(tree, "of the test")


def start(settings: Config) -> tuple[Launcher, list[int]]:
    """Start the run; its launcher and the processes of its ranks."""
    file = settings.run.root / f"{settings.run.name}.yaml"
    write_text(file, settings.to_yaml())
    launcher = warm.start(file, log(settings))
    return launcher, ranks_of(launcher)


def ranks_of(launcher: Launcher, old: tuple[int, ...] = ()) -> list[int]:
    """The processes of a launcher's ranks, in order, as soon as all are there that are not `old`."""
    found: list[psutil.Process] = []
    deadline = time.monotonic() + LIMIT_S
    while len(found) < RANKS and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.01)
        with suppress(psutil.NoSuchProcess):
            found = [it for it in psutil.Process(launcher.pid).children() if it.pid not in old]
    return [it.pid for it in sorted(found, key=lambda it: (it.create_time(), it.pid))]


def log(settings: Config) -> Path:
    """What the launcher and rank 0 print."""
    return settings.run.root / f"{settings.run.name}.log"


def end(launcher: Launcher) -> int:
    """The launcher's exit status."""
    deadline = time.monotonic() + LIMIT_S
    while (status := launcher.poll()) is None:
        assert time.monotonic() < deadline, "the launcher does not end"
        time.sleep(0.01)
    return status


def wait_until(pid: int, phase: str, steps: int) -> None:
    """Wait until a rank is in a phase, with so many steps done or more."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        name, done = parted(shown(pid))
        if done >= steps and name == phase:
            return
        assert psutil.pid_exists(pid), f"the rank ended before {phase} {steps}"
        time.sleep(0.0005)
    raise AssertionError(f"never came to {phase} {steps}")


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    settings = config(digits, tmp_path_factory.mktemp("unbroken"), "unbroken")
    launcher, _ = start(settings)
    assert end(launcher) == 0, log(settings).read_text()
    return settings.folder


def equal(settings: Config, unbroken: Path) -> bool:
    found = compare(unbroken, settings.folder)
    assert found.differences == ()
    return found.digests[0] == found.digests[1]


# Asked to stop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "steps"), [("data", 2), ("task", 6), ("hyper", 10), ("evaluation", 8), ("save", 5), ("evaluation", 40)]
)
def test_usr2_to_one_rank_stops_all_at_the_same_step(
    digits: Path, tmp_path: Path, unbroken: Path, phase: str, steps: int
) -> None:
    settings = config(digits, tmp_path, "asked")
    launcher, ranks = start(settings)
    wait_until(ranks[1], phase, steps)
    os.kill(ranks[1], signal.SIGUSR2)
    assert end(launcher) == 75, log(settings).read_text()
    assert "stopped as asked" in log(settings).read_text()
    assert not (settings.folder / "summary.json").exists()
    (_, stopped) = ledger.read(settings.folder)
    assert (stopped["cause"], stopped["step"] - steps in range(12)) == ("stopped", True)
    assert (settings.folder / f"checkpoints/step-{stopped['step']:08d}").is_dir()
    assert not list((settings.folder / "errors").glob("*"))
    launcher, _ = start(settings)
    assert end(launcher) == 0
    assert equal(settings, unbroken)
    assert [it["step"] for it in ledger.read(settings.folder) if it["event"] == "start"] == [0, stopped["step"]]
    assert ledger.goodput(ledger.read(settings.folder), time.time())["lost_steps"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_says_how_to_go_on(
    digits: Path, tmp_path: Path, unbroken: Path, number: signal.Signals
) -> None:
    settings = config(digits, tmp_path, "signalled")
    launcher, ranks = start(settings)
    wait_until(ranks[0], "hyper", 12)
    os.kill(launcher.pid, number)
    assert end(launcher) == 128 + number
    assert f"stopped by {number.name}; saved, the same command goes on" in log(settings).read_text()
    launcher, _ = start(settings)
    assert end(launcher) == 0
    assert equal(settings, unbroken)


def test_a_second_signal_ends_at_once(digits: Path, tmp_path: Path) -> None:
    settings = config(digits, tmp_path, "twice")
    launcher, ranks = start(settings)
    wait_until(ranks[0], "task", 3)
    os.kill(ranks[1], signal.SIGSTOP)  # so no step comes to its end
    os.kill(launcher.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert launcher.poll() is None
    begun = time.monotonic()
    os.kill(launcher.pid, signal.SIGTERM)
    assert end(launcher) == 143
    assert time.monotonic() - begun < 5
    assert "all ranks have ended" in log(settings).read_text()


# Dead and hung --------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_started_again(digits: Path, tmp_path: Path, unbroken: Path) -> None:
    settings = config(digits, tmp_path, "killed", max_restarts=2)
    launcher, ranks = start(settings)
    wait_until(ranks[2], "task", 18)
    os.kill(ranks[2], signal.SIGKILL)
    assert end(launcher) == 0, log(settings).read_text()
    text = log(settings).read_text()
    assert "error: rank 2 was killed by signal 9 (SIGKILL)" in text
    assert "starting again (1 of at most 2)" in text
    assert equal(settings, unbroken)
    causes = [it["cause"] for it in ledger.read(settings.folder) if it["event"] == "end"]
    assert causes == ["failed", "finished"]


def test_a_run_that_fails_at_the_same_step_twice_is_not_started_again(digits: Path, tmp_path: Path) -> None:
    settings = config(digits, tmp_path, "cursed", max_restarts=5)
    launcher, ranks = start(settings)
    old: tuple[int, ...] = ()
    for _ in range(2):
        wait_until(ranks[1], "evaluation", 8)
        os.kill(ranks[1], signal.SIGKILL)
        old = (*old, *ranks)
        ranks = ranks_of(launcher, old)
    assert end(launcher) == 1
    assert "not started again: it failed at the same place before (evaluation:8)" in log(settings).read_text()


def test_a_stopped_rank_is_named_with_its_stack_and_the_run_goes_on(
    digits: Path, tmp_path: Path, unbroken: Path
) -> None:
    settings = config(digits, tmp_path, "stopped", max_restarts=1)
    launcher, ranks = start(settings)
    wait_until(ranks[2], "task", 2)  # woken for its stack, it must not come to the end before it is killed
    os.kill(ranks[2], signal.SIGSTOP)
    begun = time.monotonic()
    assert wait_for(lambda: "rank 2 hangs in" in log(settings).read_text(), 30.0), log(settings).read_text()
    assert time.monotonic() - begun < 30
    stack = (settings.folder / "logs/rank-00002.out").read_text()
    assert "Current thread" in stack or "most recent call first" in stack
    assert "train.py" in stack
    assert end(launcher) == 0
    assert equal(settings, unbroken)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met

"""The user's own commands, from packed digits to an evaluated checkpoint, with two ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_train import assert_equal_states, lines, weights

from autodo_dist.ledger import START

ROOT = Path(__file__).parent.parent


def submit(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "launcher/submit.py"), "--config", str(ROOT / "configs/digits.yaml"), *words]


@pytest.fixture
def words(digits: Path, tmp_path: Path) -> list[str]:
    """Two epochs of 14 steps, saved every 3, and a hyper pass of 14 between them."""
    short = [
        "train.epochs=2",
        "hyper.start_epoch=1",
        "hyper.way=separate",
        "hyper.terms=5",
        "optim.warmup_epochs=1",
        "train.batch_size=45",
        "train.log_every=3",
    ]
    return [
        *short,
        f"data.root={digits}",
        f"run.root={tmp_path}",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
        "launch.max_restarts=0",
    ]


def test_two_ranks_from_submit_to_evaluate(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(submit(*words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "digits"
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary["epochs"] == 2
    assert summary["steps"] == 42
    assert set(summary["seconds"]) == {*START, "data", "task", "hyper", "evaluation", "save"}
    assert summary["seconds_total"] == pytest.approx(sum(summary["seconds"].values()))
    assert list(summary["test_accuracy_per_class"]) == [str(digit) for digit in range(10)]
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["starts"][0]["hosts"]) == 2
    assert {row["kind"] for row in lines(folder)} == {"task", "hyper", "evaluation"}
    assert all(
        {"loss", "images_per_second", "data_wait_share", "peak_memory_bytes"} <= set(json.loads(line))
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "task"
    )
    log = (folder / "logs" / "rank-00000.log").read_text()
    assert "finished: test accuracy" in log

    again = subprocess.run(submit(*words), capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "is finished" in again.stdout

    evaluated = subprocess.run(["autodo", "evaluate", str(folder)], capture_output=True, text=True, check=True)
    found = re.search(r"step 42: test accuracy ([0-9.]+)", evaluated.stdout)
    assert found is not None
    assert float(found[1]) == pytest.approx(summary["test_accuracy_final"], abs=1e-6)


def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(words: list[str], tmp_path: Path) -> None:
    unbroken = subprocess.run(submit(*words, "run.name=unbroken"), capture_output=True, text=True, check=False)
    assert unbroken.returncode == 0, unbroken.stderr
    launcher = subprocess.Popen(submit(*words, "run.name=broken"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = tmp_path / "broken"
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-0000000[3-9]")) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = psutil.Process(launcher.pid).children()
    os.kill(max(ranks, key=lambda process: process.pid).pid, signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=5)
    assert launcher.returncode == 1
    assert "rank 1 was killed by signal 9 (SIGKILL)" in stderr.decode()
    assert not any(rank.is_running() for rank in ranks)
    assert not (folder / "summary.json").exists()

    resumed = subprocess.run(submit(*words, "run.name=broken"), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step" in resumed.stdout
    assert_equal_states(weights(folder, 42), weights(tmp_path / "unbroken", 42))
    assert lines(folder) == lines(tmp_path / "unbroken")


def test_an_error_on_every_rank_is_one_line(words: list[str], tmp_path: Path) -> None:
    failed = subprocess.run(submit(*words, "data.root=/nowhere"), capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    # The first to fail is named; it is rank 0 more often than not.
    (line,) = failed.stderr.splitlines()
    assert line.startswith("error: ")
    assert "data /nowhere: no such folder; pack one with `autodo pack`, or set data.root" in line
    assert not (tmp_path / "digits" / "config.yaml").exists()

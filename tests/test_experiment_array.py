"""An experiment as an array of tasks: their shares, and two real ones by submitit on this machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import submitit
import yaml
from typer.testing import CliRunner

from autodo_dist.cli import app
from autodo_dist.errors import AutodoError
from autodo_dist.experiment import results, runner
from autodo_dist.experiment.plan import plan, read_experiment
from autodo_dist.experiment.runner import Request
from launcher.experiment import hand_over, parameters, shares, submit

ROOT = Path(__file__).parent.parent
PLAIN = ["learn.augment=none", "learn.weight=false", "learn.soft_label=false"]


def request(folder: Path, data: Path | str, methods: int, seeds: int) -> Request:
    """Plain runs of two epochs that differ in their rates."""
    tree = {
        "name": "array",
        "config": str(ROOT / "configs/digits.yaml"),
        "settings": [
            *PLAIN,
            *(f"data.root={data}", "data.image_size=16", "train.epochs=2", "train.steps_per_pass=2"),
            *("optim.warmup_epochs=1", "train.device=cpu"),
        ],
        "seeds": seeds,
        "cells": {"A": []},
        "methods": {f"m{k}": {"settings": [f"optim.lr=0.0{k + 1}"], "ours": k == 0} for k in range(methods)},
    }
    file = folder / "array.yaml"
    file.write_text(yaml.safe_dump(tree))
    return Request(read_experiment(file), (), None, folder / "lines.jsonl", folder / "runs", 1)


@pytest.mark.parametrize("tasks", [1, 4, 7, 20])
def test_each_trial_is_one_tasks(tmp_path: Path, tasks: int) -> None:
    trials = plan(request(tmp_path, "data", 3, 5).experiment)
    parts = [runner.share(trials, task, tasks) for task in range(tasks)]
    assert Counter(trial.key for part in parts for trial in part) == Counter(trial.key for trial in trials)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_slurm_is_asked_for(tmp_path: Path) -> None:
    """A task of one process, with a CPU for each trial at a time unless that is set."""
    asked = request(tmp_path, "data", 1, 1)
    found = parameters(asked, "experiment-array", tmp_path / "logs")
    assert (found["nodes"], found["ntasks_per_node"], found["job_name"]) == (1, 1, "experiment-array")
    assert found["additional_parameters"]["cpus_per_task"] == 1
    more = Request(asked.experiment, ("launch.cpus_per_rank=6", "launch.partition=p"), None, Path("r"), Path("s"), 4)
    found = parameters(more, "name", tmp_path / "logs")["additional_parameters"]
    assert (found["cpus_per_task"], found["partition"]) == (6, "p")


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AutodoError, match="no sbatch and srun on PATH"):
        submit(request(tmp_path, "data", 1, 1), 2)


def test_the_command_hands_over_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With all that was asked for; the launcher's refusal is the command's."""
    request(tmp_path, "data", 1, 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["--executor", "slurm", "--tasks", "2", "--partition", "p", "--set", "train.epochs=1", "--seeds", "3"]
    places = ["--results", str(tmp_path / "lines.jsonl"), "--root", str(tmp_path / "runs"), "--keep"]
    assert CliRunner().invoke(app, ["experiment", str(tmp_path / "array.yaml"), *places, *words]).exit_code == 1
    assert capfd.readouterr().err.startswith("error: executor slurm: no sbatch and srun on PATH")


def test_two_tasks_by_submitit(digits: Path, tmp_path: Path) -> None:
    """Each writes a file of its own, all are read together; a task that is started again finds what it did."""
    asked = request(tmp_path, digits, 1, 2)
    executor = submitit.LocalExecutor(folder=tmp_path / "logs")
    executor.update_parameters(timeout_min=10)
    jobs = hand_over(executor, shares(asked, 2))
    assert [job.result() for job in jobs] == [1, 1], [job.stderr() for job in jobs]
    files = [runner.task_file(asked.results, task) for task in range(2)]
    assert [len(results.read(file)) for file in files] == [1, 1]
    assert set(runner.newest(asked)) == {trial.key for trial in plan(asked.experiment)}
    again = shares(asked, 2)[0]
    assert (again(), again.checkpoint().function) == (0, again)

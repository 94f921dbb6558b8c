"""A trial made in this process: trained, and what came of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.experiment import rivals
from autodo_dist.experiment.flops import budgeted, trial_flops
from autodo_dist.experiment.plan import Trial
from autodo_dist.experiment.results import Line, standing
from autodo_dist.files import read_json, read_json_lines
from autodo_dist.label_errors import measures, scores, suggestions
from autodo_dist.learnt import open_source, read_columns
from autodo_dist.train import train

TRAINING = ("data", "task", "hyper")  # phases of a run: no start, evaluation or save, which rivals do not have


@dataclass(frozen=True)
class Came:
    """What came of a training: shares of the test part, seconds, curve of (epochs, share)."""

    test: float
    best_test: float
    seconds: float
    curve: tuple[tuple[int, float], ...] = ()
    auroc: float | None = None
    right: float | None = None
    flops: float | None = None  # where the training counted them itself


def measure(trial: Trial, forked: bool, root: Path, data: str, commit: str | None) -> Line:
    """Train it to its end; a broken-off run goes on. forked: whether other trials fork its run, whose curve is kept.

    A fork's source must have been trained below the same root, by `train_source`. AutodoError for what the user can
    mend.
    """
    config = budgeted(trial)
    run = placed(trial, config, root)  # FLOPs are counted of the settings without a place, which trials share
    came = _rival(trial, run) if trial.rival else _trainer(trial, run, root)
    return Line(
        experiment=trial.experiment,
        method=trial.method,
        cell=trial.cell,
        seed=trial.seed,
        budget=trial.budget,
        epochs=config.train.epochs,
        settings=trial.words,
        rival=trial.rival,
        options=dict(trial.options),
        digest=trial.digest,
        data=data,
        commit=commit,
        test_error=_percent(came.test),
        best_test_error=_percent(came.best_test),
        auroc=came.auroc,
        right=came.right,
        seconds=round(came.seconds, 3),
        flops=came.flops or trial_flops(trial, config),
        curve=tuple((epoch, _percent(share)) for epoch, share in came.curve) if forked or trial.source else (),
    )


def as_at_equal_epochs(trial: Trial, lines: Sequence[Line], data: str) -> Line | None:
    """The line of a trial whose FLOPs are ours at the epochs as set, from that of the same training at equal epochs;
    None where there is no such line, or the epochs are others.
    """
    if trial.budget == "epochs" or budgeted(trial) != trial.config:
        return None
    twin = replace(trial, budget="epochs")
    line = standing([twin], lines, {trial.config.data.root: data}).done.get(twin.key)
    return line and line.model_copy(update={"budget": trial.budget, "digest": trial.digest})


def train_source(trial: Trial, first: int, root: Path) -> Path:
    """Train the run that others fork, keeping its checkpoints from epoch `first` on; its folder. A finished one is
    left as it is.
    """
    config = placed(trial, trial.config, root)
    keep = {"keep": config.train.epochs - first + 1, "every_steps": None}
    return _train(config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=keep)}))


def placed(trial: Trial, config: Config, root: Path) -> Config:
    """The settings with the trial's run folder, in which no more is kept than its figures need."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"root": root, "name": trial.name}),
            "checkpoint": config.checkpoint.model_copy(update={"keep": 1}),
            "history": config.history.model_copy(update={"samples": 0}),
        }
    )


def forget(trial: Trial, root: Path) -> None:
    """Delete what the trial left below the root."""
    shutil.rmtree(root / trial.name, ignore_errors=True)
    log_file(trial, root).unlink(missing_ok=True)


def log_file(trial: Trial, root: Path) -> Path:
    """Where the output of its run goes."""
    return root / f"{trial.name}.log"


def _trainer(trial: Trial, config: Config, root: Path) -> Came:
    source = trial.source
    seconds = 0.0
    if source is not None:
        summary = read_json(root / source.name / "summary.json")
        step = summary["steps"] * trial.epoch // summary["epochs"]  # of a run without hyper passes
        seconds = _seconds(summary) * trial.epoch / summary["epochs"]
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"fork": f"{root / source.name}@{step}"})}
        )
    folder = _train(config)
    summary = read_json(folder / "summary.json")
    if summary["test_accuracy_final"] is None:
        raise AutodoError(f"data.root = {config.data.root}: no test part, so there is no error to compare; pack one")
    lines = read_json_lines(folder / "metrics.jsonl")
    curve = tuple((line["epoch"], line["test_accuracy"]) for line in lines if line["kind"] == "evaluation")
    auroc, right = _labels(folder) if config.learn.anything else (None, None)
    return Came(
        test=summary["test_accuracy_final"],
        best_test=max(share for _, share in curve),
        seconds=seconds + _seconds(summary),
        curve=curve,
        auroc=auroc,
        right=right,
    )


def _rival(trial: Trial, config: Config) -> Came:
    found = rivals.run(config, trial.rival, trial.options)
    return Came(found.test_accuracy, found.test_accuracy_best_epoch, found.seconds, flops=found.flops)


def _train(config: Config) -> Path:
    if not train(config):
        raise AutodoError(f"run {config.folder}: was asked to stop")
    return config.folder


def _seconds(summary: dict[str, Any]) -> float:
    """Seconds of training, waits for data with them."""
    return sum(float(summary["seconds"].get(phase, 0.0)) for phase in TRAINING)


def _labels(run: Path) -> tuple[float | None, float | None]:
    """AUROC of the wrong train labels, None where there are none or all are; share of right suggested labels."""
    source = open_source(run)
    columns = read_columns(source)
    true_N, wrong_N, suggested = source.manifest.label_N[source.split.train], source.wrong_N, suggestions(columns)
    some = wrong_N is not None and not wrong_N.all()
    auroc = measures(scores(columns), wrong_N)["auroc"] if some and wrong_N is not None else None
    return auroc, None if suggested is None else float((suggested[0] == true_N).mean())


def _percent(share: float) -> float:
    """The error in % of an accuracy as a share."""
    return round(100 * (1 - share), 6)

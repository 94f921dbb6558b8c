"""A run folder as plain data: what it says of itself, what it has learnt, and in words what is missing. No HTML.

A run may be under way, of an older version, or without its data set: nothing here but a folder without a run is an
error. Epochs are numbers of passes over the train part, errors shares of wrong answers (0 to 1), losses nats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autodo_dist import ledger, standing
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, read_json_lines

OWN = ("run.root", "run.name", "launch", "checkpoint")  # settings that tell runs apart without a meaning for results
PARTS = ("train", "validation", "test")

Point = dict[str, Any]  # of one epoch's end: "epoch", PART_loss and PART_error, PART_error_per_class


@dataclass(frozen=True)
class RunFacts:
    """What a run says of itself. `settings` are by dotted name, as config.yaml has them; `points` an epoch each.

    A fork's first point is the one that it started from. `missing` says in sentences what is not known, and why.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    state: str
    why: str
    points: Sequence[Point]
    seconds: Mapping[str, float]
    pace: tuple[float, float] | None
    missing: list[str] = field(default_factory=list)

    @property
    def start_epoch(self) -> int | None:
        """Epochs before the first hyper step; None for a run that learns nothing of its samples."""
        learns = self.settings.get("learn.augment", "none") != "none"
        learns |= any(self.settings.get(f"learn.{name}") is True for name in ("weight", "soft_label"))
        epoch = self.settings.get("hyper.start_epoch")
        return epoch if learns and isinstance(epoch, int) else None

    @property
    def part(self) -> str:
        """The part whose errors are told of a class: test where it was evaluated, else validation."""
        return "test" if any("test_error" in point for point in self.points) else "validation"

    def last(self, name: str) -> float | None:
        """The newest value of this name."""
        return next((point[name] for point in reversed(self.points) if name in point), None)

    def class_errors(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Error per class in the last evaluation before the first hyper step, and in the newest one; {} where none."""
        name = f"{self.part}_error_per_class"
        have = [point for point in self.points if name in point]
        early = [point for point in have if self.start_epoch is not None and point["epoch"] <= self.start_epoch]
        return (early[-1][name] if early else {}), (have[-1][name] if have else {})


def read_run(folder: Path) -> RunFacts:
    """What the run in this folder says of itself. AutodoError where there is no run."""
    if not (folder / "config.yaml").is_file():
        raise AutodoError(f"run {folder}: no run there (no config.yaml); see `ls {folder.parent}`")
    missing: list[str] = []

    def known(name: str) -> dict[str, Any]:
        try:
            return read_json(folder / name) if (folder / name).is_file() else {}
        except AutodoError as error:
            missing.append(str(error))
            return {}

    def lines(name: str, of: Path = folder) -> list[dict[str, Any]]:
        try:
            return read_json_lines(of / name)
        except AutodoError as error:
            missing.append(str(error))
            return []

    settings = _settings(folder / "config.yaml", missing)
    rows, events, summary = lines("metrics.jsonl"), lines(ledger.NAME), known("summary.json")
    points = points_of(rows)
    if origin := fork_of(folder, settings):
        run, step = origin
        earlier = [
            row for row in lines("metrics.jsonl", run) if isinstance(row.get("step"), int) and row["step"] <= step
        ]
        if not earlier:
            missing.append(f"The run that this one was forked from is not at {run}: its curves begin an epoch later.")
        points = points_of(earlier)[-1:] + points
    if not points:
        missing.append("No epoch has come to its end: metrics.jsonl holds no curves yet.")
    elif not any("test_error" in point for point in points):
        missing.append("The test part was not evaluated: errors are those of the validation part alone.")
    state, why = standing.state_now(folder, time.time())
    environment = known("environment.json")
    if not environment.get("starts"):
        missing.append("environment.json tells of no start: commit and versions are not known.")
    if not events:
        missing.append(f"There is no {ledger.NAME}: when the run was started, and why it ended, is not known.")
    found = RunFacts(
        folder=folder,
        name=folder.resolve().name,
        settings=settings,
        environment=environment,
        state=state,
        why=why,
        points=points,
        seconds=_seconds(summary, events),
        pace=pace(rows, settings.get("hyper.start_epoch")),
        missing=missing,
    )
    if found.points and found.start_epoch is not None and not found.class_errors()[0]:
        missing.append(
            "There is no evaluation before the first hyper step: errors per class are those of the end alone."
        )
    return found


def points_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """A point for each epoch's end: evaluations, and means over the epoch's train pictures, one weight each."""
    found: dict[float, Point] = {}
    sums: dict[float, dict[str, tuple[float, float]]] = {}
    for row in rows:
        epoch = _number(row.get("epoch"))
        if epoch is None:
            continue
        if row.get("kind") == "evaluation":
            point = found.setdefault(epoch, {"epoch": epoch})
            for part in PARTS[1:]:
                _put(point, part, _number(row.get(f"{part}_loss")), _number(row.get(f"{part}_accuracy")))
                per_class = row.get(f"{part}_accuracy_per_class")
                if isinstance(per_class, dict):
                    numbers = {name: _number(value) for name, value in per_class.items()}
                    errors = {name: 1 - value for name, value in numbers.items() if value is not None}
                    point |= {f"{part}_error_per_class": errors} if errors else {}
        elif row.get("kind") == "task":
            rate, seconds = _number(row.get("images_per_second")), _number(row.get("seconds"))
            for name in ("loss", "accuracy"):
                value = _number(row.get(name))
                if value is not None and rate and seconds:
                    total, weight = sums.setdefault(math.ceil(epoch - 1e-9), {}).get(name, (0.0, 0.0))
                    sums[math.ceil(epoch - 1e-9)][name] = total + value * rate * seconds, weight + rate * seconds
    for epoch, each in sums.items():
        means = {name: total / weight for name, (total, weight) in each.items()}
        _put(found.setdefault(epoch, {"epoch": epoch}), "train", means.get("loss"), means.get("accuracy"))
    return [found[epoch] for epoch in sorted(found)]


def pace(rows: Sequence[Mapping[str, Any]], start_epoch: Any) -> tuple[float, float] | None:
    """Seconds per 1,000 train pictures before the first hyper step and since, hyper passes and waits for data included.

    None where the run has not got both.
    """
    spent, pictures = [0.0, 0.0], [0.0, 0.0]
    if not isinstance(start_epoch, int):
        return None
    for row in rows:
        epoch, seconds, rate = (_number(row.get(name)) for name in ("epoch", "seconds", "images_per_second"))
        if epoch is None or seconds is None or rate is None or row.get("kind") not in ("task", "hyper"):
            continue
        hyper = row["kind"] == "hyper"
        since = hyper or epoch > start_epoch + 1e-9
        spent[since] += seconds
        pictures[since] += 0.0 if hyper else rate * seconds
    if not all(pictures):
        return None
    before, after = (1000 * s / n for s, n in zip(spent, pictures, strict=True))
    return before, after


def fork_of(folder: Path, settings: Mapping[str, Any]) -> tuple[Path, int] | None:
    """The run and step that this one was forked from; a run that was moved is looked for beside this one."""
    run, _, step = str(settings.get("run.fork") or "").rpartition("@")
    if not run or not step.isdigit():
        return None
    return (Path(run) if Path(run).is_dir() else folder.resolve().parent / Path(run).name), int(step)


def differing(runs: Sequence[RunFacts]) -> list[tuple[str, list[Any]]]:
    """The settings that are not the same in all runs, with the value in each; None where a run does not tell it."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [run.settings.get(name) for run in runs]) for name in names if not _within(name, OWN)]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _within(name: str, sections: Sequence[str]) -> bool:
    return any(name == section or name.startswith(section + ".") for section in sections)


def _settings(path: Path, missing: list[str]) -> dict[str, Any]:
    """Settings by dotted name, whatever version wrote them."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        missing.append(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): the settings are not known.")
        return {}
    found: dict[str, Any] = {}
    for section, values in tree.items() if isinstance(tree, dict) else ():
        if isinstance(values, dict):
            found |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            found[str(section)] = values
    return found


def _seconds(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by phase: of the whole run, or up to its newest start or end."""
    newest: Mapping[str, Any] = events[-1] if events else {}
    told = summary.get("seconds") or newest.get("seconds" if newest.get("event") == "end" else "kept")
    numbers = {name: _number(value) for name, value in told.items()} if isinstance(told, dict) else {}
    return {name: value for name, value in numbers.items() if value is not None}


def _put(point: Point, part: str, loss: float | None, accuracy: float | None) -> None:
    point |= {} if loss is None else {f"{part}_loss": loss}
    point |= {} if accuracy is None else {f"{part}_error": 1 - accuracy}


def _number(value: Any) -> float | None:
    """A finite number; None for whatever else a line may hold."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None

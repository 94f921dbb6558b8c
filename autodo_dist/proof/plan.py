"""What a proof does: the user's run made short, every place that it passes, and where kills are to fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config

Phase = Literal["start", "task", "hyper", "evaluation", "save"]
LOG_EVERY = 3  # steps between lines of metrics; saves fall between them, so that running sums are in a checkpoint
SAVES = 8  # about so many inside of passes


@dataclass(frozen=True)
class Place:
    """A place that a run passes, as a rank shows it (thread_name.py): the phase, and the steps done by then."""

    phase: Phase
    steps: int


@dataclass(frozen=True)
class Aim:
    """Where a rank is to be killed. late: share of the phase's usual time that is let pass there first."""

    rank: int
    place: Place
    late: float


def shorten(config: Config, steps: int, most: int, root: Path) -> Config:
    """The run with about `steps` steps in all its passes, of which the data gives `most` for each; below `root`.

    Two epochs or more, all evaluated; hyper steps, where there are any, from the second at the latest; several saves
    inside of passes. AutodoError if those passes are more than the steps.
    """
    start, epochs = min(config.hyper.start_epoch, 1), 2
    separate = config.learn.anything and config.hyper.way == "separate"
    passes = epochs + (epochs - start) * separate
    if steps < 2 * passes:
        raise AutodoError(f"--steps {steps}: too few for {passes} passes; give at least {2 * passes}")
    per_pass = min(steps // passes, most, config.train.steps_per_pass or most)
    while (passes + 1) * per_pass < steps:
        epochs, passes = epochs + 1, passes + 1 + separate
    every = max(2, passes * per_pass // SAVES)
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["run"] |= {"root": str(root), "fork": ""}
    tree["train"] |= {"epochs": epochs, "steps_per_pass": per_pass, "log_every": LOG_EVERY, "evaluate_every": 1}
    tree["optim"] |= {"warmup_epochs": min(config.optim.warmup_epochs, epochs / 2)}
    tree["hyper"] |= {"start_epoch": start} if config.learn.anything else {}
    tree["checkpoint"] |= {"every_steps": every + (every % LOG_EVERY == 0)}
    tree["launch"] |= {"executor": "local", "nodes": 1, "max_restarts": 0}
    return check_config(tree, "of the proof")


def named(config: Config, name: str, ranks: int) -> Config:
    """The same run under another name, on so many ranks."""
    run = config.run.model_copy(update={"name": name})
    return config.model_copy(update={"run": run, "launch": config.launch.model_copy(update={"ranks_per_node": ranks})})


def places(config: Config) -> list[Place]:
    """Every place that a run of `shorten` passes, in order, but for its start and waits for data.

    The pass over the train pictures after the last save is left out: it shows as the evaluation before that save.
    """
    per_pass, every, epochs = config.train.steps_per_pass or 0, config.checkpoint.every_steps, config.train.epochs
    separate = config.learn.anything and config.hyper.way == "separate"
    found, steps = [], 0
    for epoch in range(epochs):
        phases: tuple[Phase, ...] = ("hyper", "task") if separate and epoch >= config.hyper.start_epoch else ("task",)
        for phase in phases:
            for position in range(1, per_pass + 1):
                found.append(Place(phase, steps))
                steps += 1
                if every and steps % every == 0 and not (phase == "task" and position == per_pass):
                    found.append(Place("save", steps))
        found += [Place("evaluation", steps), Place("save", steps)]
    return found


def draw(found: Sequence[Place], ranks: Sequence[int], generator: np.random.Generator) -> list[Aim]:
    """A kill for each of the starts of a run that passes the places `found`; ranks: how many it then has.

    Phases come in turn, in an order that is drawn; rank, place and lateness are drawn. The kills come in the order in
    which they fall, those in a start among them.
    """
    phases = generator.permutation(sorted({"start"} | {place.phase for place in found})).tolist()
    drawn = [phases[at % len(phases)] for at in range(len(ranks))]
    chosen: list[int] = []
    for phase in drawn:
        if have := [at for at, place in enumerate(found) if place.phase == phase]:
            chosen.append(int(generator.choice([at for at in have if at not in chosen] or have)))
    kills = [found[at] for at in sorted(chosen)]
    while len(kills) < len(ranks):
        kills.insert(int(generator.integers(len(kills) + 1)), Place("start", 0))
    return [aim(place, number, generator) for place, number in zip(kills, ranks, strict=True)]


def spread(found: Sequence[Place], ranks: Sequence[int], generator: np.random.Generator) -> list[Aim]:
    """As `draw`, but at any place, each kill in its own part of the run: so every number of ranks has its share."""
    parts = np.linspace(0, len(found), len(ranks) + 3).astype(int)[1:]
    places = [found[int(generator.integers(low, max(high, low + 1)))] for low, high in pairwise(parts[:-1])]
    return [aim(place, number, generator) for place, number in zip(places, ranks, strict=True)]


def aim(place: Place, ranks: int, generator: np.random.Generator) -> Aim:
    """A kill there, of any of the ranks, at any moment."""
    return Aim(int(generator.integers(ranks)), place, float(generator.random()))

"""How far a run has come, and how it takes up a checkpoint: its own newest, or another run's."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

from autodo_dist import nonfinite, run_folder
from autodo_dist.build import Parts
from autodo_dist.config import FREE_AT_FORK, Config, differences
from autodo_dist.errors import AutodoError
from autodo_dist.parallel import checkpoint
from autodo_dist.parallel.comm import Ranks
from autodo_dist.steps import FIGURES

log = logging.getLogger(__name__)


Sums = Annotated[list[float], Field(min_length=len(FIGURES), max_length=len(FIGURES))]


@dataclass
class Progress:
    """How far a run has come. Plain JSON, saved with every checkpoint; `read_progress` takes it back."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    epoch: NonNegativeInt = 0  # epochs done
    pass_: Literal["hyper", "task"] = "hyper"  # of the present epoch; one without a hyper pass skips it
    position: NonNegativeInt = 0  # steps done in this pass
    step: NonNegativeInt = 0  # steps done in all, of both kinds
    hyper_steps: NonNegativeInt = 0  # steps that changed rows
    lines: NonNegativeInt = 0  # lines of metrics.jsonl
    sums: list[Sums] = field(default_factory=list)  # every rank's running sums since the last of those lines
    seconds: dict[str, float] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)  # newest evaluation
    best: dict[str, Any] = field(default_factory=dict)  # the evaluation with the best validation accuracy
    best_test: float | None = None  # the best test accuracy of all evaluations
    left_out: list[nonfinite.Place] = field(default_factory=list)  # global batches


SAVED = TypeAdapter(Progress)


def read_progress(found: dict[str, Any], path: Path) -> Progress:
    """The progress that checkpoint `path` holds. AutodoError if it is not one that this version writes."""
    faults = [f"{each.name}: missing" for each in fields(Progress) if each.name not in found]  # no default is right
    try:
        progress = SAVED.validate_json(json.dumps(found))
    except ValidationError as error:
        faults += [f"{ascii('.'.join(map(str, it['loc'])))[1:-1]}: {it['msg'].lower()}" for it in error.errors()]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise AutodoError(
            f"checkpoint {path}: its progress is not what this version writes ({faults[0][:200]}{more}); "
            "go on with the version that wrote it, or start another run.name"
        )
    return progress


def tensors(parts: Parts) -> dict[str, Any]:
    """Every tensor that a resume needs. Every rank must call this."""
    state = parts.engine.state()
    if parts.average is not None:
        state |= {"average": parts.average.state()}
    if parts.objective.adjustment_C is not None:
        state |= {"logit_adjustment": parts.objective.adjustment_C}
    if parts.hyper is not None:
        state |= {"hyper": parts.hyper.parameters.state() | {"valid_grad": parts.hyper.valid_grad_CD}}
    return state


def resume(config: Config, parts: Parts, ranks: Ranks) -> tuple[Progress, torch.Tensor]:
    """Take up the newest complete checkpoint, or else the one to fork from: progress and this rank's running sums.

    Batches that were left out since are left out again. Every rank must call this.
    """
    progress, sums = take_up(config, parts, ranks)
    since = ranks.from_main([fault.place for fault in nonfinite.recorded(config.folder)] if ranks.main else [])
    progress.left_out += [place for place in since if place not in progress.left_out]
    return progress, sums


def take_up(config: Config, parts: Parts, ranks: Ranks) -> tuple[Progress, torch.Tensor]:
    """`resume` by what the checkpoint alone says. Every rank must call this."""
    sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=ranks.device)
    path = checkpoint.newest(config.folder / "checkpoints", ranks)
    if path is None:
        return (fork(config, parts, ranks) if config.run.fork else Progress()), sums
    state = tensors(parts)
    progress = read_progress(checkpoint.restore(path, state, ranks), path)
    parts.engine.restore(state)
    if parts.hyper is not None:
        parts.hyper.parameters.restore(state["hyper"])
    # Bit for bit at the same number of ranks; at another, rank 0 takes all the sums.
    if len(progress.sums) == ranks.ranks:
        sums += sums.new_tensor(progress.sums[ranks.rank])
    elif ranks.main:
        sums += sums.new_tensor(progress.sums).sum(0)
    if ranks.main:
        log.info("resumed at step %d, in epoch %d, from %s", progress.step, progress.epoch + 1, path)
    return progress, sums


def fork(config: Config, parts: Parts, ranks: Ranks) -> Progress:
    """Take model and optimizer from another run's checkpoint at the end of an epoch; rows start afresh.

    Every rank must call this. AutodoError if there is no such checkpoint, or the runs differ in more than what is
    learnt.
    """
    run, _, step = config.run.fork.rpartition("@")
    if not run or not step.isdigit():
        raise AutodoError(f"run.fork = {config.run.fork!r}: not of the form RUN@STEP, e.g. runs/plain@1200")
    changed = differences(run_folder.read_config(Path(run)), config, FREE_AT_FORK)
    if changed:
        raise AutodoError(f"run.fork = {config.run.fork}: other settings there ({'; '.join(changed)}); take them")
    path = checkpoint.existing(Path(run) / "checkpoints", int(step))
    state = parts.engine.state()
    saved = read_progress(checkpoint.restore(path, state, ranks), path)
    if saved.pass_ != "hyper" or saved.position:
        raise AutodoError(f"run.fork = {config.run.fork}: inside an epoch; choose a checkpoint of an epoch's end")
    if saved.epoch >= config.train.epochs:
        raise AutodoError(
            f"run.fork = {config.run.fork}: at the end of training; choose a checkpoint of an earlier epoch"
        )
    parts.engine.restore(state)
    if ranks.main:
        log.info("forked from %s, after %d epochs", path, saved.epoch)
    return Progress(epoch=saved.epoch, step=saved.step)

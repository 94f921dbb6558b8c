"""Floating-point operations of a training, counted before it: one step of each kind, times the steps of its epochs.

Counted are matrix products and convolutions, forward and backward, as PyTorch's FlopCounterMode does (a multiplication
and an addition are two); pointwise operations, most of the warp, the optimizer and evaluations are not. Conjugate
gradients count as at the first step, whatever number of products they stop after later.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from autodo_dist.build import Hyper, Parts, build, choose_device
from autodo_dist.build_data import read_data
from autodo_dist.config import Config
from autodo_dist.experiment import rivals
from autodo_dist.experiment.plan import Trial, seeded
from autodo_dist.experiment.rivals.loop import counted
from autodo_dist.load_config import check_config
from autodo_dist.parallel import comm
from autodo_dist.parallel.comm import Ranks
from autodo_dist.steps import hyper_step, renew_validation, shared_step, task_step


@dataclass(frozen=True)
class Epoch:
    """Operations of an epoch before the first hyper step, and of one since."""

    before: float
    since: float


def trial_flops(trial: Trial, config: Config) -> float:
    """Operations of a trial with these settings; a fork's with those of the run up to the fork."""
    if trial.rival:
        return _rival_flops(_same_for_all_seeds(config), trial.rival, json.dumps(dict(trial.options), sort_keys=True))
    before = trainer_flops(trial.source.config, 0, trial.epoch) if trial.source is not None else 0.0
    return before + trainer_flops(config, trial.epoch, config.train.epochs)


def trainer_flops(config: Config, first: int, last: int) -> float:
    """Operations of the trainer's epochs from `first` to before `last`."""
    epoch = _epoch(_same_for_all_seeds(config))
    learning = max(0, last - max(first, config.hyper.start_epoch)) if config.learn.anything else 0
    return (last - first - learning) * epoch.before + learning * epoch.since


def budgeted(trial: Trial) -> Config:
    """The settings of a trial under its budget: those as set, or with the epochs in which its FLOPs equal ours."""
    if trial.budget == "epochs":
        return trial.config
    ours = trainer_flops(trial.ours, 0, trial.ours.train.epochs)
    return scaled(trial.config, ours / trial_flops(trial, trial.config))


def scaled(config: Config, factor: float) -> Config:
    """The settings with max(1, round(factor · epochs)) epochs, and warm-up and first hyper step at the same share."""
    before = config.train.epochs
    epochs = max(1, round(factor * before))
    start = min(round(config.hyper.start_epoch * epochs / before), epochs - 1)
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"epochs": epochs}),
            "optim": config.optim.model_copy(update={"warmup_epochs": config.optim.warmup_epochs * epochs / before}),
            "hyper": config.hyper.model_copy(update={"start_epoch": start}),
        }
    )


def _same_for_all_seeds(config: Config) -> str:
    """The settings as JSON without the seed: parts are of the same size for every seed, and so are steps."""
    return seeded(config, 0).model_dump_json()


@functools.cache
def _rival_flops(settings: str, rival: str, options: str) -> float:
    return rivals.flops(check_config(json.loads(settings), "of a trial"), rival, json.loads(options))


@functools.cache
def _epoch(settings: str) -> Epoch:
    """What the epochs of a run cost, by steps on its first batches at its start weights."""
    config = check_config(json.loads(settings), "of a trial")
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    device = choose_device(config.train.device, 0)
    with comm.process_group(comm.Place(), device) as ranks:
        parts = build(config, read_data(config), ranks)
        with contextlib.closing(parts.loaders.task.shards), contextlib.closing(parts.engine):
            return _count(parts, ranks)


def _count(parts: Parts, ranks: Ranks) -> Epoch:
    task, hyper = parts.loaders.task, parts.hyper
    with contextlib.closing(task.batches(0)) as batches:
        batch = replace(next(batches), next_ids_B=None)  # no other batch follows
    parts.model.train()
    before = task.steps * counted(lambda: task_step(parts, batch, 0, ranks))
    if hyper is None:
        return Epoch(before, before)
    with contextlib.closing(parts.loaders.hyper_validation.batches(0)) as batches:
        clean = next(batches)
    renew = counted(lambda: renew_validation(parts, hyper, clean, ranks))
    step: Callable[..., object]
    if hyper.way == "shared":
        step = functools.partial(shared_step, parts, hyper, batch, 0, hyper.lr(1), 1, ranks)
        return Epoch(before, hyper_steps(task.steps, hyper, renew, step))
    parts.model.eval()
    step = functools.partial(hyper_step, parts, hyper, batch, hyper.lr(1), 1, ranks)
    return Epoch(before, before + hyper_steps(parts.loaders.hyper.steps, hyper, renew, step))


def hyper_steps(steps: int, hyper: Hyper, renew: float, step: Callable[..., object]) -> float:
    """Operations of a pass of so many steps, some of which renew the validation gradient."""
    renewals = -(-steps // hyper.validation_every)
    new, old = (counted(functools.partial(step, renewed=renewed)) for renewed in (True, False))
    return renewals * (renew + new) + (steps - renewals) * old

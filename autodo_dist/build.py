"""From settings to parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from autodo_dist.config import Config
from autodo_dist.data.loader import Loader
from autodo_dist.data.manifest import Manifest, check_files
from autodo_dist.data.order import Crop, Ids
from autodo_dist.data.split import Split, make_split
from autodo_dist.errors import AutodoError
from autodo_dist.hyperparameters import Hyperparameters, Layout
from autodo_dist.method import warp
from autodo_dist.method.hypergrad import Solve
from autodo_dist.method.losses import Loss
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.method.schedule import warmup_cosine
from autodo_dist.models import Classifier, build_model
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.engine import DdpEngine

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Loaders:
    """A stream for each use. `hyper` and `hyper_validation` are the two sides of a hyper step."""

    task: Loader
    hyper: Loader
    hyper_validation: Loader
    validation: Loader
    test: Loader


@dataclass(frozen=True)
class Hyper:
    """The learnt hyperparameters and how a hyper step is made; `lr` is a function of the steps of the hyper passes."""

    parameters: Hyperparameters
    solve: Solve
    lr: Callable[[int], float]
    start_epoch: int


@dataclass(frozen=True)
class Parts:
    """What a run is made of: `engine` trains `model`; `hyper` is None where nothing is learnt.

    `lr` is a function of the task steps done.
    """

    manifest: Manifest
    model: Classifier
    engine: DdpEngine
    loaders: Loaders
    dtype: torch.dtype
    lr: Callable[[int], float]
    loss: Loss
    hyper: Hyper | None


def build(config: Config, manifest: Manifest, ranks: Ranks) -> Parts:
    """Check the data set's files against its manifest and build every part. Every rank must call this.

    AutodoError if a file was changed after packing, or the settings do not fit the data or the number of ranks.
    """
    if ranks.main:
        check_files(manifest)
    split = build_split(config, manifest)
    check_split(config, manifest, split)
    check_sizes(config, len(split.train), ranks.ranks)
    loaders = build_loaders(config, manifest, split, ranks)
    schedule = functools.partial(
        warmup_cosine,
        warmup=round(config.optim.warmup_epochs * loaders.task.steps),
        total=config.train.epochs * loaders.task.steps,
    )
    model = build_classifier(config, len(manifest.classes), ranks.device)
    return Parts(
        manifest=manifest,
        model=model,
        engine=build_engine(config, model, ranks),
        loaders=loaders,
        dtype=DTYPES[config.train.precision],
        lr=functools.partial(schedule, peak=config.optim.lr),
        loss=config.learn.loss if config.learn.soft_label else "cross_entropy",
        hyper=build_hyper(config, manifest, split, schedule, ranks) if config.learn.anything else None,
    )


def check_split(config: Config, manifest: Manifest, split: Split) -> None:
    """Refuse a split that leaves a class without train pictures or, where something is learnt, without clean ones."""
    if missing := lacking(manifest, split.train):
        raise AutodoError(
            f"data.validation_fraction = {config.data.validation_fraction}: leaves class {missing} without a train "
            "picture; lower it, or leave out the class"
        )
    if config.learn.anything and (missing := lacking(manifest, split.validation)):
        raise AutodoError(
            f"validation part: no picture of class {missing}; learning needs clean ones of every class: "
            "raise data.validation_fraction, or pack a validation part"
        )


def lacking(manifest: Manifest, ids: Ids) -> str:
    """The first classes of which there is no picture among `ids`; empty if there is none."""
    counts = np.bincount(manifest.label_N[ids], minlength=len(manifest.classes))
    return ", ".join(manifest.classes[label] for label in np.flatnonzero(counts == 0)[:5])


def check_sizes(config: Config, pictures: int, ranks: int) -> None:
    """Refuse a batch or a warm-up that the data, the ranks or the epochs are too few for."""
    batch, warmup, epochs = config.train.batch_size, config.optim.warmup_epochs, config.train.epochs
    if batch < ranks:
        raise AutodoError(f"train.batch_size = {batch}: less than one picture for each of {ranks} ranks; raise it")
    if pictures < batch:
        raise AutodoError(
            f"train.batch_size = {batch}: more than the {pictures} train pictures that data.imbalance_ratio and "
            "data.validation_fraction leave; lower it"
        )
    if warmup >= epochs:
        raise AutodoError(f"optim.warmup_epochs = {warmup:g}: not below train.epochs = {epochs}; lower it")
    if config.learn.anything and config.hyper.start_epoch >= epochs:
        raise AutodoError(
            f"hyper.start_epoch = {config.hyper.start_epoch}: not below train.epochs = {epochs}, so that nothing would "
            "be learnt; lower it, or switch off learn.augment, learn.weight and learn.soft_label"
        )


def build_hyper(
    config: Config, manifest: Manifest, split: Split, schedule: Callable[..., float], ranks: Ranks
) -> Hyper:
    """The tables of the train part's ids and the settings of a hyper step."""
    classes = len(manifest.classes)
    learn, hyper = config.learn, config.hyper
    layout = Layout(learn.augment, learn.weight, classes if learn.soft_label else 0, learn.smoothing)
    return Hyper(
        parameters=Hyperparameters(
            layout,
            split.train,
            split.label_N,
            ranks,
            Rmsprop(hyper.decay, hyper.eps),
            DTYPES[config.train.precision],
            hyper.most_bad_rows,
        ),
        solve=Solve(hyper.solver, hyper.terms, hyper.power_iterations),
        lr=functools.partial(schedule, peak=hyper.lr),
        start_epoch=hyper.start_epoch,
    )


def build_classifier(config: Config, classes: int, device: torch.device) -> Classifier:
    """The model, with start weights drawn from train.seed."""
    return build_model(config.model.name, classes, config.train.seed).to(device, DTYPES[config.train.precision])


def build_engine(config: Config, model: Classifier, ranks: Ranks) -> DdpEngine:
    """Optimizer and data-parallel engine around the model. Every rank must call this."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.optim.lr,
        momentum=config.optim.momentum,
        nesterov=config.optim.nesterov and config.optim.momentum > 0,
        weight_decay=config.optim.weight_decay,
    )
    engine = DdpEngine(model, optimizer, ranks)
    size = config.data.image_size
    engine.settle(torch.zeros(1, 3, size, size, device=ranks.device, dtype=DTYPES[config.train.precision]))
    return engine


def build_split(config: Config, manifest: Manifest) -> Split:
    """The parts of the run and the given labels."""
    return make_split(
        manifest.label_N,
        manifest.part_N,
        len(manifest.classes),
        validation_fraction=config.data.validation_fraction,
        imbalance_ratio=config.data.imbalance_ratio,
        label_noise=config.data.label_noise,
        seed=config.data.split_seed,
    )


def build_loaders(config: Config, manifest: Manifest, split: Split, ranks: Ranks) -> Loaders:
    """A loader for each use; only the train part's labels are the given ones."""
    data = config.data
    load = functools.partial(
        Loader,
        manifest,
        seed=config.train.seed,
        rank=ranks.rank,
        ranks=ranks.ranks,
        crop=Crop(data.crop, data.crop_area, data.crop_padding, data.image_size, data.evaluation_crop, data.flip),
        mean=data.mean,
        std=data.std,
        device=ranks.device,
        decode_on_gpu=decode_on_gpu(data.device, ranks.device),
        threads=data.threads,
    )
    batch = config.train.batch_size
    draws = warp.DRAWS if config.learn.augment != "none" else 0
    # A small validation part is one batch; without any, the run learns nothing and this loader is not used.
    validation_batch = max(1, min(batch, len(split.validation)))
    return Loaders(
        task=load(split.label_N, split.train, pass_="task", batch_size=batch, draws=draws),
        hyper=load(split.label_N, split.train, pass_="hyper", batch_size=batch, draws=draws),
        hyper_validation=load(manifest.label_N, split.validation, pass_="validation", batch_size=validation_batch),
        validation=load(manifest.label_N, split.validation, pass_="evaluation", batch_size=batch),
        test=load(manifest.label_N, split.test, pass_="evaluation", batch_size=batch),
    )


def decode_on_gpu(setting: Literal["auto", "cpu", "gpu"], device: torch.device) -> bool:
    """Whether DALI decodes on the GPU. AutodoError if it should and this rank has none."""
    if setting == "gpu" and device.type != "cuda":
        raise AutodoError("data.device = gpu: this rank trains on the CPU; set train.device=cuda, or data.device=auto")
    return setting != "cpu" and device.type == "cuda"


def choose_device(setting: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """This rank's device. AutodoError if a GPU is asked for and not there."""
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise AutodoError(
            f"train.device = {setting}: rank {local_rank} of this node finds {torch.cuda.device_count()} GPUs; "
            "start at most one rank per GPU, or set train.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)

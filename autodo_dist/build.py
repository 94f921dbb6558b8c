"""From settings to parts. Beside `launcher/`, the only place that sees a whole Config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from autodo_dist.config import Config
from autodo_dist.data.loader import Loader
from autodo_dist.data.manifest import Manifest, check_files, read_manifest
from autodo_dist.data.order import Crop
from autodo_dist.data.split import make_split
from autodo_dist.errors import AutodoError
from autodo_dist.method.schedule import warmup_cosine
from autodo_dist.models import build_model
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.engine import DdpEngine

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `lr` is a function of the global step."""

    manifest: Manifest
    engine: DdpEngine
    task: Loader
    validation: Loader
    test: Loader
    dtype: torch.dtype
    lr: Callable[[int], float]


def build(config: Config, ranks: Ranks) -> Parts:
    """Check the data set against its manifest and build every part. Every rank must call this.

    AutodoError if a file was changed after packing, or the settings do not fit the data or the number of ranks.
    """
    manifest = read_manifest(config.data.root)
    if ranks.main:
        check_files(manifest)
    loaders = build_loaders(config, manifest, ranks)
    check_sizes(config, len(loaders["task"].ids), ranks.ranks)
    steps = loaders["task"].steps
    return Parts(
        manifest=manifest,
        engine=build_engine(config, len(manifest.classes), ranks),
        dtype=DTYPES[config.train.precision],
        lr=functools.partial(
            warmup_cosine,
            peak=config.optim.lr,
            warmup=round(config.optim.warmup_epochs * steps),
            total=config.train.epochs * steps,
        ),
        **loaders,
    )


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


def build_engine(config: Config, classes: int, ranks: Ranks) -> DdpEngine:
    """Model and optimizer on this rank's device, with start weights drawn from train.seed."""
    dtype = DTYPES[config.train.precision]
    model = build_model(config.model.name, classes, config.train.seed).to(ranks.device, dtype)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.optim.lr,
        momentum=config.optim.momentum,
        nesterov=config.optim.nesterov and config.optim.momentum > 0,
        weight_decay=config.optim.weight_decay,
    )
    engine = DdpEngine(model, optimizer, ranks)
    size = config.data.image_size
    engine.settle(torch.zeros(1, 3, size, size, device=ranks.device, dtype=dtype))
    return engine


def build_loaders(
    config: Config, manifest: Manifest, ranks: Ranks
) -> dict[Literal["task", "validation", "test"], Loader]:
    """A loader for each part; only the task pass sees the distorted labels."""
    data = config.data
    split = make_split(
        manifest.label_N,
        manifest.part_N,
        len(manifest.classes),
        validation_fraction=data.validation_fraction,
        imbalance_ratio=data.imbalance_ratio,
        label_noise=data.label_noise,
        seed=data.split_seed,
    )
    load = functools.partial(
        Loader,
        manifest,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        rank=ranks.rank,
        ranks=ranks.ranks,
        crop=Crop(data.crop, data.crop_area, data.crop_padding, data.image_size, data.evaluation_crop, data.flip),
        mean=data.mean,
        std=data.std,
        device=ranks.device,
        decode_on_gpu=data.device == "gpu" or (data.device == "auto" and ranks.device.type == "cuda"),
        threads=data.threads,
    )
    return {
        "task": load(split.label_N, split.train, pass_="task"),
        "validation": load(manifest.label_N, split.validation, pass_="evaluation"),
        "test": load(manifest.label_N, split.test, pass_="evaluation"),
    }


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

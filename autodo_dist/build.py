"""From settings to parts."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import psutil
import torch

from autodo_dist.config import Config
from autodo_dist.data.loader import Dropped, Loader
from autodo_dist.data.manifest import Manifest, check_files
from autodo_dist.data.order import Crop, Ids
from autodo_dist.data.pixels import Finish, Pixels
from autodo_dist.data.policies import Policy, make_choice, make_erase
from autodo_dist.data.shards import Shards
from autodo_dist.data.split import Recipe, Split, make_split
from autodo_dist.data.split_file import read_split
from autodo_dist.data.torchvision_pixels import PilWindows, TorchvisionPixels
from autodo_dist.errors import AutodoError
from autodo_dist.hyperparameters import Hyperparameters, Layout
from autodo_dist.method import compat, solvers, warp
from autodo_dist.method.direction import Solve
from autodo_dist.method.hypergrad import Objective, Pictures
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.method.schedule import warmup_cosine
from autodo_dist.models import Classifier, build_model
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.engine import DdpEngine
from autodo_dist.plan import check_memory

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Loaders:
    """A stream for each use, and what they all dropped. `hyper` and `hyper_validation` are the two sides of a hyper
    step.
    """

    task: Loader
    hyper: Loader
    hyper_validation: Loader
    validation: Loader
    test: Loader
    dropped: Dropped


@dataclass(frozen=True)
class Hyper:
    """The learnt hyperparameters and how a hyper step is made.

    lr: a function of the steps of the hyper passes, or of the task passes where `way` is shared. valid_grad_CD: the
    validation gradient, renewed in place every `validation_every` hyper steps.
    """

    parameters: Hyperparameters
    solve: Solve
    way: Literal["separate", "shared"]
    lr: Callable[[int], float]
    start_epoch: int
    validation_every: int
    valid_grad_CD: torch.Tensor


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
    objective: Objective
    pictures: Pictures
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
        objective=Objective(
            loss=config.learn.loss if config.learn.soft_label else "cross_entropy",
            batch_size=config.train.batch_size,
            normalise=config.learn.normalize_weights,
            bias=config.compat is None,
        ),
        pictures=build_pictures(config),
        hyper=build_hyper(config, manifest, split, model.head, schedule, ranks) if config.learn.anything else None,
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
            "raise data.validation_fraction (or that of the file data.split), or pack a validation part"
        )


def lacking(manifest: Manifest, ids: Ids) -> str:
    """The first classes of which there is no picture among `ids`; empty if there is none."""
    counts = np.bincount(manifest.label_N[ids], minlength=len(manifest.classes))
    return ", ".join(manifest.classes[label] for label in np.flatnonzero(counts == 0)[:5])


def check_sizes(config: Config, pictures: int, ranks: int) -> None:
    """Refuse a batch that the data or the ranks are too few for."""
    batch = config.train.batch_size
    if batch < ranks:
        raise AutodoError(f"train.batch_size = {batch}: less than one picture for each of {ranks} ranks; raise it")
    if pictures < batch:
        raise AutodoError(
            f"train.batch_size = {batch}: more than the {pictures} train pictures that the split leaves; lower it"
        )


def build_pictures(config: Config) -> Pictures:
    """What becomes of pictures on their way to the encoder."""
    if config.compat is not None:
        return Pictures(compat.warp, compat.resample)
    return Pictures(functools.partial(warp.augment, mean=config.data.mean, std=config.data.std))


def operations(config: Config) -> tuple[str, ...]:
    """The learnt operations; none where augmentation is not learnt."""
    if config.learn.augment == "none":
        return ()
    return (*warp.AFFINE, *warp.COLOR) if config.learn.color else warp.AFFINE


def build_layout(config: Config, classes: int) -> Layout:
    """Which columns a row of this run has, for a data set of so many classes."""
    learn = config.learn
    return Layout(learn.augment, operations(config), learn.weight, classes if learn.soft_label else 0, learn.smoothing)


def table_dtype(config: Config) -> torch.dtype:
    """The type in which rows are stored."""
    return torch.bfloat16 if config.hyper.table_dtype == "bfloat16" else DTYPES[config.train.precision]


def build_solve(config: Config, head: torch.nn.Linear, ranks: int) -> Solve:
    """How the inverse Hessian is applied, with the fallback for a batch too large to gather, and the cheaper space."""
    hyper, batch = config.hyper, config.train.batch_size
    solver = config.solver
    if solver != hyper.solver:
        log.warning(
            "hyper.solver = fisher: a batch of %d is more than hyper.most_gathered = %d; cg takes its place",
            batch,
            hyper.most_gathered,
        )
    if hyper.curvature == "per_rank":
        batch, ranks = -(-batch // ranks), 1
    products = hyper.cg_iterations if solver == "cg" else hyper.terms + hyper.power_iterations
    space = solvers.cheaper_space(batch, ranks, head.out_features, head.in_features + 1, products)
    return Solve(
        solver=solver,
        terms=hyper.terms,
        power_iterations=hyper.power_iterations,
        step=hyper.neumann_step,
        factor=config.compat is None,
        hessian=hyper.hessian,
        damping=hyper.damping,
        cg_iterations=hyper.cg_iterations,
        cg_tolerance=hyper.cg_tolerance,
        curvature=hyper.curvature,
        space=space if batch <= hyper.most_gathered else "parameter",
    )


def build_hyper(
    config: Config,
    manifest: Manifest,
    split: Split,
    head: torch.nn.Linear,
    schedule: Callable[..., float],
    ranks: Ranks,
) -> Hyper:
    """The tables of the train part's ids and the settings of a hyper step."""
    hyper, dtype = config.hyper, DTYPES[config.train.precision]
    layout = build_layout(config, len(manifest.classes))
    table_device = torch.device("cpu") if hyper.table_device == "host" else ranks.device
    check_memory(
        train_samples=len(split.train),
        width=layout.width,
        ranks=ranks.ranks,
        bytes_per_value=table_dtype(config).itemsize,
        memory=memory_of(table_device, config.launch.ranks_per_node),
        table_on_host=hyper.table_device == "host",
    )
    return Hyper(
        parameters=Hyperparameters(
            layout,
            split.train,
            split.label_N,
            ranks,
            Rmsprop(hyper.decay, hyper.eps),
            dtype,
            hyper.most_bad_rows,
            table_dtype(config),
            table_device,
        ),
        solve=build_solve(config, head, ranks.ranks),
        way=hyper.way,
        lr=functools.partial(schedule, peak=hyper.lr),
        start_epoch=hyper.start_epoch,
        validation_every=hyper.validation_every,
        valid_grad_CD=torch.zeros(head.out_features, head.in_features + 1, dtype=dtype, device=ranks.device),
    )


def memory_of(device: torch.device, ranks: int) -> float:
    """Bytes that a rank may hold there: its GPU's, or its share of main memory with so many ranks on the node."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().total / ranks


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
    """The parts of the run and the given labels: of the file that data.split names, or drawn by the other settings."""
    data = config.data
    if data.split is not None:
        return read_split(data.split, manifest)
    recipe = Recipe(
        validation_fraction=data.validation_fraction,
        imbalance_ratio=data.imbalance_ratio,
        noise_rate=data.label_noise,
        seed=data.split_seed,
    )
    return make_split(manifest.label_N, manifest.part_N, len(manifest.classes), recipe)


def build_loaders(config: Config, manifest: Manifest, split: Split, ranks: Ranks) -> Loaders:
    """A loader for each use; only the train part's labels are the given ones, only its pictures get the policy."""
    data = config.data
    crop = Crop(data.crop, data.crop_area, data.crop_padding, data.image_size, data.evaluation_crop, data.flip)
    policy, pixels, dropped = build_policy(config), build_pixels(config, ranks.device), build_dropped(config, manifest)
    plain = Finish(crop, data.mean, data.std)
    augmented = replace(plain, operations=policy.operations, erases=policy.erase is not None) if policy else plain
    load = functools.partial(
        Loader,
        Shards(manifest),
        dropped=dropped,
        seed=config.train.seed,
        rank=ranks.rank,
        ranks=ranks.ranks,
        crop=crop,
        device=ranks.device,
    )
    batch = config.train.batch_size
    # A small validation part is one batch; without any, the run learns nothing and this loader is not used.
    validation_batch = max(1, min(batch, len(split.validation)))
    train = functools.partial(
        load,
        pixels=functools.partial(pixels, augmented),
        label_N=split.label_N,
        ids=split.train,
        batch_size=batch,
        draws=2 * len(operations(config)),
        policy=policy,
    )
    evaluate = functools.partial(load, pixels=functools.partial(pixels, plain), label_N=manifest.label_N)
    return Loaders(
        task=train(pass_="task"),
        hyper=train(pass_="hyper"),
        hyper_validation=evaluate(ids=split.validation, pass_="validation", batch_size=validation_batch),
        validation=evaluate(ids=split.validation, pass_="evaluation", batch_size=batch),
        test=evaluate(ids=split.test, pass_="evaluation", batch_size=batch),
        dropped=dropped,
    )


def build_policy(config: Config) -> Policy | None:
    """What training pictures get after their window; None: nothing. AutodoError if a level is missing."""
    data = config.data
    choice = make_choice(data.policy, data.policy_operations, data.policy_strength, data.sub_policies, data.image_size)
    erase = make_erase(data.erase, data.erase_area, data.erase_probability, data.image_size)
    return Policy(choice, erase) if choice or erase else None


def build_pixels(config: Config, device: torch.device) -> Callable[[Finish, int], Pixels]:
    """How so many pictures become pixels: all by DALI on a GPU; on the CPU decoded by DALI, or by PIL where that is set
    or DALI is not installed.
    """
    data = config.data
    if data.decoder != "pil":
        try:
            from autodo_dist.data.dali import DaliPixels, DaliWindows
        except ImportError as error:
            if data.decoder == "dali":
                raise AutodoError(f"data.decoder = dali: not installed ({error}); set data.decoder=pil") from error
            log.warning("DALI is not installed: PIL decodes")
        else:
            if decode_on_gpu(data.device, device):
                return lambda finish, most: DaliPixels(finish, most, data.threads, device.index)
            return lambda finish, most: TorchvisionPixels(
                finish, data.threads, DaliWindows(finish.crop, most, data.threads)
            )
    if data.device == "gpu":
        raise AutodoError("data.device = gpu: PIL decodes on the CPU; install DALI, or set data.device=auto")
    return lambda finish, most: TorchvisionPixels(finish, data.threads, PilWindows(data.threads))


def build_dropped(config: Config, manifest: Manifest) -> Dropped:
    """Where pictures that do not decode are noted, and how many may be."""
    skip = config.data.on_error == "skip"
    return Dropped(manifest, math.ceil(config.data.most_dropped * len(manifest)) if skip else 0)


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

"""From settings to parts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from autodo_dist.average import Average
from autodo_dist.build_data import (
    Loaders,
    build_loaders,
    build_split,
    check_sizes,
    check_split,
    choose_kept,
    keep_shards,
    operations,
    trained_on,
)
from autodo_dist.build_engine import build_engine
from autodo_dist.compiling import compile_encoder
from autodo_dist.config import Config
from autodo_dist.data.manifest import Manifest, check_files
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Split
from autodo_dist.errors import AutodoError
from autodo_dist.hyperparameters import Hyperparameters, Layout
from autodo_dist.method import compat, solvers, warp
from autodo_dist.method.direction import Solve
from autodo_dist.method.hypergrad import Objective, Pictures
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.method.schedule import warmup_cosine
from autodo_dist.models import Classifier, build_model
from autodo_dist.parallel import checkpoint
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.engine import Engine
from autodo_dist.plan import check_memory
from autodo_dist.weights import load_weights

log = logging.getLogger(__name__)
# train.precision -> the type of weights, pictures, losses and rows, and that in which the encoder computes.
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32, "fp16": torch.float32}
AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Hyper:
    """The learnt hyperparameters and how a hyper step is made.

    lr: a function of the steps of the hyper passes, or of the task passes where `way` is shared. kept: samples whose
    rows are kept over time. valid_grad_CD: the validation gradient, renewed in place every `validation_every` hyper
    steps.
    """

    parameters: Hyperparameters
    solve: Solve
    way: Literal["separate", "shared"]
    lr: Callable[[int], float]
    start_epoch: int
    validation_every: int
    kept: Ids
    valid_grad_CD: torch.Tensor


@dataclass(frozen=True)
class Parts:
    """What a run is made of: `engine` trains `model`; `hyper` is None where nothing is learnt.

    accumulate: the pieces of a rank's part of a batch. lr: a function of the task steps done.
    """

    manifest: Manifest
    model: Classifier
    engine: Engine
    loaders: Loaders
    dtype: torch.dtype
    accumulate: int
    lr: Callable[[int], float]
    objective: Objective
    pictures: Pictures
    hyper: Hyper | None
    average: Average | None

    @property
    def evaluated(self) -> Classifier:
        """The model that evaluations are of: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def share_buffers(self) -> None:
        """Give every rank rank 0's statistics, of model and average. Every rank must call this."""
        self.engine.share_buffers()
        if self.average is not None:
            self.average.share_buffers()


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
    if config.model.init_from is not None and not checkpoint.complete(config.folder / "checkpoints"):
        load_weights(model, config.model.init_from)
    average = Average(model, config.train.average) if config.train.average is not None else None
    engine = build_engine(config, model, ranks)  # a copy of the model is to be made before
    if config.train.compile:
        compile_encoder(model.encoder)
    hyper = None
    if config.learn.anything:
        learnt = loaders.task if config.hyper.way == "shared" else loaders.hyper
        hyper = build_hyper(config, manifest, split, model.head, schedule, learnt.steps, ranks)
    parts = Parts(
        manifest=manifest,
        model=model,
        engine=engine,
        loaders=loaders,
        dtype=DTYPES[config.train.precision],
        accumulate=config.train.accumulate,
        lr=functools.partial(schedule, peak=config.lr),
        objective=Objective(
            loss=config.learn.loss if config.learn.soft_label else "cross_entropy",
            batch_size=config.train.batch_size,
            normalise=config.learn.normalize_weights,
            bias=config.compat is None,
            smoothing=config.train.label_smoothing,
            adjustment_C=model.head.weight.new_zeros(len(manifest.classes)) if config.train.logit_adjustment else None,
        ),
        pictures=build_pictures(config),
        hyper=hyper,
        average=average,
    )
    keep_shards(config, loaders.task.shards, ranks)  # last: it may take long, and what is wrong is said before
    return parts


def build_pictures(config: Config) -> Pictures:
    """What becomes of pictures on their way to the encoder."""
    if config.compat is not None:
        return Pictures(compat.warp, compat.resample)
    return Pictures(functools.partial(warp.augment, mean=config.data.mean, std=config.data.std))


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
    steps: int,
    ranks: Ranks,
) -> Hyper:
    """The tables of the train part's ids and the settings of a hyper step. steps: of a pass that learns."""
    hyper, dtype = config.hyper, DTYPES[config.train.precision]
    renewals = -(-steps // hyper.validation_every)  # each pass begins with one
    layout = build_layout(config, len(manifest.classes))
    table_device = torch.device("cpu") if hyper.table_device == "host" else ranks.device
    check_memory(
        train_samples=len(split.train),
        width=layout.width,
        ranks=ranks.ranks,
        bytes_per_value=table_dtype(config).itemsize,
        memory=memory_of(table_device, config.launch.ranks_per_node),
        table_on_host=hyper.table_device == "host",
        ensembled=layout.classes if config.learn.ensembling else 0,
    )
    return Hyper(
        parameters=Hyperparameters(
            layout,
            split.train,
            (trained_on(split, manifest, "all") if config.learn.clean_folds else split).label_N,
            ranks,
            Rmsprop(hyper.decay, hyper.eps),
            dtype,
            hyper.most_bad_rows,
            table_dtype(config),
            table_device,
            guests=bool(config.learn.clean_folds),
            ensembling=config.learn.ensembling,
            shared_every=steps / renewals,
        ),
        solve=build_solve(config, head, ranks.ranks),
        way=hyper.way,
        lr=functools.partial(schedule, peak=hyper.lr),
        start_epoch=hyper.start_epoch,
        validation_every=hyper.validation_every,
        kept=choose_kept(split.train, config.history.samples, config.history.ids, config.train.seed),
        valid_grad_CD=torch.zeros(head.out_features, head.in_features + 1, dtype=dtype, device=ranks.device),
    )


def memory_of(device: torch.device, ranks: int) -> float:
    """Bytes that a rank may hold there: its GPU's, or its share of main memory with so many ranks on the node."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().total / ranks


def build_classifier(config: Config, classes: int, device: torch.device) -> Classifier:
    """The model, with start weights drawn from train.seed."""
    size = config.data.image_size
    model = build_model(config.model.name, classes, config.train.seed, size)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AutodoError(
            f"model.name = {config.model.name!r}: does not take pictures of {size} x {size} pixels ({reason}); "
            "set data.image_size"
        ) from error
    model.autocast = AUTOCAST[config.train.precision]
    if device.type == "cpu" and model.autocast == torch.float16:  # a GPU's run that is evaluated here
        model.autocast = None
    if config.train.channels_last:
        model.memory_format = torch.channels_last
    if config.model.sync_batch_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.train().to(device, DTYPES[config.train.precision])
    return model.to(memory_format=model.memory_format) if config.train.channels_last else model


def restore_classifier(config: Config, path: Path, classes: int, ranks: Ranks) -> Classifier:
    """The model that evaluations are of, with the weights of the checkpoint `path`. Every rank must call this."""
    model = build_classifier(config, classes, ranks.device)
    tensors: dict[str, Any] = {"model": model.state_dict()}
    if config.train.average is not None:
        average = Average(model, config.train.average)
        model, tensors = average.module, {"average": average.state()}
    checkpoint.restore(path, tensors, ranks)
    return model


def check_device(config: Config, device: torch.device) -> None:
    """AutodoError for settings that need a GPU where there is none."""
    if device.type == "cuda":
        return
    for name, wanted, cure in (
        ("train.precision = fp16", config.train.precision == "fp16", "train.precision=bf16"),
        ("model.sync_batch_norm = true", config.model.sync_batch_norm, "model.sync_batch_norm=false"),
    ):
        if wanted:
            raise AutodoError(f"{name}: needs a GPU, and this rank trains on the CPU; set {cure}")


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

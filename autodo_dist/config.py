"""Settings of a run: typed, documented, checked before anything starts.

A yaml file holds what differs from the defaults below (load_config.py); what contradicts is refused (config_checks.py).
`build.py`, `train.py`, `run_folder.py`, the commands and `launcher/` see `Config`; every other module takes the values
that it uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from autodo_dist.errors import one_line
from autodo_dist.operations import Operation
from autodo_dist.urls import is_remote

# A run may be resumed with another value of these: they say where it runs and what it writes, not what it computes.
# (Its numbers may still differ in the last bits: a GPU decodes a JPEG a little differently, and BatchNorm sees a rank's
# part of a batch.)
FREE_AT_RESUME = (
    "recipe",  # what it set is compared
    "run.root",
    "run.name",
    "data.root",  # what it holds may not change, nor data.split's: their checksums are compared (run_folder.py)
    "data.split",
    "data.cache",
    "data.stage_to",
    "data.cache_gb",
    "data.device",
    "data.threads",
    "data.decoder",
    "data.on_error",
    "data.most_dropped",
    "train.accumulate",
    "train.log_every",
    "train.tensorboard",
    "train.hang_after",
    "train.on_nonfinite",
    "train.most_rollbacks",
    "engine",  # a checkpoint holds the same whatever trained it
    "optim.implementation",
    "checkpoint",
    "history",
    "launch",
    "hyper.most_bad_rows",
    "hyper.table_device",
)

# A fork may differ from the run that it starts from in these as well.
FREE_AT_FORK = (*FREE_AT_RESUME, "run.fork", "learn", "hyper", "train.evaluate_every", "train.logit_adjustment")

Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1, strict=True)]

Level = Annotated[float, Field(ge=0, le=9, strict=True)]
SubPolicy = Annotated[tuple[tuple[Operation, Probability, Level | None], ...], Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, values: Any) -> Any:
        """Python counts True as 1; `train.epochs: yes` is a slip."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if (
                isinstance(value, bool)
                and field is not None
                and field.annotation in (int, float, int | None, float | None)
            ):
                raise ValueError(f"{name} is a number, not {str(value).lower()}")
        return values


class Run(Section):
    root: Path = Field(Path("runs"), description="folder that holds the runs")
    name: str = Field("", description="folder of this run below run.root; empty: the name of the yaml file")
    fork: str = Field("", description="RUN@STEP: start from that checkpoint of another run folder, with fresh rows")


class Data(Section):
    root: str = Field(
        min_length=1,
        description="packed data set: the folder that `autodo pack` wrote, or the URL of its copy: s3://BUCKET/FOLDER, "
        "http(s)://HOST/FOLDER",
    )
    stage_to: str | None = Field(
        None,
        min_length=1,
        description="folder of each node's own disk, e.g. $TMPDIR, to which shards are copied before the first step",
    )
    cache: str | None = Field(
        None,
        min_length=1,
        description="folder in which each node keeps shards for later epochs and runs, fetched while training reads "
        "the others from data.root; null: ~/.cache/autodo_dist for a URL, none for a folder",
    )
    cache_gb: float | None = Field(
        None,
        ge=0,
        description="most of the data set that a node copies by either, GB (10^9 bytes); the rest is read from "
        "data.root. null: what leaves 5 % of the disk free (10 in ~/.cache/autodo_dist)",
    )
    image_size: int = Field(224, ge=8, le=4096, description="side of the square pictures that the model sees, pixels")
    crop: Literal["resized", "padded", "whole"] = Field(
        "resized",
        description="training crop. resized: random area and aspect ratio (ImageNet); padded: random shift over a zero "
        "border (CIFAR); whole: the whole picture",
    )
    crop_area: tuple[Share, Share] = Field((0.08, 1.0), description="crop=resized: smallest and largest share of area")
    crop_padding: int = Field(4, ge=0, description="crop=padded: border on each side, pixels of image_size")
    evaluation_crop: float = Field(
        0.875, gt=0, le=1, description="crop=resized: side of the centred evaluation crop, share of the shorter side"
    )
    flip: bool = Field(True, description="mirror half of the training pictures left to right")
    policy: Literal[
        "none",
        "randaugment",
        "trivialaugment",
        "autoaugment_imagenet",
        "autoaugment_cifar10",
        "autoaugment_svhn",
        "random_subset",
        "custom",
    ] = Field(
        "none",
        description="fixed augmentation of training pictures, after crop and flip (docs/policies.md). random_subset: "
        "colour only, what the learnt warp does not do; custom: data.sub_policies",
    )
    policy_operations: int = Field(
        2, ge=1, le=8, description="policy=randaugment or random_subset: operations a picture, one after another"
    )
    policy_strength: int = Field(
        9, ge=0, le=30, description="policy=randaugment or random_subset: strength of its operations, of 30"
    )
    sub_policies: tuple[SubPolicy, ...] = Field(
        (),
        description="policy=custom: lists of [operation, probability, level from 0 to 9 or null], or a JSON file of "
        "them; a picture gets one of the lists",
    )
    erase: Literal["none", "cutout", "random"] = Field(
        "none", description="rectangle of training pictures that is set to data.mean, last. cutout: a square"
    )
    erase_area: Share | None = Field(
        None, description="share of a picture's area, of random the largest; null: 0.25 for cutout, 0.33 for random"
    )
    erase_probability: Probability | None = Field(
        None, description="share of the pictures that are erased; null: 1 for cutout, 0.5 for random"
    )
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="subtracted from RGB in 0..1")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="RGB is divided by it")
    validation_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of each class of packed train + validation that becomes the clean validation part; "
        "null: the parts as packed",
    )
    imbalance_ratio: float = Field(
        1.0, ge=1, description="IR: classes of the upper half keep max(1, round(n / IR)) of their n train pictures"
    )
    label_noise: float = Field(0.0, ge=0, le=1, description="NR: share of train labels that are redrawn uniformly")
    split_seed: int = Field(0, ge=0, lt=2**63, description="seed of the split and of its distortion")
    train_on: Literal["train", "all", "clean"] = Field(
        "train",
        description="all: the clean validation part is trained on like the train part; clean: it alone. For runs that "
        "learn nothing from it; see learn.clean_folds",
    )
    split: Path | None = Field(
        None, description="file that `autodo split` wrote, in place of the four settings before; null: drawn by them"
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="where DALI decodes; auto: as train.device")
    threads: int = Field(2, ge=1, description="decoding threads per rank")
    decoder: Literal["auto", "dali", "pil"] = Field(
        "auto", description="what decodes; auto: DALI where it is installed. On the CPU their pixels are the same"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a picture that does not decode ends the run, or is dropped from its batch on all ranks"
    )
    most_dropped: float = Field(
        0.001, gt=0, lt=1, description="on_error=skip: share of the data set's pictures that may be dropped"
    )

    @field_validator("root")
    @classmethod
    def _place(cls, root: str) -> str:
        """Before anything is written: a URL may hold a password."""
        is_remote(root)
        return root

    @field_validator("crop_area")
    @classmethod
    def _ordered(cls, area: tuple[float, float]) -> tuple[float, float]:
        if area[0] > area[1]:
            raise ValueError("the smallest share comes first")
        return area

    @field_validator("split")
    @classmethod
    def _alone(cls, split: Path | None, info: ValidationInfo) -> Path | None:
        for name in ("validation_fraction", "imbalance_ratio", "label_noise", "split_seed"):
            value, default = info.data.get(name), cls.model_fields[name].default
            if split is not None and name in info.data and value != default:
                raise ValueError(f"contradicts data.{name} = {value}; leave out one of them")
        return split

    @field_validator("sub_policies", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        """A file is read once and for all: the run's config.yaml holds what it held."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"no JSON file that can be read ({one_line(error)})") from error


class Model(Section):
    name: str = Field(
        "resnet18",
        description="a classifier of torchvision, e.g. resnet18; timm/NAME; wrn_DEPTH_WIDTH, e.g. wrn_28_10; convnet",
    )
    sync_batch_norm: bool = Field(
        False, description="BatchNorm over the global batch and not a rank's part; on GPUs, by PyTorch's SyncBatchNorm"
    )
    init_from: Path | None = Field(
        None,
        description="start weights: a file of `autodo checkpoint export`, torchvision or timm",
    )


# What an optimizer is usually given, where that differs from the defaults below; a setting in the file comes before.
# adamw: torch's own; lars: Chen et al. 2020 (SimCLR), lr for a batch of 256; lamb: Wightman et al. 2021 (ResNet strikes
# back, A2), lr for a batch of 2048.
USUAL: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
    "lars": {"lr": 0.3, "nesterov": False, "decay_norms": False},
    "lamb": {"lr": 5e-3, "eps": 1e-6, "weight_decay": 0.02, "decay_norms": False},
}
LAYERWISE = ("lars", "lamb")  # a step needs the norms of whole parameters
# The settings that some optimizers do not read.
READ_BY = {
    "momentum": ("sgd", "lars"),
    "nesterov": ("sgd", "lars"),
    "betas": ("adamw", "lamb"),
    "eps": ("adamw", "lamb"),
    "trust_coefficient": ("lars",),
}


class Optim(Section):
    name: Literal["sgd", "adamw", "lars", "lamb"] = Field(
        "sgd",
        description="lars, lamb: SGD and Adam with a rate for each parameter tensor, for large batches (formulas: "
        "autodo_dist/optimizers.py). The defaults below are sgd's; where another has its own, they are named there",
    )
    implementation: Literal["torch", "torch_fused", "apex"] = Field(
        "torch",
        description="torch: PyTorch's and timm's; torch_fused: PyTorch's fused kernels, sgd and adamw; apex: NVIDIA's "
        "fused kernels on a GPU, sgd, adamw and lamb. The same numbers to rounding; never another one in its place",
    )
    lr: float = Field(
        0.1,
        gt=0,
        description="peak learning rate, for the whole global batch; adamw: 0.001, lars: 0.3, lamb: 0.005",
    )
    lr_batch_size: int | None = Field(
        None,
        ge=1,
        description="the batch size that optim.lr is meant for: it is multiplied by train.batch_size / this (Goyal et "
        "al. 2017). null: optim.lr as it stands",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd, lars: share of the last step's direction that is kept")
    nesterov: bool = Field(True, description="sgd, lars: Nesterov's form of the momentum; lars: false")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="adamw, lamb: decay of first and second moment")
    eps: float = Field(1e-8, gt=0, description="adamw, lamb: added to the root of the second moment; lamb: 1e-6")
    trust_coefficient: float = Field(
        1e-3, gt=0, description="lars: η, the rate of a parameter tensor is η |w| / (|gradient| + weight decay |w|)"
    )
    clip_norm: float | None = Field(
        None, gt=0, description="largest 2-norm of the whole gradient, to which a longer one is cut; null: none is cut"
    )
    weight_decay: float = Field(
        1e-4,
        ge=0,
        description="sgd, lars: L2 penalty; adamw: decoupled from the gradient; lamb: added to the direction. adamw: "
        "0.01, lamb: 0.02",
    )
    decay_norms: bool = Field(
        True,
        description="weight decay, and the rates of lars and lamb, for biases and norms too: the parameters of one "
        "dimension; lars, lamb: false",
    )
    warmup_epochs: float = Field(5.0, ge=0, description="linear warm-up before the cosine, epochs")

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        """Lay what is usual for the optimizer under the settings that are given."""
        return {**USUAL.get(str(values.get("name")), {}), **values} if isinstance(values, dict) else values


class Engine(Section):
    name: Literal["ddp", "deepspeed"] = Field("ddp", description="what averages gradients (docs/engines.md)")
    stage: int = Field(
        1,
        ge=0,
        le=3,
        description="name=deepspeed: ZeRO stage, what is cut over the ranks. 1: optimizer state; 2: gradients too; "
        "3: parameters too; 0: nothing",
    )
    deepspeed_config: Path | None = Field(
        None, description="name=deepspeed: JSON file of further settings of DeepSpeed's; what clashes is an error"
    )


class Train(Section):
    epochs: int = Field(200, ge=1, description="passes over the train part")
    batch_size: int = Field(256, ge=1, description="pictures in a global batch, whatever the number of ranks")
    accumulate: int = Field(
        1,
        ge=1,
        description="pieces in which a rank takes its part of a batch through the model, one after another, for less "
        "memory; the numbers are those of one piece, but that BatchNorm sees a piece at a time",
    )
    steps_per_pass: int | None = Field(
        None,
        ge=1,
        description="only the first so many global batches of every pass, of evaluations too, to try a configuration "
        "out; schedules follow the shorter epochs. null: all",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of start weights, order and crops")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32",
        description="in which the encoder computes (autocast); weights, head, losses and rows are float32. fp16: on a "
        "GPU, the loss is scaled; fp64: everything, to compare runs",
    )
    compile: bool = Field(False, description="compile the encoder with torch.compile, for GPUs (docs/engines.md)")
    channels_last: bool = Field(False, description="keep pictures and weights as B x H x W x C, fast on many GPUs")
    threads: int = Field(1, ge=1, description="torch's CPU threads per rank (a resume is bit-exact at the same number)")
    deterministic: bool = Field(
        False,
        description="GPU: deterministic algorithms where there are any, for a bit-exact resume (docs/reliability.md)",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="α: the loss has (1 - α)y + α/C for labels; with learn.soft_label see learn.smoothing",
    )
    logit_adjustment: float = Field(
        0.0,
        ge=0,
        description="τ: the train loss sees logits + τ·log π, π: class shares of what is trained on, by learnt "
        "weights and labels (Menon et al. 2021; 1: balanced softmax, Ren et al. 2020). For imbalanced classes",
    )
    average: float | None = Field(
        None, gt=0, lt=1, description="d: evaluate the average w̄ <- d·w̄ + (1 - d)·w over task steps instead of w"
    )
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(
        False, description="also write the numbers of metrics.jsonl as curves for TensorBoard, in RUN/tensorboard"
    )
    evaluate_every: int = Field(1, ge=1, description="epochs between evaluations; the last epoch is always evaluated")
    hang_after: float = Field(
        60.0,
        gt=0,
        description="seconds without progress, at least, until a rank counts as hung; more where its phase is slow (20 "
        "times its median, 10 times this where it is not known yet)",
    )
    on_nonfinite: Literal["stop", "rollback"] = Field(
        "stop",
        description="when the loss or the gradient of a batch is NaN or infinite. rollback: back to the newest "
        "checkpoint, and on without that batch",
    )
    most_rollbacks: int = Field(
        3, ge=0, description="on_nonfinite=rollback: batches that a run may leave out before it stops"
    )


class Learn(Section):
    augment: Literal["none", "shared", "per_sample"] = Field(
        "none", description="λ^A: gates and magnitudes of seven affine operations, one set for all samples or one each"
    )
    color: bool = Field(
        False, description="brightness, contrast and saturation beside the affine operations of learn.augment"
    )
    weight: bool = Field(False, description="λ^W: a loss weight per sample")
    normalize_weights: bool = Field(False, description="divide the weights by their mean over the global batch")
    soft_label: bool = Field(False, description="λ^S: a soft label per sample")
    loss: Literal["symmetric_kl", "kl"] = Field(
        "symmetric_kl", description="loss between prediction and soft label; without soft labels it is cross entropy"
    )
    clean_folds: int = Field(
        0,
        ge=0,
        description="F: the clean validation part is trained on, too, but for one of F folds in turn: that which an "
        "epoch leaves out gives its validation gradient. Without rows: clean pictures weigh 1 and keep their labels. "
        "0: it is not trained on (the paper)",
    )
    ensembling: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="β: soft labels move with the running mean p̄ <- β·p̄ + (1 - β)·p of the network's predictions, by "
        "Bayes' rule (autodo_dist/ensembling.py); 0: they do not",
    )
    ensembling_from: float = Field(
        0.33, gt=0, lt=1, description="ensembling: share of the epochs after which soft labels begin to move"
    )
    smoothing: float = Field(0.1, description="α: soft labels start at (1 - α)y + α/C; 0 < α < C/(C - 1)")

    @property
    def anything(self) -> bool:
        """Whether any group is learnt."""
        return self.augment != "none" or self.weight or self.soft_label


# The settings that some solvers of the inverse Hessian do not read.
SOLVED_WITH = {
    "hessian": ("neumann",),
    "terms": ("neumann",),
    "neumann_step": ("neumann",),
    "power_iterations": ("neumann",),
    "damping": ("cg", "fisher"),
    "cg_iterations": ("cg",),
    "cg_tolerance": ("cg",),
}


class Hyper(Section):
    start_epoch: int = Field(50, ge=0, description="E: epochs before the first hyper pass; the paper: 100 on ImageNet")
    lr: float = Field(0.05, gt=0, description="peak learning rate of RMSprop on the rows; the paper: 0.01 on ImageNet")
    decay: float = Field(0.99, gt=0, lt=1, description="ρ of RMSprop's second moment")
    eps: float = Field(1e-8, gt=0, description="ε of RMSprop")
    way: Literal["separate", "shared"] = Field(
        "shared",
        description="separate: hyper passes of their own, in eval mode (the paper); shared: the task step's forward "
        "serves both",
    )
    validation_every: int = Field(
        1,
        ge=1,
        description="hyper steps between renewals of the validation gradient; an augmentation that all samples share "
        "is learnt at the renewals alone, at the root of as many times the rate",
    )
    solver: Literal["identity", "neumann", "cg", "fisher"] = Field(
        "neumann",
        description="how the inverse Hessian is applied; cg: conjugate gradients on Gauss-Newton + damping; fisher: "
        "empirical Fisher matrix + damping, with the rank-one hypergradient of appendix C",
    )
    curvature: Literal["global", "per_rank"] = Field(
        "global", description="the Hessian of the global batch, or of each rank's part of it, without communication"
    )
    hessian: Literal["gauss_newton", "exact"] = Field(
        "gauss_newton",
        description="neumann: what it inverts; the symmetric KL's exact Hessian is indefinite away from p = q, and a "
        "long series grows there",
    )
    terms: int = Field(5, ge=0, description="neumann: T, Hessian products of the sum")
    neumann_step: float | None = Field(
        None, gt=0, description="neumann: α; null: 1 / the largest eigenvalue, from a few power iterations"
    )
    power_iterations: int = Field(5, ge=1, description="neumann: products that estimate the largest eigenvalue")
    damping: float = Field(
        1e-3, gt=0, description="cg, fisher: μ, added to the curvature, which is singular without; cg: >= weight decay"
    )
    cg_iterations: int = Field(20, ge=1, description="cg: most products")
    cg_tolerance: float = Field(1e-3, gt=0, lt=1, description="cg: ends at this share of the first residual")
    most_gathered: int = Field(
        4096,
        ge=1,
        description="largest batch whose features are gathered on every rank; above it neumann and cg iterate in "
        "parameter space, and fisher becomes cg",
    )
    table_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of rows and their second moments; bfloat16 is rounded stochastically and half as large"
    )
    table_device: Literal["auto", "host"] = Field(
        "auto", description="where rows lie; auto: as train.device; host: pinned main memory beside a GPU"
    )
    most_bad_rows: int = Field(100, ge=0, description="row gradients that may be infinite or NaN before the run stops")


class Checkpoint(Section):
    every_steps: int | None = Field(None, ge=1, description="saves inside an epoch; its end is always saved")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best by validation")


class History(Section):
    samples: int = Field(
        16,
        ge=0,
        description="train samples, drawn by train.seed, whose rows history.jsonl keeps over time, a line of 1 KB "
        "each; 0: none",
    )
    ids: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="ids of train samples that are kept as well")
    every: int = Field(
        1, ge=1, description="epochs between their lines; 1: `autodo explain` can replay every epoch to the bit"
    )


class Launch(Section):
    executor: Literal["local", "slurm"] = Field("local", description="local: processes of this machine")
    nodes: int = Field(1, ge=1, description="machines")
    ranks_per_node: int = Field(1, ge=1, description="processes per machine: one per GPU")
    max_restarts: int = Field(3, ge=0, description="restarts after a rank died, hung or failed, not by a user's error")
    partition: str | None = Field(None, min_length=1, description="slurm: where the job queues; null: Slurm's default")
    account: str | None = Field(None, min_length=1, description="slurm: who pays")
    qos: str | None = Field(None, min_length=1, description="slurm: quality of service")
    time: str = Field(
        "1-00:00:00", description="slurm: limit of a job: minutes, 'hours:minutes:seconds' or 'days-hours:minutes'"
    )
    mem: str | None = Field(
        None, min_length=1, description="slurm: main memory of a node, e.g. 200G; null: Slurm's default"
    )
    cpus_per_rank: int | None = Field(None, ge=1, description="slurm: null: data.threads + train.threads")
    gpus_per_node: int | None = Field(
        None, ge=0, description="slurm: null: as many as ranks, and none with train.device=cpu"
    )
    constraint: str | None = Field(None, min_length=1, description="slurm: features that nodes must have, e.g. a100")
    exclude: str | None = Field(None, min_length=1, description="slurm: nodes that the job must not get")
    setup: tuple[str, ...] = Field((), description="slurm: shell lines before the ranks start, e.g. [module load cuda]")
    slurm: dict[str, bool | int | str] = Field(
        {}, description="any other option of sbatch, e.g. {mail-type: END}; true for one without a value"
    )


# What a `recipe` sets; a setting in the file comes before, and so does what `compat` sets.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "autodo": {
        "train": {"logit_adjustment": 1.0},
        "learn": {"augment": "shared", "weight": True, "soft_label": True, "clean_folds": 10, "ensembling": 0.7},
        "hyper": {"start_epoch": 5, "lr": 0.01, "solver": "identity", "validation_every": 8},
    },
    "paper": {
        "learn": {"augment": "per_sample", "weight": True, "soft_label": True},
        "hyper": {"way": "separate"},
    },
}

# What `compat` changes beside the warp, θ without bias and the Neumann sum without its factor; a setting in the file
# comes before.
COMPAT: dict[str, dict[str, dict[str, Any]]] = {
    "autodo2021": {
        "learn": {"smoothing": 0.05},
        "hyper": {
            "way": "separate",
            "solver": "neumann",
            "hessian": "exact",
            "terms": 5,
            "neumann_step": 0.01,
        },
    }
}


class Config(Section):
    recipe: Literal["autodo", "paper"] | None = Field(
        None,
        description="autodo: one augmentation, weights, soft labels that follow predictions, the clean part trained on "
        "in folds, adjusted logits (docs/method.md); paper: all three groups, the clean part for validation alone, "
        "hyper passes of their own",
    )
    compat: Literal["autodo2021"] | None = Field(
        None,
        description="autodo2021: what changes numbers in the original code, to tell a reproduction (docs/method.md)",
    )
    run: Run = Run()
    data: Data
    model: Model = Model()
    optim: Optim = Optim()
    engine: Engine = Engine()
    train: Train = Train()
    learn: Learn = Learn()
    hyper: Hyper = Hyper()
    checkpoint: Checkpoint = Checkpoint()
    history: History = History()
    launch: Launch = Launch()

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, tree: Any) -> Any:
        """Lay the settings of `compat`, and below them those of `recipe`, under those that are given."""
        if isinstance(tree, dict):
            for presets in (COMPAT.get(str(tree.get("compat")), {}), RECIPES.get(str(tree.get("recipe")), {})):
                sections = {name: preset for name, preset in presets.items() if _mapping(tree, name)}
                tree = tree | {name: preset | tree.get(name, {}) for name, preset in sections.items()}
        return tree

    @property
    def solver(self) -> Literal["identity", "neumann", "cg", "fisher"]:
        """The solver that serves: cg in place of fisher where the batch is too large to be gathered."""
        per_rank = self.launch.nodes * self.launch.ranks_per_node if self.hyper.curvature == "per_rank" else 1
        large = -(-self.train.batch_size // per_rank) > self.hyper.most_gathered
        return "cg" if self.hyper.solver == "fisher" and large else self.hyper.solver

    @property
    def ensembling_epoch(self) -> int:
        """The first epoch, from 0, in which soft labels follow predictions, where they do."""
        return math.ceil(round(self.learn.ensembling_from * self.train.epochs, 9))  # 0.07 · 100 is a little above 7

    @property
    def lr(self) -> float:
        """The peak learning rate of this run's batch size."""
        batch = self.optim.lr_batch_size
        return self.optim.lr * self.train.batch_size / batch if batch is not None else self.optim.lr

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.run.root / self.run.name

    def to_yaml(self) -> str:
        """Every setting, defaults included, as yaml that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _mapping(tree: dict[str, Any], name: str) -> bool:
    return isinstance(tree.get(name, {}), dict)


def settings(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting by its dotted name, with its default and description."""
    found: dict[str, FieldInfo] = {}
    for name, setting in section.model_fields.items():
        kind = setting.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= settings(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = setting
    return found


def differences(old: Config, new: Config, free: Sequence[str] = FREE_AT_RESUME) -> list[str]:
    """Settings that differ, as `name: old -> new`, but for those that are `free` or in a free section."""
    return [
        f"{name}: {short(str(_get(old, name)))} -> {short(str(_get(new, name)))}"
        for name in settings()
        if _get(old, name) != _get(new, name) and not any(name == it or name.startswith(it + ".") for it in free)
    ]


def _get(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def short(text: str) -> str:
    """The text, cut off where it is long."""
    return text if len(text) <= 160 else f"{text[:157]}..."

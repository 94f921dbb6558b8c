"""One training loop for all rivals: the trainer's own run of one rank, with a rival's rule for a batch in it.

Data, crops, policy, order, start weights, optimizer, schedule, label smoothing and the average of the weights are those
of `train.train` with the same settings and nothing learnt; with the plain `Rule` the final weights are the same, bit
for bit (tests/test_rivals.py). Nothing is written to disk.

Logit adjustment (train.logit_adjustment) is the loop's: every rule sees logits with it, so that the probabilities of
ELR's targets and of SOP are those of the train labels' distribution, too; evaluations see plain logits.

Shapes: B pictures of a batch, C classes, N pictures trained on.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autodo_dist import class_prior
from autodo_dist.build import DTYPES, Parts, build, check_device, choose_device
from autodo_dist.build_data import build_split, read_data
from autodo_dist.config import Config
from autodo_dist.data.loader import Batch, Loader
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Labels, Split
from autodo_dist.errors import AutodoError
from autodo_dist.evaluate import evaluate
from autodo_dist.method.schedule import warmup_cosine
from autodo_dist.parallel import checkpoint, comm
from autodo_dist.parallel.comm import Ranks
from autodo_dist.steps import seed_dropout
from autodo_dist.train import repeatable


@dataclass(frozen=True)
class Outcome:
    """What a rival comes to.

    test_accuracy: of the last epoch, 0 to 1. test_accuracy_best_epoch: the highest of those evaluated, chosen by the
    test part itself, for information. flops: floating-point operations of the training, evaluations left out. seconds:
    of the training, evaluations and building left out.
    """

    test_accuracy: float
    test_accuracy_best_epoch: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Site:
    """What a rival trains on and with: settings, data set, parts and given labels, this process as the one rank."""

    config: Config
    manifest: Manifest
    split: Split
    ranks: Ranks

    def check_clean(self, rival: str, train_on: Sequence[str] = ("train",)) -> None:
        """AutodoError where there is no clean part, or data.train_on is none of those that the rival can take."""
        if self.config.data.train_on not in train_on:
            raise AutodoError(
                f"data.train_on = {self.config.data.train_on}: {rival} uses the clean validation part in its own way; "
                f"set data.train_on={' or '.join(train_on)}"
            )
        if not len(self.split.validation):
            raise AutodoError(
                f"{rival}: no clean validation picture; set data.validation_fraction, or pack a validation part"
            )


class Rule:
    """What a rival makes of a batch; as it stands, plain training: cross entropy and nothing else.

    A step is {`prepare`; forward; `losses`; backward of their sum / batch size; `after_backward`; the optimizer}.
    `smoothing` is α of the labels (1 − α)y + α/C.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def prepare(self, images_BCHW: torch.Tensor, labels_B: torch.Tensor, adjustment_C: torch.Tensor, lr: float) -> None:
        """Whatever comes before the step's forward. adjustment_C: what the train loss adds to logits."""

    def losses(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
        """Each sample's loss, from its logits as the train loss sees them."""
        return F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=self.smoothing)

    def leaves(self) -> Sequence[torch.Tensor]:
        """Tensors beside the model's that `losses` depended on, and which are to get a gradient."""
        return ()

    def after_backward(self) -> None:
        """Whatever follows the backward, with gradients in `leaves`."""


@dataclass(frozen=True)
class Phase:
    """Epochs on one stream of pictures.

    epochs: their numbers in the whole run, from 0. lr: a function of the steps done in the phase. adjustment_C: τ·log π
    (train.logit_adjustment, class_prior.py) of the labels of this stream, added to the logits that the train loss sees.
    """

    loader: Loader
    epochs: range
    lr: Callable[[int], float]
    adjustment_C: torch.Tensor
    rule: Rule

    @property
    def steps(self) -> int:
        """Steps of all its epochs."""
        return len(self.epochs) * self.loader.steps


PhasesOf = Callable[[Site, Parts], list[Phase]]


@contextlib.contextmanager
def site(config: Config) -> Iterator[Site]:
    """Data set and process group for the rivals of one configuration. AutodoError for settings that do not fit."""
    check(config)
    device = choose_device(config.train.device, 0)
    check_device(config, device)
    manifest = read_data(config)
    split = build_split(config, manifest)
    if not len(split.test):
        raise AutodoError(f"data {manifest.place}: has no test part, by which rivals are compared; pack one")
    torch.set_num_threads(config.train.threads)
    repeatable(config.train.deterministic)
    try:
        with comm.process_group(comm.Place(), device) as ranks:
            yield Site(config, manifest, split, ranks)
    finally:  # after an exception, too: the next run of this process makes its own
        if dist.is_initialized():
            dist.destroy_process_group()


def check(config: Config) -> None:
    """AutodoError for settings that the loop of rivals does not serve."""
    for name, refused, cure in (
        ("learn", config.learn.anything, "switch off learn.augment, learn.weight and learn.soft_label"),
        ("engine.name = deepspeed", config.engine.name != "ddp", "set engine.name=ddp"),
        (f"train.accumulate = {config.train.accumulate}", config.train.accumulate > 1, "set train.accumulate=1"),
        (f"run.fork = {config.run.fork}", bool(config.run.fork), "leave it out"),
        ("train.on_nonfinite = rollback", config.train.on_nonfinite == "rollback", "set train.on_nonfinite=stop"),
    ):
        if refused:
            raise AutodoError(
                f"{name}: rivals train as one rank, from the start, without checkpoints, and learn no rows; {cure}"
            )
    if config.model.init_from is not None and checkpoint.complete(config.folder / "checkpoints"):
        raise AutodoError(f"model.init_from: {config.folder} holds a run that has begun; take another run.name")


@contextlib.contextmanager
def parts_of(here: Site) -> Iterator[Parts]:
    """What the trainer builds for such a run, with fresh start weights."""
    parts = build(here.config, here.manifest, here.ranks)
    with contextlib.closing(parts.loaders.task.shards), contextlib.closing(parts.engine):
        yield parts


def phase(
    here: Site,
    task: Loader,
    ids: Ids,
    label_N: Labels,
    rule: Rule,
    epochs: range | None = None,
    *,
    peak: float | None = None,
    warmup_epochs: float | None = None,
) -> Phase:
    """Epochs on these sorted ids with these labels by id, in the stream of `task`; all epochs with the run's schedule,
    unless told otherwise. AutodoError if the schedule or a batch does not fit into it.
    """
    config = here.config
    epochs = range(config.train.epochs) if epochs is None else epochs
    warmup = config.optim.warmup_epochs if warmup_epochs is None else warmup_epochs
    if warmup >= len(epochs):
        raise AutodoError(f"optim.warmup_epochs = {warmup:g}: not below the {len(epochs)} epochs of a phase; lower it")
    loader = task.over(ids, label_N)
    if not loader.steps:
        raise AutodoError(f"train.batch_size = {loader.batch_size}: more than the {len(ids)} pictures; lower it")
    lr = functools.partial(
        warmup_cosine,
        peak=config.lr if peak is None else peak,
        warmup=round(warmup * loader.steps),
        total=len(epochs) * loader.steps,
    )
    dtype, classes = DTYPES[config.train.precision], len(here.manifest.classes)
    adjustment_C = torch.zeros(classes, dtype=dtype, device=here.ranks.device)
    class_prior.renew(adjustment_C, config.train.logit_adjustment, loader, epochs.start, rows=None)
    return Phase(loader, epochs, lr, adjustment_C, rule)


def plain(here: Site, parts: Parts) -> list[Phase]:
    """The trainer's own run, whose pictures data.train_on names."""
    rule = Rule(here.config.train.label_smoothing)
    return [phase(here, parts.loaders.task, here.split.train, here.split.label_N, rule)]


def run(here: Site, phases_of: PhasesOf) -> Outcome:
    """Train all phases from the start, evaluating as often as train.evaluate_every says."""
    with parts_of(here) as parts:
        phases, accuracies = phases_of(here, parts), list[float]()

        def after_epoch(done: int) -> None:
            if done % here.config.train.evaluate_every == 0 or done == here.config.train.epochs:
                accuracies.append(test_accuracy(here, parts))

        seconds = fit(parts, phases, here.ranks, after_epoch)
        return Outcome(accuracies[-1], max(accuracies), phases_flops(parts, phases, here.ranks), seconds)


def flops(here: Site, phases_of: PhasesOf) -> float:
    """Floating-point operations of `run`, without training."""
    with parts_of(here) as parts:
        return phases_flops(parts, phases_of(here, parts), here.ranks)


def fit(
    parts: Parts, phases: Sequence[Phase], ranks: Ranks, after_epoch: Callable[[int], None] = lambda _: None
) -> float:
    """Train one phase after the other; `after_epoch` is told of the epochs done. The seconds of training alone.

    AutodoError if the weights are no longer finite, or too many pictures do not decode.
    """
    seconds, before = 0.0, 0
    for each in phases:
        for number, epoch in enumerate(each.epochs):
            start = time.perf_counter()
            train_epoch(parts, each, epoch, number * each.loader.steps, before, ranks)
            if not parts.engine.norm().isfinite():  # waits for the device, too
                raise AutodoError(f"epoch {epoch + 1}: the weights are not finite; lower optim.lr")
            seconds += time.perf_counter() - start
            parts.loaders.dropped.check(len(parts.loaders.dropped.why))
            after_epoch(epoch + 1)
        before += each.steps
    return seconds


def train_epoch(parts: Parts, each: Phase, epoch: int, done: int, before: int, ranks: Ranks) -> None:
    """The steps of an epoch, after `done` steps of its phase and `before` of earlier ones."""
    parts.model.train()
    for position, batch in enumerate(each.loader.batches(epoch), start=done):
        seed_dropout(parts, before + position, ranks)
        step(parts, each, batch, each.lr(position))


def step(parts: Parts, each: Phase, batch: Batch, lr: float) -> None:
    """One step on (1/B) Σ l_i; a batch from which broken pictures were dropped keeps its B, as in the trainer."""
    images_BCHW = parts.pictures.plain(batch.images_BCHW.to(parts.dtype))
    each.rule.prepare(images_BCHW, batch.labels_B, each.adjustment_C, lr)
    _, logits_BC = parts.engine.forward(images_BCHW)
    loss_B = each.rule.losses(logits_BC + each.adjustment_C, batch.labels_B, batch.ids_B)
    parts.engine.backward(loss_B.sum() / each.loader.batch_size, each.rule.leaves())
    each.rule.after_backward()
    parts.engine.step(lr)
    if parts.average is not None:
        parts.average.update(parts.model)


def test_accuracy(here: Site, parts: Parts) -> float:
    """Top-1 accuracy on the test part, of the average of the weights where there is one."""
    found = evaluate(parts.evaluated, parts.loaders.test, here.manifest.classes, parts.dtype, here.ranks)
    return float(found["accuracy"])


def phases_flops(parts: Parts, phases: Sequence[Phase], ranks: Ranks) -> float:
    """One step of each phase, counted, times its steps. The model is of no use afterwards."""
    return sum(each.steps * step_flops(parts, each, ranks) for each in phases)


def step_flops(parts: Parts, each: Phase, ranks: Ranks) -> float:
    """One step of the phase, counted. The model is of no use afterwards."""
    return counted(functools.partial(blank_step, parts, each, ranks))


def blank_step(parts: Parts, each: Phase, ranks: Ranks) -> None:
    """A step on a full batch of black pictures."""
    seed_dropout(parts, 0, ranks)
    parts.model.train()
    step(parts, each, blank(each.loader), each.lr(0))


def blank(loader: Loader) -> Batch:
    """A full batch of the loader's first ids, with black pictures and labels 0."""
    ids_B, side = torch.from_numpy(loader.ids[: loader.batch_size]).to(loader.device), loader.crop.image_size
    images_BCHW = torch.zeros(len(ids_B), 3, side, side, device=loader.device)
    return Batch(images_BCHW, torch.zeros_like(ids_B), ids_B, images_BCHW.new_zeros(len(ids_B), 0))


def counted(work: Callable[[], object]) -> float:
    """Floating-point operations of `work`: those of convolutions and matrix products, a multiply-add being two."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def places(ids_N: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
    """Where the ids of a batch stand among the sorted ids, so that a table needs no row for any other."""
    return torch.searchsorted(ids_N, ids_B)

"""A train sample's pictures as the model saw them, made again from its run's order and draws, and its row at the time.

Which step of a pass a sample is in follows from the order alone, and so do its crop and the draws of its gates. A row
changes in the hyper steps of its own batches and nowhere else. So a row that was kept at one moment is that of another
if none of these steps lies between (Course.unchanged).

To the bit, on the kind of device and with the train.accumulate of the run: the whole part of the batch that the
sample's rank had is made again, as its place among the others may decide the last bit of a sine.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from autodo_dist import build, build_data, history, ledger, nonfinite
from autodo_dist.config import Config
from autodo_dist.data import order
from autodo_dist.data.loader import Batch
from autodo_dist.data.order import Ids, Pass
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json_lines
from autodo_dist.learnt import Source, readable
from autodo_dist.method import warp
from autodo_dist.method.hypergrad import Rows
from autodo_dist.method.rmsprop import computed_in
from autodo_dist.parallel import checkpoint
from autodo_dist.parallel.checkpoint_rows import RowReader
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.row_table import find
from autodo_dist.steps import pieces

PASSES: tuple[Pass, ...] = ("hyper", "task")  # of an epoch, in their order
HYPER, TASK = range(2)
Logits = tuple[list[float], list[float]]  # of gates and magnitudes


@dataclass(frozen=True, order=True)
class Moment:
    """When in a run: before step `position` of a pass (HYPER or TASK) of an epoch, all counted from 0."""

    epoch: int
    pass_: int = HYPER
    position: int = 0


@dataclass(frozen=True)
class Course:
    """When a sample's turn comes in its run. ids: those of each pass, HYPER and TASK; absent: those that epochs of the
    latter leave out in turn; steps: of each. begun: the epoch, and the steps done, with which the run began.

    learnt_from: the first epoch in which rows are learnt, in hyper passes of their own (`separate`) or in task steps.
    shared: all samples have one augmentation, which changes in every `renewed_every`th of these steps alone.
    """

    id: int
    ids: tuple[Ids, Ids]
    absent: tuple[Ids, ...]
    seed: int
    batch_size: int
    steps: tuple[int, int]
    epochs: int
    begun: tuple[int, int]
    learnt_from: int
    separate: bool
    shared: bool
    renewed_every: int

    def passes(self, epoch: int) -> tuple[int, ...]:
        """The passes of an epoch."""
        return (HYPER, TASK) if self.separate and epoch >= self.learnt_from else (TASK,)

    def order(self, epoch: int, pass_: int) -> Ids:
        """The ids of a pass in their order."""
        ids = order.present(self.ids[pass_], self.absent if pass_ == TASK else (), epoch)
        return order.shuffled(ids, self.seed, epoch, PASSES[pass_])

    def turn(self, epoch: int, pass_: int) -> Moment | None:
        """When the sample comes up in a pass; None where it does not."""
        position = int(np.flatnonzero(self.order(epoch, pass_) == self.id)[0]) // self.batch_size
        return Moment(epoch, pass_, position) if position < self.steps[pass_] else None

    def steps_before(self, moment: Moment) -> int:
        """Steps, of both kinds, that the run has done by then."""
        first, done = self.begun
        passes = [pass_ for epoch in range(first, moment.epoch) for pass_ in self.passes(epoch)]
        passes += [pass_ for pass_ in self.passes(moment.epoch) if pass_ < moment.pass_]
        return done + sum(self.steps[pass_] for pass_ in passes) + moment.position

    def unchanged(self, first: Moment, last: Moment) -> bool:
        """Whether no step from one moment up to a later one changes the sample's augmentation."""
        pass_ = HYPER if self.separate else TASK
        for epoch in range(max(first.epoch, self.learnt_from), min(last.epoch + 1, self.epochs)):
            if self.shared:
                begin, end = (self._position(moment, epoch, pass_) for moment in (first, last))
                changed = -(-begin // self.renewed_every) * self.renewed_every < end
            else:
                turn = self.turn(epoch, pass_)
                changed = turn is not None and first <= turn < last
            if changed:
                return False
        return True

    def _position(self, moment: Moment, epoch: int, pass_: int) -> int:
        """Steps of a pass that are done by a moment."""
        if (moment.epoch, moment.pass_) == (epoch, pass_):
            return moment.position
        return 0 if moment < Moment(epoch, pass_) else self.steps[pass_]

    def learns(self, turn: Moment) -> bool:
        """Whether the sample's step there has its augmentation as leaves of a graph (steps.pieces)."""
        learning = turn.pass_ == HYPER or (not self.separate and turn.epoch >= self.learnt_from)
        return learning and (not self.shared or turn.position % self.renewed_every == 0)


@dataclass(frozen=True)
class Kept:
    """What is known of a sample's row at some moment. step: steps done by then; where: its source in words.

    row: as learnt.readable has it; empty where it was not kept. logits: where augmentation is learnt.
    """

    where: str
    step: int
    moment: Moment
    row: dict[str, Any]
    logits: Logits | None


@dataclass(frozen=True)
class View:
    """A picture on its way into the model: as the loader gave it, and as the encoder got it; 3 × S × S, normalised.

    step: its number, from 1. kept: the row that it was warped by. exact: whether that is known to be the row of then.
    """

    moment: Moment
    step: int
    rank: int
    ranks: int
    kept: Kept
    exact: bool
    loaded_CHW: torch.Tensor
    seen_CHW: torch.Tensor


class NotSeen(Exception):
    """Why the model did not see a sample in a pass."""


def course_of(source: Source, id_: int) -> Course:
    """When a sample of the train part comes up, by the run's settings and ledger."""
    config, train = source.config, source.split.train
    folds = build_data.clean_folds(config, source.manifest, source.split)
    trained = np.union1d(train, source.split.validation) if folds else train
    batch, most = config.train.batch_size, config.train.steps_per_pass
    full = [order.steps_per_pass(count, batch, drop_last=True) for count in (len(train), order.fewest(trained, folds))]
    hyper, task = full if most is None else (min(most, steps) for steps in full)
    starts = [it for it in ledger.read(source.run) if it["event"] == "start"]
    begun = (starts[0].get("epoch", 0), starts[0]["step"]) if starts else (0, 0)
    return Course(
        id=id_,
        ids=(train, trained),
        absent=folds,
        seed=config.train.seed,
        batch_size=batch,
        steps=(hyper, task),
        epochs=config.train.epochs,
        begun=begun,
        learnt_from=max(config.hyper.start_epoch, begun[0]),
        separate=config.hyper.way == "separate",
        shared=config.learn.augment == "shared",
        renewed_every=config.hyper.validation_every,
    )


def rows_over_time(source: Source, course: Course) -> list[Kept]:
    """What is known of a sample's row, oldest first: its start, lines of history.jsonl, kept checkpoints."""
    found = [start(source, course), *from_history(source, course)]
    for path in checkpoint.complete(source.run / "checkpoints"):
        with contextlib.suppress(AutodoError):  # pruned just now, or broken: others will do
            found.append(stored(source, RowReader(path), course.id))
    return sorted(found, key=lambda it: it.moment)


def start(source: Source, course: Course) -> Kept:
    """The row before anything was learnt."""
    given_1 = source.split.label_N[[course.id]]
    values_1P = source.layout.start(given_1, torch.float64)
    (row,) = readable(source.layout, values_1P, given_1, torch.zeros(1, dtype=torch.int64), source.manifest.classes)
    operations = len(source.layout.operations)
    gate, magnitude = warp.start_logits()
    logits = ([gate] * operations, [magnitude] * operations) if operations else None
    return Kept("start", course.begun[1], Moment(course.begun[0]), row, logits)


def from_history(source: Source, course: Course) -> list[Kept]:
    """What history.jsonl has of a sample's row."""
    rows: dict[int, dict[str, Any]] = {}
    for line in read_json_lines(source.run / history.NAME):
        if line.get("id", course.id) == course.id:
            rows[line["epoch"]] = rows.get(line["epoch"], {}) | line
    return [
        Kept(f"end of epoch {epoch}", row["step"], Moment(epoch), row if "id" in row else {}, logits_of(row))
        for epoch, row in rows.items()
    ]


def logits_of(line: dict[str, Any]) -> Logits | None:
    """The logits of a line of history.jsonl."""
    return (line["gate_logit"], line["magnitude_logit"]) if "gate_logit" in line else None


def stored(source: Source, reader: RowReader, id_: int) -> Kept:
    """The row that a checkpoint holds. AutodoError if it cannot be read."""
    layout, split = source.layout, source.split
    row: dict[str, Any] = {}
    logits_KK: tuple[torch.Tensor, ...] = ()
    if layout.width:
        row_n = find(split.train, np.array([id_]))
        values_1P, updated_1 = (reader.rows(f"hyper.rows.{name}", row_n) for name in ("value", "touched"))
        (row,) = readable(layout, values_1P, split.label_N[[id_]], updated_1, source.manifest.classes)
        groups = layout.split(values_1P.double())
        logits_KK = tuple(groups[name][0] for name in history.LOGITS if name in groups)
    if layout.augment == "shared":
        logits_KK = reader.whole("hyper.shared.value").double().chunk(2)
    progress = reader.header.progress
    moment = Moment(progress["epoch"], PASSES.index(progress["pass_"]), progress["position"])
    gate, magnitude = [logit_K.tolist() for logit_K in logits_KK] or (None, None)
    logits = None if gate is None or magnitude is None else (gate, magnitude)
    return Kept(f"checkpoint of step {reader.header.step}", reader.header.step, moment, row, logits)


def row_at(course: Course, kept: list[Kept], moment: Moment) -> tuple[Kept, bool]:
    """The row of `kept`, oldest first, for a moment, and whether it is known to be that of then.

    If any of them is, the nearest one before or after is. If none is, the nearest before.
    """
    usable = [it for it in kept if it.logits is not None]
    if not usable:
        return kept[0], True
    before = [it for it in usable if it.moment <= moment][-1]
    after = next((it for it in usable if it.moment > moment), None)
    if course.unchanged(before.moment, moment):
        return before, True
    if after is not None and course.unchanged(moment, after.moment):
        return after, True
    return before, False


def view(source: Source, course: Course, kept: list[Kept], epoch: int, pass_: int, only: Kept | None = None) -> View:
    """The sample's picture in a pass that the run has come to, with the row of then, or with the row `only`.

    NotSeen where the model did not see it.
    """
    if epoch < course.begun[0]:
        raise NotSeen("before this run began: it was forked; ask the run that it was forked from")
    turn = course.turn(epoch, pass_)
    if turn is None:
        raise NotSeen("not in this pass: in an incomplete last batch, or beyond train.steps_per_pass")
    newest = max(kept, key=lambda it: it.moment)
    if turn >= newest.moment:
        raise NotSeen(f"not reached by {newest.where}")
    if any(fault.place == (epoch, PASSES[pass_], turn.position) for fault in nonfinite.recorded(source.run)):
        raise NotSeen("its batch was left out (nonfinite.jsonl)")
    done = course.steps_before(turn)
    ranks = ranks_at(source, done)
    rank, batch = load(source, course, turn, ranks)
    places = (batch.ids_B == course.id).nonzero()
    if not len(places):
        raise NotSeen("it does not decode, and was dropped (dropped.csv)")
    row, exact = row_at(course, kept, turn) if only is None else (only, False)
    place = int(places[0])
    seen_CHW = augment(source.config, source, batch, row.logits, place, course.learns(turn))
    return View(turn, done + 1, rank, ranks, row, exact, batch.images_BCHW[place], seen_CHW)


def ranks_at(source: Source, done: int) -> int:
    """The ranks that made the step after so many: those of the last start that began no later."""
    starts = [it for it in ledger.read(source.run) if it["event"] == "start" and it["step"] <= done]
    launch = source.config.launch
    return int(starts[-1]["ranks"]) if starts else launch.nodes * launch.ranks_per_node


def load(source: Source, course: Course, turn: Moment, ranks: int) -> tuple[int, Batch]:
    """The rank that had the sample, and its part of the batch, as its loader gave it."""
    ids = course.order(turn.epoch, turn.pass_)
    parts = [order.local_ids(ids, course.batch_size, turn.position, rank, ranks) for rank in range(ranks)]
    rank = next(rank for rank, part in enumerate(parts) if course.id in part)
    config, device = here(source.config)
    loaders = build_data.build_loaders(config, source.manifest, source.split, Ranks(rank, ranks, device))
    loader = loaders.hyper if turn.pass_ == HYPER else loaders.task
    with contextlib.closing(loader.batches(turn.epoch, turn.position)) as batches:
        return rank, next(batches)


def here(config: Config) -> tuple[Config, torch.device]:
    """The settings for this machine, and its device: a GPU where there is one and the run may have had one."""
    if config.train.device != "cpu" and torch.cuda.is_available():
        return config, torch.device("cuda", 0)
    return config.model_copy(update={"data": config.data.model_copy(update={"device": "auto"})}), torch.device("cpu")


@torch.no_grad()
def augment(
    config: Config, source: Source, batch: Batch, logits: Logits | None, place: int, learnt: bool
) -> torch.Tensor:
    """The picture at a place of a batch as the encoder got it, by the very steps of a run.

    All samples get the one's row here, in the memory layout in which rows are fetched. learnt: as in steps.pieces.
    """
    rows = Rows()
    if logits is not None:
        layout = source.layout
        dtype = computed_in(build.table_dtype(config))
        gate_K, magnitude_K = torch.tensor(logits, dtype=torch.float64).to(batch.images_BCHW.device, dtype)
        if layout.augment == "shared":
            rows = Rows(gate_K, magnitude_K)
        else:
            groups = layout.split(gate_K.new_zeros(len(batch), layout.width))
            groups["gate_logit"].copy_(gate_K.expand_as(groups["gate_logit"]))
            groups["magnitude_logit"].copy_(magnitude_K.expand_as(groups["magnitude_logit"]))
            rows = Rows(**groups)
    for piece in pieces(config.train.accumulate, build.DTYPES[config.train.precision], batch, rows, learnt):
        if piece.place.start <= place < piece.place.stop:
            return piece.augmented(build.build_pictures(config))[place - piece.place.start]
    raise AssertionError

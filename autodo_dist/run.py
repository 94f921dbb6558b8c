"""A run under way: what its loop, its saves and its records have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from autodo_dist import heartbeat, stop
from autodo_dist.build import Parts
from autodo_dist.config import Config
from autodo_dist.curves import Curves
from autodo_dist.data.loader import Batch
from autodo_dist.history import History
from autodo_dist.metrics import Clock, LineFile, ProgressBar
from autodo_dist.nonfinite import Watch
from autodo_dist.parallel.agreement import Agreement
from autodo_dist.parallel.checkpoint_save import Saver
from autodo_dist.parallel.comm import Ranks
from autodo_dist.progress import Progress
from autodo_dist.run_lock import Lock
from autodo_dist.steps import Trained


@dataclass
class Record:
    """What a run writes down while it goes on: rank 0's metrics and curves, and rows over time. None: not written."""

    metrics: LineFile | None
    curves: Curves | None
    history: History | None

    @property
    def lines(self) -> int:
        """Lines of metrics so far, which a checkpoint counts; 0 on other ranks than 0."""
        return self.metrics.lines if self.metrics is not None else 0

    def write(self, row: dict[str, Any]) -> None:
        """Add a line of metrics, and its points to the curves."""
        for file in (self.metrics, self.curves):
            if file is not None:
                file.write(row)

    def close(self) -> None:
        """Close all files."""
        for file in (self.metrics, self.curves, self.history):
            if file is not None:
                file.close()


@dataclass
class Run:
    """A run under way on this rank. `sums` are those of steps.FIGURES since the last line of metrics."""

    config: Config
    ranks: Ranks
    parts: Parts
    progress: Progress
    sums: torch.Tensor
    clock: Clock
    record: Record
    bar: ProgressBar
    watch: Watch
    lock: Lock
    saver: Saver
    agreement: Agreement

    def __post_init__(self) -> None:
        self.clock.steps = lambda: self.progress.step

    @property
    def steps_done(self) -> int:
        """The schedule's time: steps up to here of one pass an epoch, whether all were made or not."""
        return self.progress.epoch * self.parts.loaders.task.steps + self.progress.position

    def stop_if_asked(self) -> None:
        """Stopped on all ranks alike, soon after any of them was asked to stop. Every rank must call this."""
        if self.agreement.ask(stop.asked()):
            raise stop.Stopped

    def before_evaluated(self) -> None:
        """Between the batches of an evaluation: a sign of life, and `stop_if_asked`. Every rank must call this."""
        heartbeat.beat("evaluation", self.progress.step)
        self.stop_if_asked()

    def note(self, batch: Batch, trained: Trained) -> None:
        """Add a step that was just made on `batch` to the sums, and have it watched."""
        progress = self.progress
        self.sums += trained.figures
        place = progress.epoch, progress.pass_, progress.position
        self.watch.note(progress.step + 1, place, batch.ids_B, trained)

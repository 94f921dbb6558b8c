"""The hall where stream, method and cluster meet: resume, then {task step; evaluate; save} to the end, then sum up."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from autodo_dist import run_folder
from autodo_dist.build import Parts, build, choose_device
from autodo_dist.config import Config
from autodo_dist.data.loader import Batch
from autodo_dist.data.manifest import read_manifest
from autodo_dist.evaluate import evaluate
from autodo_dist.files import write_json
from autodo_dist.metrics import Clock, Interval, MetricsFile, ProgressBar, console, peak_memory
from autodo_dist.parallel import checkpoint, comm
from autodo_dist.parallel.comm import Ranks

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come. Plain JSON, saved with every checkpoint."""

    epoch: int = 0  # epochs done
    position: int = 0  # task steps done in the present epoch
    step: int = 0  # task steps done in all
    lines: int = 0  # lines of metrics.jsonl
    sums: list[list[float]] = field(default_factory=list)  # every rank's running sums since the last of those lines
    seconds: dict[str, float] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)  # newest evaluation
    best: dict[str, Any] = field(default_factory=dict)  # the evaluation with the best validation accuracy


@dataclass
class Run:
    """A run under way on this rank. `sums` are loss, hits and pictures since the last line of metrics."""

    config: Config
    ranks: Ranks
    parts: Parts
    progress: Progress
    sums: torch.Tensor
    clock: Clock
    metrics: MetricsFile | None  # rank 0's
    bar: ProgressBar


def train(config: Config) -> None:
    """Train to the end of `config`, from the newest complete checkpoint of its run folder. Every rank must call this.

    A finished run says so and changes nothing. AutodoError for whatever the user can mend.
    """
    started = time.perf_counter()
    run_folder.check_same_run(config, read_manifest(config.data.root).checksum)
    place = comm.place()
    if run_folder.finished(config.folder):
        if place.rank == 0:
            print(f"run {config.folder} is finished, see its summary.json; another run.name starts another run")
        return
    torch.set_num_threads(config.train.threads)
    with (
        comm.process_group(place, choose_device(config.train.device, place.local_rank)) as ranks,
        console(config.folder / "logs" / f"rank-{place.rank:05d}.log", ranks.main) as screen,
    ):
        parts = build(config, ranks)
        run_folder.describe(config, parts.manifest.checksum, ranks.gather(run_folder.host()), ranks.main)
        progress, sums = resume(config, parts, ranks)
        clock = Clock(progress.seconds)
        clock.add("start", time.perf_counter() - started)
        metrics = MetricsFile(config.folder / "metrics.jsonl", progress.lines) if ranks.main else None
        with ProgressBar(screen, config.train.epochs * parts.task.steps, progress.step) as bar:
            loop(Run(config, ranks, parts, progress, sums, clock, metrics, bar))


def loop(run: Run) -> None:
    """Epoch by epoch: task pass, evaluation, checkpoint; then the summary."""
    progress, epochs = run.progress, run.config.train.epochs
    while progress.epoch < epochs:
        task_pass(run)
        progress.epoch, progress.position = progress.epoch + 1, 0
        if progress.epoch % run.config.train.evaluate_every == 0 or progress.epoch == epochs:
            evaluate_parts(run)
        save(run)
    summarise(run)


def task_pass(run: Run) -> None:
    """The task steps of an epoch that are still to be done."""
    progress, task = run.progress, run.parts.task
    log_every, save_every = run.config.train.log_every, run.config.checkpoint.every_steps
    run.parts.engine.module.train()
    interval = Interval(run.clock)
    for batch in run.clock.waiting(task.batches(progress.epoch, progress.position)):
        with run.clock.phase("task"):
            run.sums += task_step(run.parts, batch, progress.step, run.ranks.ranks)
        progress.step, progress.position = progress.step + 1, progress.position + 1
        interval.steps += 1
        run.bar.advance(f"epoch {progress.epoch + 1}/{run.config.train.epochs}")
        if progress.step % log_every == 0:
            write_line(run, interval)
            interval = Interval(run.clock)
        # The end of an epoch is saved after its evaluation.
        if save_every and progress.step % save_every == 0 and progress.position < task.steps:
            save(run)


def task_step(parts: Parts, batch: Batch, step: int, ranks: int) -> torch.Tensor:
    """One step of SGD on the mean loss of the global batch; this rank's summed loss, hits and pictures."""
    logits_BC = parts.engine.forward(batch.images_BCHW.to(parts.dtype))
    loss = F.cross_entropy(logits_BC, batch.labels_B, reduction="sum")
    # The engine takes the mean over ranks, whose parts of the batch may differ by one picture.
    parts.engine.step(loss * ranks / parts.task.batch_size, parts.lr(step))
    hits = (logits_BC.detach().argmax(1) == batch.labels_B).sum()
    return torch.stack([loss.detach().double(), hits.double(), hits.new_tensor(len(batch)).double()])


def evaluate_parts(run: Run) -> None:
    """Evaluate on validation and test; note it in metrics and progress. Every rank must call this."""
    progress, parts = run.progress, run.parts
    row: dict[str, Any] = {"kind": "evaluation", "step": progress.step, "epoch": progress.epoch}
    with run.clock.phase("evaluation"):
        parts.engine.share_buffers()
        for name, loader in (("validation", parts.validation), ("test", parts.test)):
            found = evaluate(parts.engine.module, loader, parts.manifest.classes, parts.dtype, run.ranks)
            row |= {f"{name}_{key}": value for key, value in found.items()}
    progress.last = row
    validation = row["validation_accuracy"]
    if validation is not None and validation > progress.best.get("validation_accuracy", -1.0):
        progress.best = row
    if run.metrics is not None:
        run.metrics.write(row)
        log.info(
            "epoch %d of %d: accuracy on validation %s, on test %s",
            progress.epoch,
            run.config.train.epochs,
            percent(validation),
            percent(row["test_accuracy"]),
        )


def write_line(run: Run, interval: Interval) -> None:
    """Add a line of metrics about the steps since the last one. Every rank must call this."""
    loss, hits, pictures = run.ranks.sum(run.sums).tolist()
    run.sums.zero_()
    seconds, wait = interval.read()
    waits, memories = zip(*run.ranks.gather((wait, peak_memory(run.ranks.device))), strict=True)
    if run.metrics is None:
        return
    row = {
        "kind": "task",
        "step": run.progress.step,
        "epoch": run.progress.step / run.parts.task.steps,
        "loss": loss / pictures,
        "accuracy": hits / pictures,
        "lr": run.parts.lr(run.progress.step - 1),
        "images_per_second": interval.steps * run.parts.task.batch_size / seconds,
        "data_wait_share": max(waits),
        "peak_memory_bytes": max(memories),
    }
    run.metrics.write(row)
    log.info("step %d: loss %.4f, %.0f images/s", row["step"], row["loss"], row["images_per_second"])


def save(run: Run) -> None:
    """Save a checkpoint of this step. Every rank must call this."""
    progress = run.progress
    with run.clock.phase("save"):
        run.parts.engine.share_buffers()
        progress.sums = run.ranks.gather(run.sums.tolist())
        progress.lines = run.metrics.lines if run.metrics is not None else 0
        progress.seconds = dict(run.clock.seconds)
        root = run.config.folder / "checkpoints"
        checkpoint.save(root, progress.step, run.parts.engine.state(), asdict(progress), run.ranks)
        checkpoint.prune(root, run.config.checkpoint.keep, progress.best.get("step"), run.ranks)


def resume(config: Config, parts: Parts, ranks: Ranks) -> tuple[Progress, torch.Tensor]:
    """Take up the newest complete checkpoint, if there is one: progress and this rank's running sums.

    Every rank must call this.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    path = checkpoint.newest(config.folder / "checkpoints", ranks)
    if path is None:
        return Progress(), sums
    state = parts.engine.state()
    progress = Progress(**checkpoint.restore(path, state, ranks))
    parts.engine.restore(state)
    # Bit for bit at the same number of ranks; at another, rank 0 takes all the sums.
    if len(progress.sums) == ranks.ranks:
        sums += sums.new_tensor(progress.sums[ranks.rank])
    elif ranks.main:
        sums += sums.new_tensor(progress.sums).sum(0)
    if ranks.main:
        log.info("resumed at step %d, in epoch %d, from %s", progress.step, progress.epoch + 1, path)
    return progress, sums


def summarise(run: Run) -> None:
    """Write summary.json; with it the run is finished."""
    last, best = run.progress.last, run.progress.best
    if not run.ranks.main:
        return
    summary = {
        "test_accuracy_final": last["test_accuracy"],
        "test_accuracy_selected": best.get("test_accuracy"),
        "selected_epoch": best.get("epoch"),
        "test_accuracy_per_class": last["test_accuracy_per_class"],
        "validation_accuracy_final": last["validation_accuracy"],
        "epochs": run.progress.epoch,
        "steps": run.progress.step,
        "seconds_total": sum(run.clock.seconds.values()),
        "seconds": run.clock.seconds,
    }
    write_json(run.config.folder / "summary.json", summary)
    log.info("finished: test accuracy %s; see %s", percent(last["test_accuracy"]), run.config.folder)


def percent(share: float | None) -> str:
    """A share as the log shows it."""
    return "unknown (no pictures)" if share is None else f"{100 * share:.2f} %"

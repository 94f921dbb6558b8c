"""The hall where stream, method and cluster meet: resume, then {task step; evaluate; save} to the end, then sum up."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from autodo_dist import run_folder
from autodo_dist.build import Parts, build, choose_device
from autodo_dist.build_data import read_data
from autodo_dist.config import Config
from autodo_dist.data.loader import Batch, Loader, endless
from autodo_dist.errors import AutodoError
from autodo_dist.evaluate import evaluate
from autodo_dist.files import write_json
from autodo_dist.metrics import Clock, Interval, MetricsFile, ProgressBar, console, peak_memory
from autodo_dist.parallel import checkpoint, comm
from autodo_dist.parallel.comm import Ranks
from autodo_dist.progress import Progress, resume, tensors
from autodo_dist.steps import FIGURES, hyper_step, renew_validation, shared_step, task_step

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A run under way on this rank. `sums` are those of steps.FIGURES since the last line of metrics."""

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
    manifest = read_data(config)
    run_folder.check_same_run(config, manifest.checksum)
    place = comm.place()
    if run_folder.finished(config.folder):
        if place.rank == 0:
            print(f"run {config.folder} is finished, see its summary.json; another run.name starts another run")
        return
    torch.set_num_threads(config.train.threads)
    run_folder.make(config.folder)
    with (
        comm.process_group(place, choose_device(config.train.device, place.local_rank)) as ranks,
        console(config.folder / "logs" / f"rank-{place.rank:05d}.log", ranks.main) as screen,
    ):
        parts = build(config, manifest, ranks)
        progress, sums = resume(config, parts, ranks)
        run_folder.describe(config, manifest.checksum, ranks.gather(run_folder.host()), ranks.main)
        clock = Clock(progress.seconds)
        clock.add("start", time.time() - psutil.Process().create_time())
        metrics = MetricsFile(config.folder / "metrics.jsonl", progress.lines) if ranks.main else None
        with (
            contextlib.closing(parts.loaders.task.shards),
            ProgressBar(screen, total_steps(config, parts), progress.step) as bar,
        ):
            loop(Run(config, ranks, parts, progress, sums, clock, metrics, bar))


def loop(run: Run) -> None:
    """Epoch by epoch: hyper pass, task pass, evaluation, checkpoint; then the summary."""
    progress, epochs = run.progress, run.config.train.epochs
    while progress.epoch < epochs:
        if progress.pass_ == "hyper":
            if learning(run, "separate"):
                hyper_pass(run)
            progress.pass_, progress.position = "task", 0
        shared_pass(run) if learning(run, "shared") else task_pass(run)
        progress.epoch, progress.pass_, progress.position = progress.epoch + 1, "hyper", 0
        if progress.epoch % run.config.train.evaluate_every == 0 or progress.epoch == epochs:
            evaluate_parts(run)
        save(run)
    summarise(run)


def learning(run: Run, way: str) -> bool:
    """Whether this epoch's rows are learnt in that way."""
    hyper = run.parts.hyper
    return hyper is not None and hyper.way == way and run.progress.epoch >= hyper.start_epoch


def task_pass(run: Run) -> None:
    """The task steps of an epoch that are still to be done."""
    progress, task = run.progress, run.parts.loaders.task
    run.parts.model.train()
    interval = Interval(run.clock)
    for batch in run.clock.waiting(task.batches(progress.epoch, progress.position)):
        with run.clock.phase("task"):
            run.sums += task_step(run.parts, batch, steps_done(run), run.ranks)
        after_step(run, interval, task.steps)


def hyper_pass(run: Run) -> None:
    """The hyper steps of an epoch that are still to be done. The model is in eval mode and stays as it is."""
    progress, parts, hyper = run.progress, run.parts, run.parts.hyper
    assert hyper is not None
    parts.engine.share_buffers()
    parts.model.eval()
    interval = Interval(run.clock)
    for batch, validation in run.clock.waiting(with_validation(run, parts.loaders.hyper)):
        with run.clock.phase("hyper"):
            if validation is not None:
                renew_validation(parts, hyper, validation, run.ranks)
            progress.hyper_steps += 1
            lr = hyper.lr(steps_done(run))
            run.sums += hyper_step(parts, hyper, batch, lr, progress.hyper_steps, run.ranks)
        after_step(run, interval, parts.loaders.hyper.steps)


def shared_pass(run: Run) -> None:
    """The task steps of an epoch that are still to be done, each with a hyper step from its own forward."""
    progress, parts, hyper = run.progress, run.parts, run.parts.hyper
    assert hyper is not None
    parts.model.train()
    interval = Interval(run.clock)
    for batch, validation in run.clock.waiting(with_validation(run, parts.loaders.task)):
        with run.clock.phase("task"):
            if validation is not None:
                renew_validation(parts, hyper, validation, run.ranks)
            progress.hyper_steps += 1
            done = steps_done(run)
            run.sums += shared_step(parts, hyper, batch, done, hyper.lr(done), progress.hyper_steps, run.ranks)
        after_step(run, interval, parts.loaders.task.steps)


def steps_done(run: Run) -> int:
    """The schedule's time: steps up to here of one pass an epoch, whether all were made or not."""
    return run.progress.epoch * run.parts.loaders.task.steps + run.progress.position


def with_validation(run: Run, loader: Loader) -> Iterator[tuple[Batch, Batch | None]]:
    """The rest of a pass, each batch with a validation batch where the validation gradient is to be renewed.

    That is at the pass's first step, as the model has changed since, and every `validation_every` steps from there on.
    """
    progress, hyper = run.progress, run.parts.hyper
    assert hyper is not None
    every, start = hyper.validation_every, progress.position
    passes = (progress.hyper_steps - start) // loader.steps
    renewals = passes * -(-loader.steps // every) + -(-start // every)
    validations = endless(run.parts.loaders.hyper_validation, renewals)
    for position, batch in enumerate(loader.batches(progress.epoch, start), start=start):
        yield batch, next(validations) if position % every == 0 else None


def after_step(run: Run, interval: Interval, steps: int) -> None:
    """Count a step of the present pass, which has `steps`; write a line of metrics or save where one is due."""
    progress, config = run.progress, run.config
    progress.step, progress.position = progress.step + 1, progress.position + 1
    interval.steps += 1
    run.bar.advance(f"epoch {progress.epoch + 1}/{config.train.epochs} {progress.pass_}")
    if progress.position % config.train.log_every == 0 or progress.position == steps:
        write_line(run, interval, last=progress.position == steps)
        interval.restart()
    # The end of an epoch is saved after its evaluation.
    every = config.checkpoint.every_steps
    if every and progress.step % every == 0 and not (progress.pass_ == "task" and progress.position == steps):
        save(run)


def evaluate_parts(run: Run) -> None:
    """Evaluate on validation and test; note it in metrics and progress. Every rank must call this."""
    progress, parts = run.progress, run.parts
    row: dict[str, Any] = {"kind": "evaluation", "step": progress.step, "epoch": progress.epoch}
    with run.clock.phase("evaluation"):
        parts.engine.share_buffers()
        for name, loader in (("validation", parts.loaders.validation), ("test", parts.loaders.test)):
            found = evaluate(parts.model, loader, parts.manifest.classes, parts.dtype, run.ranks)
            row |= {f"{name}_{key}": value for key, value in found.items()}
    note_dropped(run)
    progress.last = row
    validation = row["validation_accuracy"]
    if validation is not None and validation > progress.best.get("validation_accuracy", -1.0):
        progress.best = row
    if row["test_accuracy"] is not None:
        progress.best_test = max(row["test_accuracy"], progress.best_test or 0.0)
    if run.metrics is not None:
        run.metrics.write(row)
        log.info(
            "epoch %d of %d: accuracy on validation %s, on test %s",
            progress.epoch,
            run.config.train.epochs,
            percent(validation),
            percent(row["test_accuracy"]),
        )


def write_line(run: Run, interval: Interval, last: bool) -> None:
    """Add a line of metrics about the steps since the last one; `last` in its pass. Every rank must call this."""
    progress, parts = run.progress, run.parts
    sums = dict(zip(FIGURES, run.ranks.sum(run.sums).tolist(), strict=True))
    if not math.isfinite(sums["loss"]):
        raise AutodoError(
            f"step {progress.step}: the loss is {sums['loss']}; lower optim.lr, and delete the run folder"
        )
    run.sums.zero_()
    note_dropped(run)
    seconds, wait = interval.read()
    waits, memories = zip(*run.ranks.gather((wait, peak_memory(run.ranks.device))), strict=True)
    row: dict[str, Any] = {"kind": progress.pass_, "step": progress.step}
    row["epoch"] = steps_done(run) / parts.loaders.task.steps
    if sums["pictures"]:
        row |= {name: sums[key] / sums["pictures"] for name, key in (("loss", "loss"), ("accuracy", "hits"))}
        row["lr"] = parts.lr(steps_done(run) - 1)
    if sums["hyper_steps"] and parts.hyper is not None:
        row["cosine"] = sums["cosine"] / sums["hyper_steps"]
        if parts.hyper.solve.solver == "neumann":
            row["largest_eigenvalue"] = sums["largest_eigenvalue"] / sums["hyper_steps"]
        row["hyper_lr"] = parts.hyper.lr(steps_done(run) - 1)
        row |= parts.hyper.parameters.facts() if last else {}
    row |= {
        "seconds": seconds,
        "images_per_second": interval.steps * parts.loaders.task.batch_size / seconds,
        "data_wait_share": max(waits),
        "peak_memory_bytes": max(memories),
    }
    if run.metrics is not None:
        run.metrics.write(row)
        value = f"loss {row['loss']:.4f}" if progress.pass_ == "task" else f"cosine {row['cosine']:.4f}"
        log.info("%s step %d: %s, %.0f images/s", progress.pass_, progress.step, value, row["images_per_second"])


def note_dropped(run: Run) -> None:
    """List the pictures that any rank dropped in the run folder. Every rank must call this.

    AutodoError if they are more than may be, those of earlier starts among them.
    """
    dropped = run.parts.loaders.dropped
    found = {id_: why for part in run.ranks.gather(dropped.why) for id_, why in part.items()}
    count = run_folder.write_dropped(run.config.folder, found, run.parts.manifest) if run.ranks.main else 0
    dropped.check(run.ranks.from_main(count))


def save(run: Run) -> None:
    """Save a checkpoint of this step. Every rank must call this."""
    progress = run.progress
    with run.clock.phase("save"):
        run.parts.engine.share_buffers()
        progress.sums = run.ranks.gather(run.sums.tolist())
        progress.lines = run.metrics.lines if run.metrics is not None else 0
        progress.seconds = dict(run.clock.seconds)
        root = run.config.folder / "checkpoints"
        checkpoint.save(root, progress.step, tensors(run.parts), asdict(progress), run.ranks)
        checkpoint.prune(root, run.config.checkpoint.keep, progress.best.get("step"), run.ranks)


def summarise(run: Run) -> None:
    """Write labels.csv and summary.json; with it the run is finished. Every rank must call this."""
    last, best = run.progress.last, run.progress.best
    hyper = run.parts.hyper
    labels = hyper.parameters.table_of_labels() if hyper is not None else []
    if not run.ranks.main:
        return
    if hyper is not None:
        run_folder.write_labels(run.config.folder, labels, run.parts.manifest)
    summary: dict[str, Any] = {
        "test_accuracy_final": last["test_accuracy"],
        "test_pictures": last["test_pictures"],
        "test_accuracy_selected": best.get("test_accuracy"),
        "selected_epoch": best.get("epoch"),
        "test_accuracy_per_class": last["test_accuracy_per_class"],
        "validation_accuracy_final": last["validation_accuracy"],
        "epochs": run.progress.epoch,
        "steps": run.progress.step,
        "seconds_total": sum(run.clock.seconds.values()),
        "seconds": run.clock.seconds,
    }
    if run.config.compat is not None:  # chosen by the test part itself, as the original code's tables are
        summary["test_accuracy_best_epoch"] = run.progress.best_test
    write_json(run.config.folder / "summary.json", summary)
    log.info("finished: test accuracy %s; see %s", percent(last["test_accuracy"]), run.config.folder)


def total_steps(config: Config, parts: Parts) -> int:
    """Steps of all passes of the run."""
    separate = parts.hyper is not None and parts.hyper.way == "separate"
    hyper_epochs = config.train.epochs - config.hyper.start_epoch if separate else 0
    return config.train.epochs * parts.loaders.task.steps + hyper_epochs * parts.loaders.hyper.steps


def percent(share: float | None) -> str:
    """A share as the log shows it."""
    return "unknown (no pictures)" if share is None else f"{100 * share:.2f} %"

"""What a run writes down on its way: lines of metrics, evaluations, dropped pictures, the summary."""

from __future__ import annotations

import logging
from typing import Any

from autodo_dist import heartbeat, labels_csv, run_folder
from autodo_dist.build import Hyper, Parts
from autodo_dist.build_data import build_split
from autodo_dist.config import Config
from autodo_dist.curves import Curves
from autodo_dist.evaluate import evaluate
from autodo_dist.files import read_json_lines, write_json
from autodo_dist.history import History
from autodo_dist.label_errors import scores
from autodo_dist.learnt import Source, read_columns
from autodo_dist.metrics import Interval, LineFile, peak_memory
from autodo_dist.parallel.checkpoint_rows import RowReader, find_checkpoint
from autodo_dist.parallel.comm import Ranks
from autodo_dist.predictions import predict, write_predictions
from autodo_dist.progress import Progress
from autodo_dist.run import Record, Run
from autodo_dist.steps import FIGURES

log = logging.getLogger(__name__)


def open_record(config: Config, parts: Parts, progress: Progress, ranks: Ranks) -> Record:
    """Open what this run writes down, where `progress` left off."""
    folder, hyper, rows = config.folder, parts.hyper, None
    if hyper is not None and len(hyper.kept):
        rows = History(folder, hyper.kept, parts.manifest.classes, progress.epoch, ranks.main)
    if not ranks.main:
        return Record(None, None, rows)
    metrics = LineFile(folder / "metrics.jsonl", progress.lines)
    lines = read_json_lines(folder / "metrics.jsonl")
    return Record(metrics, Curves(folder, progress.step, lines) if config.train.tensorboard else None, rows)


def write_line(run: Run, interval: Interval, last: bool) -> None:
    """Add a line of metrics about the steps since the last one; `last` in its pass. Every rank must call this.

    AutodoError if too many pictures were dropped or row gradients not finite.
    """
    progress, parts = run.progress, run.parts
    sums = dict(zip(FIGURES, run.ranks.sum(run.sums).tolist(), strict=True))
    run.sums.zero_()
    note_dropped(run)
    if parts.hyper is not None:
        parts.hyper.parameters.rest()  # raises if too many rows had bad gradients
    seconds, wait = interval.read()
    waits, memories = zip(*run.ranks.gather((wait, peak_memory(run.ranks.device))), strict=True)
    row: dict[str, Any] = {"kind": progress.pass_, "step": progress.step}
    row["epoch"] = run.steps_done / parts.loaders.task.steps
    if sums["pictures"]:
        row |= {name: sums[key] / sums["pictures"] for name, key in (("loss", "loss"), ("accuracy", "hits"))}
        row["lr"] = parts.lr(run.steps_done - 1)
    if sums["hyper_steps"] and parts.hyper is not None:
        row["cosine"] = sums["cosine"] / sums["hyper_steps"]
        if parts.hyper.solve.solver == "neumann":
            row["largest_eigenvalue"] = sums["largest_eigenvalue"] / sums["hyper_steps"]
        row["hyper_lr"] = parts.hyper.lr(run.steps_done - 1)
        row |= parts.hyper.parameters.facts() if last else {}
    row |= {
        "seconds": seconds,
        "images_per_second": interval.steps * parts.loaders.task.batch_size / seconds,
        "data_wait_share": max(waits),
        "peak_memory_bytes": max(memories),
    }
    if run.ranks.main:
        run.record.write(row)
        name = "loss" if progress.pass_ == "task" else "cosine"
        value = f"{name} {row[name]:.4f}" if name in row else "left out"
        log.info("%s step %d: %s, %.0f images/s", progress.pass_, progress.step, value, row["images_per_second"])


def evaluate_parts(run: Run) -> None:
    """Evaluate on validation and test after an epoch's last step; note it in metrics and progress.

    Stopped if a rank was asked to: nothing is noted then. Every rank must call this.
    """
    progress, parts = run.progress, run.parts
    row: dict[str, Any] = {"kind": "evaluation", "step": progress.step, "epoch": progress.epoch + 1}
    with run.clock.phase("evaluation"):
        parts.share_buffers()
        for name, loader in (("validation", parts.loaders.unseen(progress.epoch)), ("test", parts.loaders.test)):
            found = evaluate(
                parts.evaluated, loader, parts.manifest.classes, parts.dtype, run.ranks, run.before_evaluated
            )
            row |= {f"{name}_{key}": value for key, value in found.items()}
    note_dropped(run)
    progress.last = row
    validation = row["validation_accuracy"]
    if validation is not None and validation > progress.best.get("validation_accuracy", -1.0):
        progress.best = row
    if row["test_accuracy"] is not None:
        progress.best_test = max(row["test_accuracy"], progress.best_test or 0.0)
    if run.ranks.main:
        run.record.write(row)
        log.info(
            "epoch %d of %d: accuracy on validation %s, on test %s",
            progress.epoch + 1,
            run.config.train.epochs,
            percent(validation),
            percent(row["test_accuracy"]),
        )


def note_dropped(run: Run) -> None:
    """List the pictures that any rank dropped in the run folder. Every rank must call this.

    AutodoError if they are more than may be, those of earlier starts among them.
    """
    dropped = run.parts.loaders.dropped
    if not dropped.most:  # the first one ends the run
        return
    found = {id_: why for part in run.ranks.gather(dropped.why) for id_, why in part.items()}
    count = run_folder.write_dropped(run.config.folder, found, run.parts.manifest) if run.ranks.main else 0
    dropped.check(run.ranks.from_main(count))


def note_rows(run: Run) -> None:
    """Keep rows at the end of an epoch in which they were learnt, where that is due. Every rank must call this."""
    hyper, rows, epoch = run.parts.hyper, run.record.history, run.progress.epoch + 1
    if hyper is None or rows is None or epoch <= hyper.start_epoch:
        return
    if epoch % run.config.history.every == 0 or epoch == run.config.train.epochs:
        rows.note(hyper.parameters, run.progress.step, epoch)


def summarise(run: Run) -> None:
    """Write labels.csv and summary.json; with it the run is finished. Every rank must call this."""
    last, best = run.progress.last, run.progress.best
    if run.parts.hyper is not None:
        write_labels(run, run.parts.hyper)
    if not run.ranks.main:
        return
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


def write_labels(run: Run, hyper: Hyper) -> None:
    """Have the model predict the train pictures, and write labels.csv from the last checkpoint.

    Stopped if a rank was asked to: a resume begins here. Every rank must call this.
    """
    parts, folder = run.parts, run.config.folder
    split = build_split(run.config, parts.manifest)
    loader = parts.loaders.validation.over(split.train, split.label_N)
    with run.clock.phase("evaluation"):
        found = predict(
            parts.evaluated, loader, len(parts.manifest.classes), parts.dtype, run.ranks, run.before_evaluated
        )
    note_dropped(run)
    heartbeat.rest()  # a large table takes longer to read and write than a batch
    if not run.ranks.main:
        return
    reader = RowReader(find_checkpoint(folder / "checkpoints", run.progress.step))
    source = Source(folder, run.config, parts.manifest, split, hyper.parameters.layout, reader)
    write_predictions(folder, source.step, found)
    columns = read_columns(source)
    labels_csv.write_labels(folder / "labels.csv", columns, scores(columns), parts.manifest)


def percent(share: float | None) -> str:
    """A share as the log shows it."""
    return "unknown (no pictures)" if share is None else f"{100 * share:.2f} %"

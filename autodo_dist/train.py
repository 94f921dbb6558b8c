"""The hall where stream, method and cluster meet: resume, then {task step; evaluate; save} to the end, then sum up."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict

import psutil
import torch
from rich.console import Console

from autodo_dist import class_prior, curves, engine_settings, heartbeat, ledger, nonfinite, run_folder, run_lock
from autodo_dist.build import Parts, build, check_device, choose_device
from autodo_dist.build_data import read_data
from autodo_dist.config import Config
from autodo_dist.config_checks import remarks
from autodo_dist.data.loader import Batch, Loader
from autodo_dist.data.manifest import Manifest
from autodo_dist.errors import AutodoError
from autodo_dist.ledger import START
from autodo_dist.metrics import Clock, Interval, ProgressBar, console
from autodo_dist.nonfinite import Fault, NotFinite, Watch
from autodo_dist.optimizers import optimizer_class
from autodo_dist.parallel import checkpoint, comm
from autodo_dist.parallel.agreement import Agreement
from autodo_dist.parallel.checkpoint_save import Saver
from autodo_dist.parallel.comm import Ranks
from autodo_dist.progress import Progress, resume, tensors
from autodo_dist.record import evaluate_parts, note_rows, open_record, summarise, write_line
from autodo_dist.run import Run
from autodo_dist.run_lock import Lock
from autodo_dist.steps import hyper_step, renew_validation, shared_step, task_step
from autodo_dist.stop import Stopped

log = logging.getLogger(__name__)


def train(config: Config) -> bool:
    """Train to the end of `config`, from the newest complete checkpoint of its run folder. Every rank must call this.

    False if a rank was asked to stop (stop.py): all ranks have then saved the same step, and the same call goes on from
    it. A finished run says so and changes nothing. AutodoError for whatever the user can mend, also where another run
    is under way in the folder.
    """
    clock = Clock(psutil.Process().create_time())
    clock.lap("imports")
    place = comm.place()
    engine_settings.check(config, place.ranks)
    optimizer_class(config.optim)  # what is not installed is said before data is touched
    curves.check(config.train.tensorboard)
    device = choose_device(config.train.device, place.local_rank)
    check_device(config, device)
    manifest = read_data(config)
    run_folder.check_same_run(config, manifest.checksum)
    if run_folder.finished(config.folder):
        if place.rank == 0:
            print(f"run {config.folder} is finished, see its summary.json; another run.name starts another run")
        return True
    torch.set_num_threads(config.train.threads)
    repeatable(config.train.deterministic)
    run_folder.make(config.folder)
    with (
        comm.process_group(place, device) as ranks,
        console(config.folder / "logs" / f"rank-{place.rank:05d}.log", ranks.main) as screen,
        run_lock.held(config.folder, config.launch.executor == "slurm", ranks) as lock,
    ):
        clock.lap("rendezvous")
        while isinstance(ended := attempt(config, manifest, ranks, lock, screen, clock), Fault):
            leave_out(config, ended, ranks)
            clock = Clock(time.time())
    return ended is None


def repeatable(wanted: bool) -> None:
    """Have torch take deterministic algorithms, and warn of an operator that has none; or stop having it do so.

    Before this process uses a GPU: cuBLAS reads its variable once.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted, warn_only=wanted)


def attempt(
    config: Config, manifest: Manifest, ranks: Ranks, lock: Lock, screen: Console | None, clock: Clock
) -> Fault | Stopped | None:
    """Train from the newest complete checkpoint on, in whatever state this process is.

    None at the end of the run, Stopped where it was asked to stop and has saved, or the batch whose loss or gradient
    was not finite. Every rank must call this.
    """
    heartbeat.pause("start")
    parts = build(config, manifest, ranks)
    clock.lap("build")
    progress, sums = resume(config, parts, ranks)
    run_folder.describe(config, manifest.checksum, ranks.gather(run_folder.host()), ranks.main)
    clock.lap("restore")
    parts_of_start = [f"{phase} {clock.seconds[phase]:.1f} s" for phase in START if phase in clock.seconds]
    log.info("started: %s", ", ".join(parts_of_start))
    for remark in remarks(config):
        log.info(remark)
    total = total_steps(config, parts, progress)
    note_start(config, parts, progress, total, clock, ranks)
    clock.carry(progress.seconds)
    watch = Watch(parts.engine.norm, ranks)
    with (
        contextlib.closing(parts.loaders.task.shards),
        contextlib.closing(parts.engine),
        contextlib.closing(open_record(config, parts, progress, ranks)) as record,
        Saver(config.folder / "checkpoints", ranks) as saver,
        ProgressBar(screen, total, progress.step) as bar,
    ):
        agreement = Agreement(ranks)
        run = Run(config, ranks, parts, progress, sums, clock, record, bar, watch, lock, saver, agreement)
        try:
            ended = to_the_end(run)
        except NotFinite as found:
            return found.fault
        finally:
            heartbeat.rest()  # a save may still be going on, and peers be gone
        agreement.settle()
    note_end(run, ended)
    return ended


def note_start(config: Config, parts: Parts, progress: Progress, total: int, clock: Clock, ranks: Ranks) -> None:
    """Add a start to the run's ledger, with the steps that it does again; done by rank 0."""
    if not ranks.main:
        return
    metrics = config.folder / "metrics.jsonl"
    now, begun = time.time(), psutil.Process().create_time()
    lost_steps, lost_seconds = ledger.lost(metrics, progress.step)
    start = {
        "attempt": ledger.attempt(),
        "begun": begun,
        "time": now,
        "silent_since": metrics.stat().st_mtime if metrics.is_file() else begun,
        "step": progress.step,
        "epoch": progress.epoch,
        "pass_steps": parts.loaders.task.steps,
        "total_steps": total,
        "ranks": ranks.ranks,
        "seconds": {phase: seconds for phase, seconds in clock.seconds.items() if phase in START},
        "kept": progress.seconds,
        "lost_steps": lost_steps,
        "lost_seconds": lost_seconds,
    }
    ledger.add(config.folder, {"event": "start"} | start)


def note_end(run: Run, ended: Stopped | None) -> None:
    """Add the end that the run came to by itself to its ledger; done by rank 0."""
    if not run.ranks.main:
        return
    cause, step = "finished" if ended is None else "stopped", run.progress.step
    why = "" if ended is None else f"asked to; saved at step {step}"
    end = {"attempt": ledger.attempt(), "time": time.time(), "cause": cause, "why": why, "at": "", "step": step}
    ledger.add(run.config.folder, {"event": "end"} | end | {"seconds": run.clock.seconds})
    if ended is not None:
        log.info("stopped as asked, step %d is saved; the same command goes on from it", step)


def to_the_end(run: Run) -> Stopped | None:
    """The whole loop; where a rank is asked to stop on the way, save this step instead of the rest, and say so."""
    try:
        loop(run)
    except Stopped as stopped:
        save(run)
        finish_saving(run)
        return stopped
    return None


def leave_out(config: Config, fault: Fault, ranks: Ranks) -> None:
    """Have the next attempt leave a batch out. Every rank must call this. AutodoError if the run is to stop instead."""
    done = ranks.from_main(len(nonfinite.recorded(config.folder)) if ranks.main else 0)
    kept, most = checkpoint.complete(config.folder / "checkpoints"), config.train.most_rollbacks
    back = str(kept[-1]) if kept else "the start"
    lost = f"{fault}; nothing since {back} was saved; lower optim.lr (in another run.name)"
    if config.train.on_nonfinite == "stop":
        raise AutodoError(
            f"{lost}, look at those pictures, or set train.on_nonfinite=rollback and run the same command again"
        )
    if done >= most:
        raise AutodoError(f"{lost}, or raise train.most_rollbacks = {most}: {done} batches were left out before")
    if ranks.main:
        nonfinite.record(config.folder, fault)
        log.warning("%s; back to %s, and on without this batch (%d of at most %d)", fault, back, done + 1, most)
    ranks.barrier()


def loop(run: Run) -> None:
    """Epoch by epoch: hyper pass, task pass, evaluation, checkpoint; then the summary."""
    progress, epochs = run.progress, run.config.train.epochs
    while progress.epoch < epochs:
        if progress.pass_ == "hyper":
            if progress.position == 0:
                follow_predictions(run)
                renew_adjustment(run)
            if learning(run, "separate"):
                hyper_pass(run)
            progress.pass_, progress.position = "task", 0
        shared_pass(run) if learning(run, "shared") else task_pass(run)
        if (progress.epoch + 1) % run.config.train.evaluate_every == 0 or progress.epoch + 1 == epochs:
            evaluate_parts(run)  # a stop on the way saves the epoch's last step, and a resume begins here
        note_rows(run)
        progress.epoch, progress.pass_, progress.position = progress.epoch + 1, "hyper", 0
        save(run)
    finish_saving(run)
    summarise(run)


def follow_predictions(run: Run) -> None:
    """Have soft labels follow the network's predictions in the epoch that begins, where that is due. Every rank must
    call this.
    """
    hyper = run.parts.hyper
    if hyper is not None and run.progress.epoch >= run.config.ensembling_epoch:
        hyper.parameters.follow_predictions(run.steps_done)


def renew_adjustment(run: Run) -> None:
    """Adjust logits for the epoch that begins, where that is asked for. Every rank must call this."""
    adjustment_C, hyper = run.parts.objective.adjustment_C, run.parts.hyper
    if adjustment_C is not None:
        rows = None if hyper is None else hyper.parameters
        class_prior.renew(
            adjustment_C, run.config.train.logit_adjustment, run.parts.loaders.task, run.progress.epoch, rows
        )


def learning(run: Run, way: str) -> bool:
    """Whether this epoch's rows are learnt in that way."""
    hyper = run.parts.hyper
    return hyper is not None and hyper.way == way and run.progress.epoch >= hyper.start_epoch


def task_pass(run: Run) -> None:
    """The task steps of an epoch that are still to be done."""
    task = run.parts.loaders.task
    run.parts.model.train()
    interval = Interval(run.clock)
    for batch in run.clock.waiting(batches(run, task)):
        if batch is not None:
            with run.clock.phase("task"):
                run.note(batch, task_step(run.parts, batch, run.steps_done, run.ranks))
        after_step(run, interval, task.steps, made=batch is not None)


def hyper_pass(run: Run) -> None:
    """The hyper steps of an epoch that are still to be done. The model is in eval mode and stays as it is."""
    progress, parts, hyper = run.progress, run.parts, run.parts.hyper
    assert hyper is not None
    parts.engine.share_buffers()
    parts.model.eval()
    interval = Interval(run.clock)
    for batch, validation in run.clock.waiting(with_validation(run, parts.loaders.hyper)):
        assert batch is not None  # only task passes leave out any
        with run.clock.phase("hyper"):
            if validation is not None:
                renew_validation(parts, hyper, validation, run.ranks)
            progress.hyper_steps += 1
            lr = hyper.lr(run.steps_done)
            step, renewed = progress.hyper_steps, validation is not None
            run.sums += hyper_step(parts, hyper, batch, lr, step, run.ranks, renewed=renewed)
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
            if batch is not None:
                done, step, renewed = run.steps_done, progress.hyper_steps, validation is not None
                lr = hyper.lr(done)
                run.note(batch, shared_step(parts, hyper, batch, done, lr, step, run.ranks, renewed=renewed))
        after_step(run, interval, parts.loaders.task.steps, made=batch is not None)


def batches(run: Run, loader: Loader) -> Iterator[Batch | None]:
    """The rest of a pass, None in place of a batch that is left out: it counts as a step that changes nothing."""
    progress = run.progress
    here = {place[2] for place in progress.left_out if place[:2] == (progress.epoch, progress.pass_)}
    return nonfinite.without(loader.batches(progress.epoch, progress.position), progress.position, here)


def with_validation(run: Run, loader: Loader) -> Iterator[tuple[Batch | None, Batch | None]]:
    """`batches`, each with a validation batch where the validation gradient is to be renewed.

    That is at the pass's first step, as the model has changed since, and every `validation_every` steps from there on.
    """
    progress, hyper = run.progress, run.parts.hyper
    assert hyper is not None
    every, start = hyper.validation_every, progress.position
    validations = run.parts.loaders.validations(progress.epoch, done=-(-start // every))
    for position, batch in enumerate(batches(run, loader), start=start):
        yield batch, next(validations) if position % every == 0 else None


def after_step(run: Run, interval: Interval, steps: int, made: bool = True) -> None:
    """Count a step of the present pass, which has `steps`; write a line of metrics or save where one is due.

    Stopped if a rank was asked to. Every rank must call this.
    """
    progress, config = run.progress, run.config
    progress.step, progress.position = progress.step + 1, progress.position + 1
    interval.steps += made
    run.bar.advance(f"epoch {progress.epoch + 1}/{config.train.epochs} {progress.pass_}")
    if progress.position % config.train.log_every == 0 or progress.position == steps:
        run.watch.look()
        write_line(run, interval, last=progress.position == steps)
        interval.restart()
    run.stop_if_asked()
    # The end of an epoch is saved after its evaluation.
    every = config.checkpoint.every_steps
    if every and progress.step % every == 0 and not (progress.pass_ == "task" and progress.position == steps):
        save(run)


def save(run: Run) -> None:
    """Begin to save a checkpoint of this step. Every rank must call this.

    NotFinite if it is not worth saving; AutodoError if the folder is another run's by now.
    """
    run.watch.look()
    progress = run.progress
    with run.clock.phase("save"):
        run.saver.wait()  # that may take long; the folder is looked at after it, right before the next save begins
        run.lock.check()
        run.parts.share_buffers()
        progress.sums = run.ranks.gather(run.sums.tolist())
        progress.lines = run.record.lines
        progress.seconds = dict(run.clock.seconds)
        run.saver.save(
            progress.step,
            tensors(run.parts),
            asdict(progress),
            keep=run.config.checkpoint.keep,
            best=progress.best.get("step"),
            beside=run.config.folder / "metrics.jsonl",
        )


def finish_saving(run: Run) -> None:
    """Wait for the last save. AutodoError if the disk did not take it. Every rank must call this."""
    with run.clock.phase("save"):
        fault = run.saver.wait()
    if fault:
        raise AutodoError(f"{fault}; free space or mend the disk, then run the same command again")


def total_steps(config: Config, parts: Parts, progress: Progress) -> int:
    """Steps of all passes at the run's end, those up to `progress` counted as they were made."""
    epochs, done = config.train.epochs, progress.epoch
    separate = parts.hyper is not None and parts.hyper.way == "separate"
    hyper_from = max(config.hyper.start_epoch, done + (progress.pass_ == "task"))
    hyper_epochs = max(0, epochs - hyper_from) if separate else 0
    begun = progress.step - progress.position
    return begun + (epochs - done) * parts.loaders.task.steps + hyper_epochs * parts.loaders.hyper.steps

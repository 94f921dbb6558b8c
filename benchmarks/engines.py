"""What an engine costs: step time and memory of a rank with DDP and every ZeRO stage, beside a bare DDP loop.

    bare         `bare` below: PyTorch's DDP, SGD, cross entropy, and nothing else
    bare, again  the same once more: how far two pairs of processes differ that do the same
    ddp, stages  the project's task step as a run makes it where nothing is learnt, watch for NaN included

Every way has two ranks of its own, all alive from start to end: DeepSpeed changes the process that it is in. One pair
works at a time, for a turn of a few steps; a round is a turn of every way, and each round begins with another. Ratios
are medians over rounds. Pictures lie in memory. A step's processor time is the mean of both ranks', its clock the
slower rank's: other jobs add little to the one, and waiting for the other rank is in the other only.

Memory is the growth of a rank's resident set from before its model is built until after the steps; DeepSpeed is
imported before. Tensors that Python knows would leave out what lies in C++ (DDP's buckets) and what allocators keep.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autodo_dist import build
from autodo_dist.build import Parts
from autodo_dist.data.loader import Batch
from autodo_dist.data.split import Split
from autodo_dist.load_config import check_config
from autodo_dist.nonfinite import Watch
from autodo_dist.parallel import comm
from autodo_dist.parallel.comm import Place, Ranks
from autodo_dist.ports import free_port
from autodo_dist.steps import task_step
from benchmarks.hyper_step import CPU, IDS, LABELS, LR, Case, Figure, figure, make_batch, make_parts, resident, table
from benchmarks.runs import write_rows

RANKS = 2
LOOK_EVERY = 20  # steps, the default of train.log_every
BARE = ("bare", "bare, again")
WAYS: Mapping[str, dict[str, Any]] = {name: {} for name in (*BARE, "ddp")} | {
    f"deepspeed, stage {stage}": {"name": "deepspeed", "stage": stage} for stage in range(4)
}
CASES = ((Case("convnet", 10, 32, 64), 5), (Case("resnet18", 1000, 64, 16), 3))  # with the steps of a turn
ROUNDS, QUICK_ROUNDS = 11, 3
BAR = 1.05


@dataclass(frozen=True)
class Turn:
    """A step's seconds on one rank, on average over a turn, and the MiB that the rank has taken since its start."""

    clock: float
    processor: float
    memory: float


def main(
    quick: Annotated[bool, typer.Option("--quick", help="the small network, few rounds, stages 1 and 3 only")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
) -> None:
    """Measure every way in turn, then print a Markdown table with the bar that DDP is to hold."""
    load = os.getloadavg()[0]
    machine = f"{platform.platform()}, {os.cpu_count()} cores, load {load:.1f} at the start, 1 thread a rank"
    command = shlex.join(["python", "-m", "benchmarks.engines", *sys.argv[1:]])
    print(f"`{command}` on {machine}, torch {torch.__version__}\n")
    ways = [way for way in WAYS if not quick or way not in (BARE[1], "deepspeed, stage 0", "deepspeed, stage 2")]
    rows = []
    for case, steps in CASES[: 1 if quick else None]:
        rows += figures(case, measured(case, ways, QUICK_ROUNDS if quick else ROUNDS, steps))
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)


def bare(model: nn.Module, images_BCHW: torch.Tensor, labels_B: torch.Tensor) -> Iterator[torch.Tensor]:
    """The loop that everything is compared with: each `next` is a step on this rank's part; its loss."""
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    while True:
        optimizer.zero_grad()
        _, logits_BC = parallel(images_BCHW)
        loss = F.cross_entropy(logits_BC, labels_B)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def ours(parts: Parts, batch: Batch, ranks: Ranks) -> Iterator[torch.Tensor]:
    """The same steps as a task pass of the project makes them."""
    watch, done = Watch(parts.engine.norm, ranks), 0
    while True:
        trained = task_step(parts, batch, done, ranks)
        done += 1
        watch.note(done, (0, "task", done), batch.ids_B, trained)
        if done % LOOK_EVERY == 0:
            watch.look()
        yield trained.figures[0]


def begin(case: Case, way: str, ranks: Ranks) -> tuple[Callable[[], dict[str, Any]], Iterator[torch.Tensor]]:
    """What gives the model's whole tensors, and the steps, of a way on this rank's part of the batch."""
    engine = WAYS[way]
    tree = {"data": {"root": ".", "image_size": case.side}, "model": {"name": case.model}, "engine": engine}
    config = check_config(tree | {"train": {"batch_size": case.batch}, "learn": LABELS}, "of the benchmark")
    label_N = np.random.default_rng(0).integers(case.classes, size=IDS, dtype=np.int32)
    batch = part(make_batch(case, label_N, 1), ranks)
    if way in BARE:
        model = build.build_classifier(config, case.classes, ranks.device)
        return model.state_dict, bare(model, batch.images_BCHW, batch.labels_B)
    ids = np.arange(IDS, dtype=np.int64)
    parts = make_parts(config, Split(ids, ids[:0], ids[:0], label_N), case.classes, ranks)
    parts = replace(parts, hyper=None, objective=replace(parts.objective, loss="cross_entropy"))
    return lambda: parts.engine.state()["model"], ours(parts, batch, ranks)


def part(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's pictures of a global batch."""
    mine = slice(ranks.rank, None, ranks.ranks)
    return Batch(batch.images_BCHW[mine].clone(), batch.labels_B[mine], batch.ids_B[mine], batch.draws_BD[mine])


def serve(pipe: Connection, case: Case, way: str, place: Place) -> None:
    """One rank of a way: answer every number of steps with its Turn, until it is 0."""
    torch.set_num_threads(1)
    with comm.process_group(place, CPU) as ranks:
        if WAYS[way]:
            os.environ["DS_ACCELERATOR"] = CPU.type  # as the engine does, before the import
            importlib.import_module("deepspeed")
        before = resident("VmRSS")
        _, steps = begin(case, way, ranks)
        while count := pipe.recv():
            pipe.send(turn(steps, count, before, ranks))


def turn(steps: Iterator[torch.Tensor], count: int, before: float, ranks: Ranks) -> Turn:
    """Make some steps. Every rank must call this."""
    ranks.barrier()
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(steps)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return Turn(clock / count, processor / count, resident("VmRSS") - before)


def measured(case: Case, ways: Sequence[str], rounds: int, steps: int) -> dict[str, list[list[Turn]]]:
    """The turns of every way, round by round, of each rank; one turn of each before them warms up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.hyper_step"])  # torch is imported once for all of them
    found: dict[str, list[list[Turn]]] = {way: [] for way in ways}
    with ExitStack() as stack:
        pairs = {way: stack.enter_context(pair(context, case, way)) for way in ways}
        for at in range(-1, rounds):
            for way in (*ways[at % len(ways) :], *ways[: at % len(ways)]):
                for pipe in pairs[way]:
                    pipe.send(steps)
                turns = [pipe.recv() for pipe in pairs[way]]
                if at >= 0:
                    found[way].append(turns)
    return found


@contextmanager
def pair(context: Any, case: Case, way: str) -> Iterator[list[Connection]]:
    """The ranks of a way, in processes that end with this."""
    master, pipes, processes = ("127.0.0.1", free_port()), [], []
    for rank in range(RANKS):
        here, there = context.Pipe()
        words = (there, case, way, Place(rank, RANKS, rank, master))
        processes.append(context.Process(target=serve, args=words, daemon=True))
        processes[-1].start()
        there.close()  # so that a rank that fails ends the wait for its answer
        pipes.append(here)
    try:
        yield pipes
        for pipe in pipes:
            pipe.send(0)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()


def figures(case: Case, turns: Mapping[str, list[list[Turn]]]) -> list[Figure]:
    """Step time, its ratio to the bare loop's, and memory of every way."""
    clock = {way: [max(one.clock for one in ranks) for ranks in rounds] for way, rounds in turns.items()}
    processor = {way: [mean(one.processor for one in ranks) for ranks in rounds] for way, rounds in turns.items()}
    memory = {way: max(one.memory for one in rounds[-1]) for way, rounds in turns.items()}
    rows = []
    for way in turns:
        rows.append(figure(f"step of {way}, processor, {case}", 1e3 * median(processor[way]), "ms"))
        rows.append(figure(f"step of {way}, clock, {case}", 1e3 * median(clock[way]), "ms"))
    for way in (way for way in turns if way != BARE[0]):
        bar = BAR if way == "ddp" else None
        for what, seconds in (("processor", processor), ("clock", clock)):
            ratio = median(one / bare for one, bare in zip(seconds[way], seconds[BARE[0]], strict=True))
            rows.append(figure(f"{way} beside bare, {what}, {case}", ratio, "times", bar))
    return rows + [figure(f"memory of a rank, {way}, {case}", memory[way], "MiB") for way in turns]


if __name__ == "__main__":
    typer.run(main)

"""What learning costs: operations, time and memory of the hyper steps, beside plain training and a double backward.

    plain      a training step without warp, weights and soft labels
    separate   validation gradient and hyper step, with a forward of their own
    shared     validation gradient, and task and hyper step from one forward; what it adds is its cost less plain's
    reference  the original's way: double backward through the last layer, then through encoder and warp

The steps are the project's own (autodo_dist/steps.py) on random pictures in memory: no stream, one process, float32,
train and validation batches of the same size, every group of rows per sample unless a name says otherwise. Operations
are those of torch's FLOP counter, which knows products and convolutions; F is a forward of one picture. Times are
compared within a round, in which every step is made once, as the machine may be doing other things beside. With one
thread, a rank's default, they are the processor's time, to which other jobs add little; with more, the clock's.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import typer
from torch.utils.flop_counter import FlopCounterMode

from autodo_dist import build, build_data
from autodo_dist.build import Hyper, Parts
from autodo_dist.build_engine import build_engine
from autodo_dist.config import Config
from autodo_dist.data.loader import Batch
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.split import Split
from autodo_dist.load_config import check_config
from autodo_dist.method.hypergrad import Objective, Rows, augmented
from autodo_dist.method.losses import sample_loss, weight
from autodo_dist.method.warp import AFFINE
from autodo_dist.parallel import comm
from autodo_dist.parallel.comm import Ranks
from autodo_dist.steps import at_head, hyper_step, renew_validation, shared_step, task_step
from benchmarks.runs import write_rows

IDS = 4096  # rows of the table
LR = 0.01  # of weights and rows
TERMS, ALPHA = 5, 0.01  # the original's Neumann series
CPU = torch.device("cpu")
EVERYTHING = {"augment": "per_sample", "weight": True, "soft_label": True}
LABELS = {"weight": True, "soft_label": True}
STEPS = ("plain", "separate", "shared", "reference")

Settings = Mapping[str, Any]
Figure = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network, the side of its pictures in pixels, and the pictures of a batch."""

    model: str
    classes: int
    side: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model} at {self.side}, batch {self.batch}"


@dataclass
class Bench:
    """One model with its rows, one train and one validation batch, and the steps that are compared on them."""

    parts: Parts
    hyper: Hyper
    train: Batch
    validation: Batch
    ranks: Ranks
    hyper_steps: int = 0

    def plain(self) -> None:
        """A training step that knows nothing of rows."""
        self.parts.model.train()
        objective = replace(self.parts.objective, loss="cross_entropy")
        task_step(replace(self.parts, hyper=None, objective=objective), self.train, 0, self.ranks)

    def separate(self) -> None:
        """What a hyper pass does with a batch."""
        self.parts.model.eval()
        self._renew()
        hyper_step(self.parts, self.hyper, self.train, LR, self.hyper_steps, self.ranks)

    def shared(self) -> None:
        """What a task pass does with a batch where `hyper.way` is shared."""
        self.parts.model.train()
        self._renew()
        shared_step(self.parts, self.hyper, self.train, 0, LR, self.hyper_steps, self.ranks)

    def reference(self) -> None:
        """A hyper step by double backward; the table is the project's."""
        self.parts.model.eval()
        self.hyper_steps += 1
        rows = self.hyper.parameters.fetch(self.train.ids_B)
        grads = double_backward(self.parts, rows, self.train, self.validation)
        self.hyper.parameters.apply_grads(self.train.ids_B, grads, lr=LR, step=self.hyper_steps)

    def _renew(self) -> None:
        """Count a hyper step, and renew the validation gradient where it is due."""
        if self.hyper_steps % self.hyper.validation_every == 0:
            renew_validation(self.parts, self.hyper, self.validation, self.ranks)
        self.hyper_steps += 1


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="counts at a batch of 2, a few rounds of the small net, no memory")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="torch's, as in train.threads")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
) -> None:
    """Count, time and weigh the steps, then print a table with the bars that they are to hold."""
    torch.set_num_threads(threads)
    machine = f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__} with threads = {threads}"
    print(f"`{shlex.join(['python', '-m', 'benchmarks.hyper_step', *sys.argv[1:]])}` on {machine}\n")
    small, large = Case("convnet", 10, 32, 64), Case("resnet18", 1000, 224, 16)
    with comm.process_group(comm.Place(), CPU) as ranks:
        rows = counted(replace(large, batch=2) if quick else large, ranks)
        rows += timed(small, 5 if quick else 45, ranks)
        if not quick:
            rows += timed(large, 15, ranks)
    if not quick:
        rows += weighed(large, threads)
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)


def set_up(case: Case, learn: Settings, hyper: Settings, ranks: Ranks, precision: str = "fp32") -> Bench:
    """A bench of the project's own parts; of the data set they see no more than classes, ids and labels."""
    tree = {
        "data": {"root": ".", "image_size": case.side},
        "model": {"name": case.model},
        "train": {"batch_size": case.batch, "precision": precision},
        "learn": learn,
        "hyper": hyper,
    }
    config = check_config(tree, "of the benchmark")
    random = np.random.default_rng(0)
    label_N = random.integers(case.classes, size=IDS, dtype=np.int32)
    ids = np.arange(IDS, dtype=np.int64)
    parts = make_parts(config, Split(ids, ids[:0], ids[:0], label_N), case.classes, ranks)
    assert parts.hyper is not None
    train, validation = (make_batch(case, label_N, seed) for seed in (1, 2))
    return Bench(parts, parts.hyper, train, validation, ranks)


def make_parts(config: Config, split: Split, classes: int, ranks: Ranks) -> Parts:
    """The parts of a run but for its data: `build.build` without files."""
    manifest = cast(Manifest, SimpleNamespace(classes=tuple(map(str, range(classes)))))
    batch = SimpleNamespace(batch_size=config.train.batch_size, seed=config.train.seed)
    model = build.build_classifier(config, classes, ranks.device)
    return Parts(
        manifest=manifest,
        model=model,
        engine=build_engine(config, model, ranks),
        loaders=cast(build_data.Loaders, SimpleNamespace(task=batch, hyper_validation=batch)),
        dtype=build.DTYPES[config.train.precision],
        accumulate=1,
        lr=lambda done: LR,
        objective=Objective(config.learn.loss, config.train.batch_size),  # of runs that learn soft labels
        pictures=build.build_pictures(config),
        hyper=build.build_hyper(config, manifest, split, model.head, lambda step, peak: peak, 1, ranks),
        average=None,
    )


def make_batch(case: Case, label_N: npt.NDArray[np.int32], seed: int) -> Batch:
    """Normal noise for pictures, of different ids."""
    generator = torch.Generator().manual_seed(seed)
    ids_B = torch.randperm(IDS, generator=generator)[: case.batch]
    return Batch(
        images_BCHW=torch.randn(case.batch, 3, case.side, case.side, generator=generator),
        labels_B=torch.from_numpy(label_N)[ids_B].long(),
        ids_B=ids_B,
        draws_BD=torch.rand(case.batch, 2 * len(AFFINE), generator=generator),
    )


def double_backward(parts: Parts, rows: Rows, train: Batch, validation: Batch) -> Rows:
    """Gradients of all groups of rows as the original finds them: autograd twice over, encoder weights and all.

    As there, both forwards keep their graphs and the last backward fills every .grad. Only the factor α of the series
    is put in, so that the gradients are comparable.
    """
    theta = tuple(parts.model.head.parameters())
    leaves = {name: value.clone().requires_grad_() for name, value in vars(rows).items()}
    rows = Rows(**leaves)
    _, logits_BC = parts.model(validation.images_BCHW.to(parts.dtype))
    vector = torch.autograd.grad(F.cross_entropy(logits_BC, validation.labels_B), theta)
    _, logits_BC = parts.model(augmented(train.images_BCHW.to(parts.dtype), rows, train.draws_BD, parts.pictures))
    loss_B = sample_loss(parts.objective.loss, logits_BC, train.labels_B, rows.soft_logit)
    loss = (weight(leaves["weight_logit"]) * loss_B).mean()
    train_grad = torch.autograd.grad(loss, theta, create_graph=True)
    total = vector
    for _ in range(TERMS):
        product = torch.autograd.grad(train_grad, theta, grad_outputs=vector, retain_graph=True)
        vector = tuple(v - ALPHA * p for v, p in zip(vector, product, strict=True))
        total = tuple(t + v for t, v in zip(total, vector, strict=True))
    torch.autograd.backward(train_grad, [-ALPHA * t for t in total])
    parts.model.zero_grad()
    return Rows(**{name: leaf.grad for name, leaf in leaves.items()})


def counted(case: Case, ranks: Ranks) -> list[Figure]:
    """Operations of the steps in F, the forwards of encoder and head for as many pictures as the train batch has."""
    bench = set_up(case, EVERYTHING, {}, ranks)
    labels = set_up(case, LABELS, {}, ranks)
    rarely = [
        set_up(case, learn, {"validation_every": 4} | hyper, ranks)
        for learn, hyper in ((EVERYTHING, {}), (LABELS, {}), (EVERYTHING, {"solver": "fisher"}))
    ]
    forward = operations(lambda: bench.parts.model(bench.train.images_BCHW))

    def cost(step: Callable[[], object], steps: int = 1) -> float:
        return operations(step, steps) / forward

    plain = cost(bench.plain)
    adds = [cost(one.shared, one.hyper.validation_every) - plain for one in (bench, labels, *rarely)]
    head_256 = head_operations(256, ranks) / 256 / (forward / case.batch)
    return [
        figure(f"F: forward of a picture, {case.model} at {case.side}", forward / case.batch / 1e9, "GFLOP"),
        figure(f"plain, batch {case.batch}", plain, "F"),
        figure("reference", cost(bench.reference), "F"),
        figure("separate, all groups", cost(bench.separate), "F", 3.05),
        figure("separate, λ^W and λ^S", cost(labels.separate), "F", 2.05),
        figure("shared adds, all groups", adds[0], "F", 2.05),
        figure("shared adds, λ^W and λ^S", adds[1], "F", 1.05),
        figure("shared adds, validation_every=4, all groups", adds[2], "F", 1.30),
        figure("shared adds, validation_every=4, λ^W and λ^S", adds[3], "F", 0.30),
        figure("shared adds, validation_every=4, fisher, all groups", adds[4], "F", 0.35),
        figure("of these: last layer and solver at batch 256", head_256, "F"),
    ]


def operations(step: Callable[[], object], steps: int = 1) -> float:
    """Floating-point operations of a step, on average over some."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            step()
    return float(counter.get_total_flops()) / steps


def head_operations(batch: int, ranks: Ranks) -> float:
    """Operations of a hyper step from features on, at ResNet-18's head: its share that grows with the batch."""
    bench = set_up(Case("resnet18", 1000, 8, batch), EVERYTHING, {}, ranks)
    features_BD = torch.randn(batch, bench.parts.model.head.in_features)
    bench.hyper.valid_grad_CD.normal_()
    rows = bench.hyper.parameters.fetch(bench.train.ids_B)
    return operations(lambda: at_head(bench.parts, bench.hyper, [features_BD], bench.train, rows, ranks))


def timed(case: Case, rounds: int, ranks: Ranks) -> list[Figure]:
    """Medians over rounds of the times of a round's steps beside its plain step."""
    bench = set_up(case, EVERYTHING, {}, ranks)
    seconds = interleaved({name: getattr(bench, name) for name in STEPS}, rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}

    def beside_plain(name: str, less: float = 0.0) -> float:
        return statistics.median(a / b - less for a, b in zip(seconds[name], seconds["plain"], strict=True))

    return [
        *(figure(f"one step of {name}, {case}", 1e3 * median[name], "ms") for name in STEPS),
        figure(f"time of reference, {case}", beside_plain("reference"), "plain steps"),
        figure(f"time of separate, {case}", beside_plain("separate"), "plain steps", 1.20),
        figure(f"time that shared adds, {case}", beside_plain("shared", less=1.0), "plain steps", 0.80),
    ]


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round; each round begins with another step, and one before them warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for at in range(-1, rounds):
        for name in (*names[at % len(names) :], *names[: at % len(names)]):
            start = clock()
            steps[name]()
            if at >= 0:
                seconds[name].append(clock() - start)
    return seconds


def weighed(case: Case, threads: int) -> list[Figure]:
    """Memory that each step takes, each in a fresh process."""
    found = []
    for name in STEPS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            mib = process.submit(memory, case, name, threads).result()
        found.append(figure(f"memory of {name}, {case}", mib, "MiB"))
    return found


def memory(case: Case, name: str, threads: int) -> float:
    """MiB that this process held at its peak in two steps, beyond what it held before the first."""
    torch.set_num_threads(threads)
    with comm.process_group(comm.Place(), CPU) as ranks:
        step = getattr(set_up(case, EVERYTHING, {}, ranks), name)
        before = resident("VmRSS")
        step()
        step()
        return resident("VmHWM") - before


def resident(which: str) -> float:
    """MiB of main memory that this process holds (VmRSS) or has held at most (VmHWM)."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else math.nan


def figure(name: str, value: float, unit: str, most: float | None = None) -> Figure:
    """A line of the table; with a bar, whether the value is no more than that."""
    bar = None if most is None else f"<= {most:.2f}"
    return {"name": name, "value": value, "unit": unit, "bar": bar, "holds": None if most is None else value <= most}


def table(rows: Sequence[Figure]) -> str:
    """The figures as Markdown."""
    holds = {True: "yes", False: "**missed**", None: ""}
    lines = ["| what | value | bar | holds |", "|---|---|---|---|"]
    for row in rows:
        value = f"{row['value']:.3f}" if row["value"] < 100 else f"{row['value']:.0f}"
        lines.append(f"| {row['name']} | {value} {row['unit']} | {row['bar'] or ''} | {holds[row['holds']]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)

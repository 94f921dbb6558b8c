"""How a step scales: the model of `autodo plan` fitted on 1 and 2 ranks, tried on 4, and drawn for 1 to 256 nodes.

Measured on real ranks of this machine (gloo, one thread each, as many pictures on each): a hyper and a task step,
all-reduces and all-to-alls of a few sizes. The measurements of 1, 2 and 4 ranks alternate, as other jobs may come and
go, and of the repeats the lower quartile counts. The model:

    step(R) = work · contention · slow(R) + [Σ collectives(R) + skew · calls · (H_R − 1)] · slow(R)/slow(2)
    slow(R) = max{1, (R + others)/cores},   H_R = 1 + 1/2 + … + 1/R

    work         processor time of a step on 1 rank, from two batch sizes: fixed + each · pictures
    contention   processor time of the same compute on 2 ranks beside 1; on 1 rank it is 1
    others       threads of other jobs that want a core, from the shares of a core that 1 and 2 ranks got, their mean
    collectives  plan.collectives and plan.seconds with latency and bandwidth fitted on 2 ranks
    skew         what the step on 2 ranks takes beyond that, for each call of a collective: how unevenly ranks come to
                 it. The last of R that come independently is H_R − 1 such times later than the mean

So every constant is from 1 and 2 ranks, and the number of cores is given. Processes that share cores send by computing:
hence nothing overlaps, and sending slows down as computing does. What the curves for 1 to 256 nodes say of a cluster
rests on stated rates, not on this machine.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shlex
import socket
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer

from autodo_dist import plan as planning
from autodo_dist.build import Parts
from autodo_dist.commands.plan import GIGA, TERA, Sizes, workload
from autodo_dist.config import Config
from autodo_dist.data.loader import Batch
from autodo_dist.data.split import Split
from autodo_dist.experiment.table import insert
from autodo_dist.load_config import check_config
from autodo_dist.parallel import comm
from autodo_dist.parallel.comm import Ranks
from autodo_dist.plan import GIB, Cluster, Collective, Kind, Workload
from autodo_dist.steps import hyper_step, renew_validation, task_step
from benchmarks.hyper_step import CPU, EVERYTHING, IDS, LR, Case, Figure, figure, make_batch, make_parts
from benchmarks.runs import write_rows

FITTED, TRIED = (1, 2), 4
CLASSES, SIDE = 100, 32
SIZES = (1 << 12, 1 << 16, 1 << 20)  # bytes of the measured collectives
KINDS: tuple[Kind, ...] = ("all_reduce", "all_to_all")  # what the measured step makes
ALONE = 0.98  # share of a core from which on a rank had it for itself
CALLS = 10  # of a collective in a repeat
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
IMAGENET = Sizes(train=1_281_167, validation=50_000, classes=1000)
GPUS, PICTURES, STRONG_BATCH = 8, 32, 4096  # of a node; a rank's in weak scaling; the global batch of strong scaling
STATED = Cluster(1, GPUS, 80 * GIB, 128 * GIB, link=50 * GIGA, local_link=200 * GIGA, flops=20 * TERA)
COLOURS = {"compute": "black", "gradients": "tab:blue", "curvature": "tab:orange", "rows": "tab:green", "other": "grey"}

Samples = dict[str, list[float]]  # of each measured thing, its seconds in every round


@dataclass(frozen=True)
class Constants:
    """What is fitted, in seconds and bytes/s; see the module."""

    fixed: float
    each: float
    contention: float
    others: float
    cores: int
    skew: float
    latency: dict[Kind, float]
    bandwidth: dict[Kind, float]

    def slow(self, ranks: int) -> float:
        """How much slower a rank is than one that has a core for itself."""
        return max(1.0, (ranks + self.others) / self.cores)

    def compute(self, ranks: int, pictures: int) -> float:
        """Seconds of a step without what is sent."""
        work = self.fixed + self.each * pictures
        return work * (self.contention if ranks > 1 else 1.0) * self.slow(ranks)

    def sending(self, call: Collective, ranks: int) -> float:
        """Seconds of a collective in a step. An all-to-all handles R − 1 messages, each for the latency."""
        wait, speed = self.latency[call.kind], self.bandwidth[call.kind]
        machine = Cluster(1, ranks, 1, 1, speed, speed, 1, latency=wait, overhead=wait, tree=False, overlap=False)
        if call.kind == "all_to_all":
            machine = replace(machine, latency=1e-12)
        waiting = self.skew * call.calls * (sum(1 / k for k in range(1, ranks + 1)) - 1)
        return (planning.seconds(call, machine) + waiting) * self.slow(ranks) / self.slow(2)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="fewer and shorter rounds, a curve of three points")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="draw the curves there (svg)")] = None,
    doc: Annotated[Path | None, typer.Option(help="put the tables between the marks in this file")] = None,
) -> None:
    """Fit on 1 and 2 ranks, predict 4, then say which term grows when on 1 to 256 nodes."""
    rounds, pictures = (2, 8) if quick else (10, 32)
    samples = measured(rounds, pictures, repeats=3 if quick else 6)
    constants = fit(samples, pictures, os.cpu_count() or 1)
    rows = [*constant_rows(constants), *step_rows(samples, constants, pictures)]
    nodes = NODES[::4] if quick else NODES
    curves = {name: curve(nodes, weak=name == "weak") for name in ("weak", "strong")}
    rows += [row for name, terms in curves.items() for row in curve_rows(name, nodes, terms)]
    command = shlex.join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]])
    machine = (
        f"{platform.platform()}, {constants.cores} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    text = f"`{command}` on {machine}\n\n{report(rows, curves, nodes, pictures)}"
    print(text)
    if json_file is not None:
        write_rows(json_file, rows)
    if plot_file is not None:
        draw(plot_file, curves, nodes)
    if doc is not None:
        insert(doc, "results", text)


# Measured on this machine ---------------------------------------------------------------------------------------------


def measured(rounds: int, pictures: int, repeats: int) -> dict[int, Samples]:
    """By number of ranks, the seconds of everything in every repeat of every round, of the slowest rank."""
    schedule = [(ranks, free_port()) for _ in range(rounds) for ranks in (*FITTED, TRIED)]
    context = multiprocessing.get_context("forkserver")  # torch is imported once
    context.set_forkserver_preload(["benchmarks.hyper_step"])
    with ProcessPoolExecutor(TRIED, context) as pool:
        futures = [pool.submit(rank_of, rank, schedule, pictures, repeats) for rank in range(TRIED)]
        by_rank = [future.result() for future in futures]
    found: dict[int, Samples] = {ranks: defaultdict(list) for ranks in (*FITTED, TRIED)}
    for at, (ranks, _) in enumerate(schedule):
        times = [mine[at] for mine in by_rank[:ranks]]
        for name in times[0]:
            found[ranks][name] += map(max, zip(*(mine[name] for mine in times), strict=True))
    return found


def rank_of(rank: int, schedule: Sequence[tuple[int, int]], pictures: int, repeats: int) -> list[Samples]:
    """The measurements of one process; nothing in those of fewer ranks."""
    torch.set_num_threads(1)
    found: list[Samples] = []
    for ranks, port in schedule:
        if rank < ranks:
            place = comm.Place(rank, ranks, rank, ("127.0.0.1", port)) if ranks > 1 else comm.Place()
            with comm.process_group(place, CPU) as group:
                found.append(times(group, pictures, repeats))
        else:
            found.append({})
    return found


def times(ranks: Ranks, pictures: int, repeats: int) -> Samples:
    """Seconds of some repeats, after one that is not counted: of the step, of compute alone, and of collectives."""
    found: Samples = {}

    def clock(name: str, work: Callable[[], object], calls: int = 1) -> None:
        found[name], found[f"{name}, processor"] = [], []
        for repeat in range(-1, repeats):
            ranks.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(calls):
                work()
            if repeat >= 0:
                found[name].append((time.perf_counter() - wall) / calls)
                found[f"{name}, processor"].append((time.process_time() - processor) / calls)

    for factor in (1, 2) if ranks.ranks == 1 else (1,):
        both, alone = steps_of(ranks, factor * pictures)
        clock(f"step {factor}", both)
        if factor == 1:
            clock("compute", alone)
    for size in SIZES if ranks.ranks == 2 else ():
        values = torch.zeros(size // 4)
        even = [len(values) // ranks.ranks] * ranks.ranks
        clock(f"all_reduce {size}", lambda values=values: dist.all_reduce(values), CALLS)  # type: ignore[misc]
        clock(f"all_to_all {size}", lambda v=values, e=even: ranks.exchange(v, e, e), CALLS)  # type: ignore[misc]
    return found


def steps_of(ranks: Ranks, pictures: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A hyper and a task step with so many pictures on each rank, and as much computing without ranks."""
    config = config_of(ranks.ranks, pictures)
    case = Case("convnet", CLASSES, SIDE, ranks.ranks * pictures)
    label_N = np.random.default_rng(0).integers(CLASSES, size=IDS, dtype=np.int32)
    ids = np.arange(IDS, dtype=np.int64)
    parts = make_parts(config, Split(ids, ids[:0], ids[:0], label_N), CLASSES, ranks)
    train, validation = (part_of(make_batch(case, label_N, seed), ranks) for seed in (1, 2))
    made = [0]

    def both() -> None:
        assert parts.hyper is not None
        made[0] += 1
        parts.model.eval()
        renew_validation(parts, parts.hyper, validation, ranks)
        hyper_step(parts, parts.hyper, train, LR, made[0], ranks)
        parts.model.train()
        task_step(parts, train, 0, ranks)

    return both, lambda: compute_alone(parts, train)


def compute_alone(parts: Parts, batch: Batch) -> None:
    """Forward and backward of the bare model."""
    torch.autograd.grad(parts.model(batch.images_BCHW)[1].sum(), tuple(parts.model.parameters()))


def part_of(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's part of a global batch."""
    size = len(batch) // ranks.ranks
    mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
    return Batch(batch.images_BCHW[mine], batch.labels_B[mine], batch.ids_B[mine], batch.draws_BD[mine])


def config_of(ranks: int, pictures: int) -> Config:
    """Settings of the measured step: every group of rows, curvature summed in parameter space."""
    tree = {
        "data": {"root": ".", "image_size": SIDE},
        "model": {"name": "convnet"},
        "train": {"batch_size": ranks * pictures},
        "learn": EVERYTHING,
        "hyper": {"way": "separate", "most_gathered": 1},
    }
    return check_config(tree, "of the benchmark")


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Fitted and predicted -------------------------------------------------------------------------------------------------


def fit(samples: Mapping[int, Samples], pictures: int, cores: int) -> Constants:
    """The constants, from typical times on 1 and 2 ranks."""
    one, two = ({name: typical(values) for name, values in samples[ranks].items()} for ranks in FITTED)
    small, large = one["step 1, processor"], one["step 2, processor"]
    each = min(large - small, small) / pictures  # noise must not make the fixed part negative
    shares = {ranks: t["compute, processor"] / t["compute"] for ranks, t in zip(FITTED, (one, two), strict=True)}
    # A rank that had a core for itself tells nothing of others.
    others = [max(0.0, cores / share - ranks) for ranks, share in shares.items() if share < ALONE]
    lines = {kind: line([two[f"{kind} {size}"] for size in SIZES]) for kind in KINDS}
    even = Constants(
        fixed=small - each * pictures,
        each=each,
        contention=two["compute, processor"] / one["compute, processor"],
        others=sum(others) / max(1, len(others)),
        cores=cores,
        skew=0.0,
        # On 2 ranks an all-reduce is two messages of half the buffer, an all-to-all one.
        latency={"all_reduce": lines["all_reduce"][0] / 2, "all_to_all": lines["all_to_all"][0]},
        bandwidth={"all_reduce": 1 / lines["all_reduce"][1], "all_to_all": 0.5 / lines["all_to_all"][1]},
    )
    left = two["step 1"] - sum(predicted(even, 2, pictures))
    calls = sum(call.calls for call in collectives(2, pictures))
    return replace(even, skew=max(0.0, left) / calls / 0.5)  # H_2 - 1 = 1/2


def typical(seconds: Sequence[float]) -> float:
    """Their lower quartile: other jobs make times longer, never shorter."""
    return statistics.quantiles(seconds, n=4)[0]


def line(seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds and seconds a byte of a ≥ 0 and b > 0 in a + b·SIZES, least squares of the relative errors."""
    sizes, times_ = np.array(SIZES, float), np.array(seconds)
    matrix = np.stack([np.ones_like(sizes), sizes], 1) / times_[:, None]
    (start, slope), *_ = np.linalg.lstsq(matrix, np.ones_like(times_), rcond=None)
    return max(float(start), 1e-9), max(float(slope), 1e-15)


def collectives(ranks: int, pictures: int) -> list[Collective]:
    """What the plan counts in a hyper and a task step."""
    machine = Cluster(1, ranks, GIB, GIB, GIGA, GIGA, TERA)
    work = workload(config_of(ranks, pictures), Sizes(IDS, IDS, CLASSES), machine)
    return [call for step in ("hyper", "task") for call in planning.collectives(work, ranks, step)]


def predicted(constants: Constants, ranks: int, pictures: int) -> tuple[float, float]:
    """Seconds of a hyper and a task step: compute, and what is sent."""
    calls = collectives(ranks, pictures) if ranks > 1 else []
    return constants.compute(ranks, pictures), sum(constants.sending(call, ranks) for call in calls)


def constant_rows(constants: Constants) -> list[Figure]:
    """The fitted constants."""
    rows = [
        figure("compute: fixed", 1e3 * constants.fixed, "ms"),
        figure("compute: each picture", 1e3 * constants.each, "ms"),
        figure("contention of 2 ranks", constants.contention, "times"),
        figure("threads of other jobs", constants.others, "threads"),
        figure("skew of a call", 1e6 * constants.skew, "µs"),
    ]
    for kind in constants.latency:
        rows += [
            figure(f"{kind}: latency", 1e6 * constants.latency[kind], "µs"),
            figure(f"{kind}: bandwidth", constants.bandwidth[kind] / GIGA, "GB/s"),
        ]
    return rows


def step_rows(samples: Mapping[int, Samples], constants: Constants, pictures: int) -> list[Figure]:
    """Predicted and measured step by number of ranks; that of TRIED was not fitted."""
    rows = []
    for ranks in (*FITTED, TRIED):
        computing, sending = predicted(constants, ranks, pictures)
        real = typical(samples[ranks]["step 1"])
        error = 100 * ((computing + sending) / real - 1)
        name = f"step on {ranks} rank{'s' * (ranks > 1)}"
        rows += [
            figure(f"{name}: predicted", 1e3 * (computing + sending), "ms"),
            figure(f"{name}: of it sending and waiting", 1e3 * sending, "ms"),
            figure(f"{name}: measured", 1e3 * real, "ms") | {"repeats": [1e3 * t for t in samples[ranks]["step 1"]]},
            figure(f"{name}: error", error, "%"),
        ]
    return rows


# 1 to 256 nodes -------------------------------------------------------------------------------------------------------


def curve(nodes: Sequence[int], *, weak: bool) -> dict[str, list[float]]:
    """Seconds of each term of a hyper and a task step of ResNet-18 on ImageNet, at the stated rates."""
    terms: dict[str, list[float]] = {term: [] for term in COLOURS}
    for count in nodes:
        cluster = replace(STATED, nodes=count)
        work = imagenet(PICTURES * cluster.ranks if weak else STRONG_BATCH, cluster)
        found = dict.fromkeys(COLOURS, 0.0)
        for step in planning.plan(work, cluster).steps:
            found["compute"] += step.compute_seconds
            for each in step.traffic:
                found[term_of(each.part)] += each.seconds
        for term, value in found.items():
            terms[term].append(value)
    return terms


def imagenet(batch: int, cluster: Cluster) -> Workload:
    """ResNet-18 on ImageNet, every group of rows, the paper's separate hyper passes."""
    tree = {
        "data": {"root": "."},
        "train": {"batch_size": batch},
        "learn": EVERYTHING,
        "hyper": {"way": "separate"},
    }
    return workload(check_config(tree, "of the benchmark"), IMAGENET, cluster)


def term_of(part: str) -> str:
    """The curve to which a collective of the plan belongs."""
    if part == "gradients":
        return part
    if part in ("curvature", "validation gradient") or part.startswith("gathered"):
        return "curvature"
    return "rows" if part.startswith("row") else "other"


def curve_rows(name: str, nodes: Sequence[int], terms: Mapping[str, Sequence[float]]) -> list[Figure]:
    """The points of a curve, and from where on each term is larger than compute."""
    rows = [
        figure(f"{name} scaling, {count} nodes: {term}", 1e3 * values[at], "ms")
        for term, values in terms.items()
        for at, count in enumerate(nodes)
    ]
    return [*rows, *(figure(f"{name} scaling: {what}", value, "nodes") for what, value in crossings(nodes, terms))]


def crossings(nodes: Sequence[int], terms: Mapping[str, Sequence[float]]) -> list[tuple[str, float]]:
    """The first number of nodes of each stretch in which a term leads what is sent, and where one is above compute."""
    sent = {term: values for term, values in terms.items() if term != "compute"}
    leaders = [max(sent, key=lambda term: sent[term][at]) for at in range(len(nodes))]
    starts = [at for at in range(len(nodes)) if at == 0 or leaders[at] != leaders[at - 1]]
    found = [(f"{leaders[at]} leads what is sent, from", float(nodes[at])) for at in starts]
    for name, values in (*sent.items(), ("all that is sent", [sum(each) for each in zip(*sent.values(), strict=True)])):
        above = [count for at, count in enumerate(nodes) if values[at] > terms["compute"][at]]
        found += [(f"{name} above compute, from", float(above[0]))] if above else []
    return found


def report(
    rows: Sequence[Figure], curves: Mapping[str, Mapping[str, Sequence[float]]], nodes: Sequence[int], pictures: int
) -> str:
    """The figures as Markdown."""
    value = {row["name"]: row["value"] for row in rows}
    lines = ["| constant | value |", "|---|---|"]
    lines += [f"| {row['name']} | {row['value']:.3g} {row['unit']} |" for row in rows if is_constant(row["name"])]
    lines += [
        "",
        f"| {pictures} pictures a rank | predicted | of it sending and waiting | measured | error |",
        "|---|---|---|---|---|",
    ]
    for name in ("step on 1 rank", "step on 2 ranks", f"step on {TRIED} ranks"):
        three = " | ".join(
            f"{value[f'{name}: {what}']:.1f} ms" for what in ("predicted", "of it sending and waiting", "measured")
        )
        fitted = "" if str(TRIED) in name else " (fitted)"
        lines.append(f"| {name}{fitted} | {three} | {value[f'{name}: error']:+.1f} % |")
    for name, terms in curves.items():
        what = f"{PICTURES} pictures a rank" if name == "weak" else f"{STRONG_BATCH} pictures in a batch"
        lines += ["", f"| {name} scaling: {what}; ms | {' | '.join(f'{n} nodes' for n in nodes)} |"]
        lines.append("|---" * (len(nodes) + 1) + "|")
        lines += [f"| {term} | {' | '.join(f'{1e3 * t:.3g}' for t in values)} |" for term, values in terms.items()]
        lines += ["", *(f"- {said} {first:g} node{'s' * (first > 1)}" for said, first in crossings(nodes, terms))]
    return "\n".join(lines)


def is_constant(name: str) -> bool:
    """Whether a figure is a fitted constant."""
    return "scaling" not in name and not name.startswith("step on")


def draw(file: Path, curves: Mapping[str, Mapping[str, Sequence[float]]], nodes: Sequence[int]) -> None:
    """Time of each term over the number of nodes, both logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "autodo"  # the same file from the same numbers
    from matplotlib import pyplot

    chart, panels = pyplot.subplots(1, len(curves), figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (name, terms) in zip(panels, curves.items(), strict=True):
        for term, values in terms.items():
            panel.loglog(nodes, [1e3 * value for value in values], "o-", label=term, color=COLOURS[term], markersize=3)
        panel.set_title(f"{name}: {f'{PICTURES} pictures a rank' if name == 'weak' else f'a batch of {STRONG_BATCH}'}")
        panel.set_xlabel(f"nodes of {GPUS} GPUs")
        panel.set_xticks(nodes, [str(count) for count in nodes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms in a hyper and a task step")
    panels[-1].legend(loc="upper right")
    file.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(file, metadata={"Date": None})
    pyplot.close(chart)


if __name__ == "__main__":
    typer.run(main)

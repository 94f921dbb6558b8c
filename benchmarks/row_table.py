"""What the sharded table costs: time of a step, memory of a rank, bytes on the way, against the bars of the design.

A row is that of ImageNet with every group learnt: P = 1 + 2·7 + 1000 = 1015 values. A step fetches the rows of B = 256
ids and applies a gradient to each. Ids are drawn from a fixed seed, before the clock starts.

    time     one rank; the table of ImageNet beside one of 10,000 rows, beside dense RMSprop on 200,000 × 1,000 values,
             and beside gathering and scattering as many bytes: values and second moments, once each way
    memory   a process that builds ImageNet's table and makes steps on it, every page of it written to
    bytes    what torch.distributed.all_to_all_single is given for other ranks, on 1, 2, 4 and 8 processes

Times are compared within a round, in which everything is done once, as the machine may be doing other things beside;
they are the processor's with one thread (benchmarks/hyper_step.py).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import typer

from autodo_dist.hyperparameters import Layout
from autodo_dist.method import warp
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.parallel import comm
from autodo_dist.parallel.comm import Place, Ranks
from autodo_dist.parallel.row_table import RowTable
from autodo_dist.ports import free_port
from benchmarks.hyper_step import CPU, Figure, figure, interleaved, resident, table
from benchmarks.runs import write_rows

CLASSES = 1000
LAYOUT = Layout("per_sample", warp.AFFINE, True, CLASSES, 0.1)
P, B = LAYOUT.width, 256
ROW = 8 * P + 8  # bytes: value, second moment, step of the last update
MIB = 2**20
SPARE = 64  # batches' values (1 MiB each) that "O(batch)" may be: a step's own tensors and the libraries' buffers
SECONDS = 60.0  # "seconds", for building; on a virtual machine memory that is new to the host costs most of them


@dataclass(frozen=True)
class Sizes:
    """Rows of the tables that are compared, and rounds of the two comparisons."""

    small: int
    large: int
    dense: int
    rounds: int
    dense_rounds: int
    ranks: tuple[int, ...]


FULL = Sizes(10_000, 1_281_167, 200_000, 101, 15, (1, 2, 4, 8))
QUICK = Sizes(2_000, 100_000, 20_000, 21, 5, (1, 2))


@dataclass
class Bench:
    """A table with ids to come, a batch each, and one batch of gradients."""

    table: RowTable
    batches: Iterator[torch.Tensor]
    grads_BP: torch.Tensor
    steps: int = 0

    def step(self) -> None:
        """Fetch the rows of a batch and apply its gradients."""
        ids_B = next(self.batches)
        self.steps += 1
        self.table.fetch(ids_B)
        self.table.apply_grads(ids_B, self.grads_BP, lr=0.01, step=self.steps)

    def plain(self) -> None:
        """Gather and scatter the values and second moments of a batch: its ids are its rows."""
        rows_B = next(self.batches)
        for part in (self.table.value_nP, self.table.second_nP):
            part[rows_B] = part[rows_B]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="small tables, few rounds, one and two ranks")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
) -> None:
    """Measure the table, then print a Markdown table with the bars that it is to hold. One thread throughout."""
    torch.set_num_threads(1)
    sizes = QUICK if quick else FULL
    machine = f"{platform.platform()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}"
    print(f"`{shlex.join(['python', '-m', 'benchmarks.row_table', *sys.argv[1:]])}` on {machine}\n")
    # Steps beside dense RMSprop first, in this process; what comes after would leave it no memory.
    with comm.process_group(Place(), CPU) as ranks:
        rows = beside_dense(sizes, ranks)
        gc.collect()
        rows = beside_small(sizes, ranks) + rows
    gc.collect()
    rows += memory(sizes) + travelled(sizes)
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)


def build(count: int, ranks: Ranks) -> RowTable:
    """This rank's part of a table for ids 0..count-1, with random labels, as a run builds it."""
    label_N = np.random.default_rng(0).integers(CLASSES, size=count, dtype=np.int32)
    return RowTable(np.arange(count), lambda mine: LAYOUT.start(label_N[mine], torch.float32), ranks, Rmsprop())


def make_bench(rows: RowTable, batches: int, seed: int, apart: int = 1) -> Bench:
    """A bench on a table, with random ids for that many batches, multiples of `apart`; no id is twice in a batch."""
    random = np.random.default_rng(seed)
    drawn = [torch.from_numpy(random.choice(rows.ids[::apart], B, replace=False)) for _ in range(batches)]
    return Bench(rows, iter(drawn), torch.randn(B, P, generator=torch.Generator().manual_seed(seed)))


def beside_small(sizes: Sizes, ranks: Ranks) -> list[Figure]:
    """Steps on the large table beside the small one's, and beside plain copies in the large one."""
    small, large = build(sizes.small, ranks), build(sizes.large, ranks)
    large.second_nP.zero_()  # memory is given to a process at its first write; no step is to wait for that
    benches = [make_bench(rows, sizes.rounds + 1, seed) for seed, rows in enumerate((small, large, large))]
    names = f"step, N = {sizes.small:,}", f"step, N = {sizes.large:,}", f"gather and scatter, N = {sizes.large:,}"
    doers = benches[0].step, benches[1].step, benches[2].plain
    seconds = interleaved(dict(zip(names, doers, strict=True)), sizes.rounds)
    return [
        *(figure(name, 1e3 * statistics.median(seconds[name]), "ms") for name in names),
        figure("step, large beside small N", ratio(seconds[names[1]], seconds[names[0]]), "times", 1.3),
        figure("step beside gather and scatter", ratio(seconds[names[1]], seconds[names[2]]), "times", 5.0),
    ]


def beside_dense(sizes: Sizes, ranks: Ranks) -> list[Figure]:
    """Steps, ten a round, beside one of torch.optim.RMSprop on all soft labels, with a dense gradient."""
    rows = build(sizes.dense, ranks)
    rows.second_nP.zero_()
    bench = make_bench(rows, 10 * (sizes.dense_rounds + 1), 3)

    def ten_steps() -> None:
        for _ in range(10):
            bench.step()

    value = torch.nn.Parameter(torch.zeros(sizes.dense, CLASSES))
    value.grad = torch.full_like(value, 1e-3)
    optimizer = torch.optim.RMSprop([value], lr=0.01)
    seconds = interleaved({"dense": optimizer.step, "rows": ten_steps}, sizes.dense_rounds)
    faster = 10 * ratio(seconds["dense"], seconds["rows"])
    name = f"dense RMSprop, N = {sizes.dense:,}"
    return [
        figure(name, 1e3 * statistics.median(seconds["dense"]), "ms"),
        at_least(f"{name}, beside a step", faster, "times", 100 * sizes.dense / FULL.dense),
    ]


def ratio(ones: list[float], others: list[float]) -> float:
    """Median over rounds of the one time divided by the other."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def at_least(name: str, value: float, unit: str, least: float) -> Figure:
    """A line of the table whose bar is a lower bound."""
    return figure(name, value, unit) | {"bar": f">= {least:.2f}", "holds": value >= least}


def memory(sizes: Sizes) -> list[Figure]:
    """Building of the large table and steps on it, in a process of its own."""
    (found,) = on_ranks(1, weigh, sizes.large)
    bound = sizes.large * ROW
    name = f"N = {sizes.large:,}, one rank"
    return [
        figure(f"building, {name}", found["seconds"], "s", SECONDS),
        figure(f"building: peak of memory, {name}", found["peak"] / bound, "of the table's", 1.1),
        figure(f"tensors of the table, {name}", found["tensors"] / bound, "of ceil(N/R)·(8P + 8) bytes", 1.0),
        figure(
            f"memory after building and steps beyond ceil(N/R)·(8P + 8), {name}",
            (found["held"] - bound) / MIB,
            "MiB",
            SPARE * B * P * 4 / MIB,
        ),
    ]


def weigh(place: Place, count: int) -> dict[str, float]:
    """What this process needs to build a table and make steps on it: seconds, and bytes beyond what it held before."""
    with comm.process_group(place, CPU) as ranks:
        make_bench(build(4 * B, ranks), 4, 0).step()  # libraries and their buffers
        before, start = resident("VmRSS"), time.perf_counter()
        rows = build(count, ranks)
        seconds = time.perf_counter() - start
        rows.second_nP.zero_()  # zeros take no memory until they are written to; here all do
        peak = resident("VmHWM")
        bench = make_bench(rows, 20, 1)
        for _ in range(20):
            bench.step()
        held = resident("VmRSS")
        return {
            "seconds": seconds,
            "peak": (peak - before) * MIB,
            "held": (held - before) * MIB,
            "tensors": float(tensor_bytes(rows)),
        }


def travelled(sizes: Sizes) -> list[Figure]:
    """Bytes that a rank sends to others in a step, and its tensors' bytes, on several numbers of ranks.

    The ids of the larger table are four times those of the smaller, so that they have the same owners.
    """
    most = 2 * B * P * 4 + 16 * B
    found = []
    for ranks in sizes.ranks:
        counted = [on_ranks(ranks, count_bytes, times * sizes.small, times) for times in (1, 4)]
        sent, more = (statistics.mean(one["sent"] for one in ones) for ones in counted)
        share = max(one["share"] for ones in counted for one in ones)
        name = f"{ranks} rank{'s' * (ranks > 1)}"
        found += [
            figure(f"bytes sent by a rank in a step, {name}, N = {sizes.small:,}", sent, "bytes", most),
            figure(f"more of them with N = {4 * sizes.small:,}, {name}", more - sent, "bytes", 0.0),
            figure(f"tensors of a rank, {name}", share, "of ceil(N/R)·(8P + 8) bytes", 1.0),
        ]
    return found


def count_bytes(place: Place, count: int, apart: int) -> dict[str, float]:
    """Bytes that this rank gives all_to_all_single for other ranks, on average over eight steps, and its tensors' share
    of ceil(N/R)·(8P + 8) bytes.
    """
    sent = 0
    original = dist.all_to_all_single

    def counting(output: torch.Tensor, rows: torch.Tensor, received: list[int], to: list[int], **words: Any) -> Any:
        nonlocal sent
        sent += (sum(to) - to[place.rank]) * rows.shape[1:].numel() * rows.itemsize
        return original(output, rows, received, to, **words)

    with comm.process_group(place, CPU) as ranks:
        bench = make_bench(build(count, ranks), 8, place.rank, apart)
        with mock.patch.object(dist, "all_to_all_single", counting):
            for _ in range(8):
                bench.step()
        return {"sent": sent / 8, "share": tensor_bytes(bench.table) / (-(-count // ranks.ranks) * ROW)}


def tensor_bytes(rows: RowTable) -> int:
    """Bytes of a rank's part of a table."""
    return sum(part.nbytes for part in (rows.value_nP, rows.second_nP, rows.touched_n))


def on_ranks(ranks: int, function: Callable[..., dict[str, float]], *words: int) -> list[dict[str, float]]:
    """What the function gives on each of so many new processes, which join one another before any ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.hyper_step"])  # torch is imported once for all of them
    master = ("127.0.0.1", free_port())
    places = [Place(rank, ranks, rank, master) for rank in range(ranks)]
    with ProcessPoolExecutor(ranks, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, places, *([word] * ranks for word in words)))


if __name__ == "__main__":
    typer.run(main)

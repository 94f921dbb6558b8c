"""What asking at every step whether any rank was told to stop costs (autodo_dist/parallel/agreement.py), on gloo.

Processes of one thread make steps of a product of matrices and a sum over ranks; every second one asks. `call` is the
time in the question; `step` how much longer a step with it is than its neighbour without, which holds what the answers
on their way cost beside it. Medians, as the machine may be doing other things.
"""

from __future__ import annotations

import multiprocessing
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer

from autodo_dist.parallel import comm
from autodo_dist.parallel.agreement import Agreement
from autodo_dist.parallel.comm import Place
from autodo_dist.ports import free_port
from benchmarks.chaos import figure, machine
from benchmarks.runs import write_rows

RANKS = (2, 4)
VALUES = 100_000  # that are summed over ranks in a step


def rank(place: Place, steps: int) -> tuple[float, float, float]:
    """Medians of a rank: seconds of a question, and of a step without and by which one with it is longer."""
    torch.set_num_threads(1)
    matrix, values = torch.ones(400, 400), torch.ones(VALUES)
    calls: list[float] = []
    without: list[float] = []
    longer: list[float] = []
    with comm.process_group(place, torch.device("cpu")) as ranks:
        agreement = Agreement(ranks)
        for step in range(steps):
            begun = time.perf_counter()
            if step % 2:
                agreement.ask(False)
                calls.append(time.perf_counter() - begun)
            matrix @ matrix
            ranks.sum(values)
            seconds = time.perf_counter() - begun
            if step % 2:
                longer.append(seconds - without[-1])
            else:
                without.append(seconds)
        agreement.settle()
    warm = len(calls) // 10
    return statistics.median(calls[warm:]), statistics.median(without[warm:]), statistics.median(longer[warm:])


def main(
    steps: Annotated[int, typer.Option(min=20)] = 4000,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
) -> None:
    """Measure, and print the figures of the slowest rank."""
    rows = []
    for count in RANKS:
        master = "127.0.0.1", free_port()
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(rank, [Place(it, count, it, master) for it in range(count)], [steps] * count))
        for at, name in enumerate(("a question", "a step without it", "a step with it is longer by")):
            rows.append(figure(f"{count} ranks: {name}", 1e6 * max(it[at] for it in found), "µs"))
    command = shlex.join(["python", "-m", "benchmarks.agreement", *sys.argv[1:]])
    rows[0] |= {"command": command, "machine": machine()}
    print(f"`{command}` on {machine()}\n\n| figure | |\n|---|---|")
    print("\n".join(f"| {row['name']} | {row['value']:.0f} {row['unit']} |" for row in rows))
    if json_file is not None:
        write_rows(json_file, rows)


if __name__ == "__main__":
    typer.run(main)

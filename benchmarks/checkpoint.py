"""What a checkpoint costs: how long a save holds training up, and how soon a resumed run makes its first step.

stall    2 ranks, a table of 1 GB in all (values, second moments, steps): the call that begins a save, from the second
         one on, beside one copy of the same bytes from memory to memory, in turn
write    the same saves until they are on the disk, while training would go on
resume   configs/digits.yaml on 2 ranks by the launcher, broken off and started again: what its own clock and its
         first line of metrics say
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from autodo_dist.ledger import START
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.parallel import comm
from autodo_dist.parallel.checkpoint_save import Saver, size
from autodo_dist.parallel.comm import Place
from autodo_dist.parallel.row_table import RowTable
from autodo_dist.ports import free_port
from benchmarks.hyper_step import CPU, Figure, figure, table
from benchmarks.runs import CONFIG, write_rows

ROOT = CONFIG.parent.parent
RANKS, P = 2, 1015
RESUMES = 3


@dataclass(frozen=True)
class Stall:
    """Seconds of each round on one rank: copying the bytes of the state, beginning a save, ending it."""

    copy: list[float]
    begin: list[float]
    write: list[float]
    state_bytes: int


def main(
    quick: Annotated[bool, typer.Option("--quick", help="a table of 100 MB, few rounds, one resume")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    data: Annotated[Path, typer.Option(help="packed digits")] = Path("data/digits"),
) -> None:
    """Measure saves and a resume, then print a Markdown table with the bars that they are to hold."""
    machine = f"{platform.platform()}, {os.cpu_count()} cores, 1 thread a rank, torch {torch.__version__}"
    print(f"`{shlex.join(['python', '-m', 'benchmarks.checkpoint', *sys.argv[1:]])}` on {machine}\n")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        rows = stalls(Path(folder), *((100_000_000, 5) if quick else (1_000_000_000, 9)))
        rows += resumes(Path(folder), data, 1 if quick else RESUMES)
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)


def stalls(folder: Path, table_bytes: int, rounds: int) -> list[Figure]:
    """The figures of saves."""
    port, context = free_port(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(RANKS, mp_context=context) as pool:
        places = [Place(rank, RANKS, rank, ("127.0.0.1", port)) for rank in range(RANKS)]
        futures = [pool.submit(stall, folder, place, table_bytes, rounds) for place in places]
        return figures([future.result() for future in futures])


def figures(found: Sequence[Stall]) -> list[Figure]:
    """The figures of saves, from those of each rank."""
    # Training waits for the slowest rank.
    copy, begin, write = (
        [max(values) for values in zip(*(getattr(each, name) for each in found), strict=True)]
        for name in ("copy", "begin", "write")
    )
    ratios = [stalled / copied for stalled, copied in zip(begin[1:], copy[1:], strict=True)]
    return [
        figure("state of all ranks", found[0].state_bytes / 1e6, "MB"),
        figure("copy of a rank's part, memory to memory", 1e3 * statistics.median(copy[1:]), "ms"),
        figure("stall of the first save, which makes the buffer", 1e3 * begin[0], "ms"),
        figure("stall of a later save", 1e3 * statistics.median(begin[1:]), "ms"),
        figure("stall of a later save beside a copy", statistics.median(ratios), "times", 1.5),
        figure("a save until it is on the disk", statistics.median(write), "s"),
    ]


def stall(folder: Path, place: Place, table_bytes: int, rounds: int) -> Stall:
    """One rank's part in it."""
    torch.set_num_threads(1)
    with comm.process_group(place, CPU) as ranks:
        ids = np.arange(table_bytes // (8 * P + 8))
        rows = RowTable(ids, lambda mine: torch.randn(len(mine), P), ranks, Rmsprop())
        rows.second_nP.fill_(1.0)  # memory is given to a process at its first write
        state = {"rows": rows.state()}
        sources = [rows.value_nP, rows.second_nP, rows.touched_n]
        targets = [torch.ones_like(source) for source in sources]
        beside = folder / "metrics.jsonl"
        beside.touch()
        times = Stall([], [], [], size(state))
        with Saver(folder / "checkpoints", ranks) as saver:
            for step in range(rounds):
                ranks.barrier()
                begun = time.perf_counter()
                for target, source in zip(targets, sources, strict=True):
                    target.copy_(source)
                times.copy.append(time.perf_counter() - begun)
                ranks.barrier()
                begun = time.perf_counter()
                saver.save(step, state, {}, keep=1, best=None, beside=beside)
                times.begin.append(time.perf_counter() - begun)
                if fault := saver.wait():
                    raise OSError(fault)
                times.write.append(time.perf_counter() - begun)
    return times


def resumes(folder: Path, data: Path, count: int) -> list[Figure]:
    """The figures of a resume: medians of its parts."""
    words = [
        f"run.root={folder}",
        f"data.root={data.resolve()}",
        "run.name=digits",
        "train.log_every=1",
        "hyper.start_epoch=0",
    ]
    words += [
        "train.epochs=2",
        "optim.warmup_epochs=1",
        "checkpoint.every_steps=3",
        "checkpoint.keep=99",
        "launch.ranks_per_node=2",
    ]
    command = [sys.executable, "-m", "launcher.submit", "--config", str(CONFIG), *words]
    run = folder / "digits"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    found: dict[str, list[float]] = {}
    for _ in range(count):
        broken_off_at = break_off(run)
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
        for phase in START:
            seconds = re.search(rf"started: .*{phase} ([\d.]+) s", said)
            assert seconds is not None, said
            found.setdefault(phase, []).append(float(seconds[1]))
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        first = next(line for line in lines if line["step"] == broken_off_at + 1)
        found.setdefault("first batch and step", []).append(first["seconds"])
    medians = {name: statistics.median(values) for name, values in found.items()}
    after = sum(seconds for name, seconds in medians.items() if name != "imports")
    rows = [figure(f"resume of the digits: {name}", seconds, "s") for name, seconds in medians.items()]
    return [*rows, figure("resume of the digits: imports to the end of the first step", after, "s", 10.0)]


def break_off(run: Path) -> int:
    """Leave the run as one that was killed a step after a checkpoint in its midst; that checkpoint's step."""
    (run / "summary.json").unlink()
    checkpoints = sorted((run / "checkpoints").iterdir())
    kept = checkpoints[len(checkpoints) // 2]
    for path in checkpoints:
        if path.name > kept.name:
            path.rename(run / f"gone-{time.monotonic_ns()}")
    return int(kept.name.removeprefix("step-"))


if __name__ == "__main__":
    typer.run(main)

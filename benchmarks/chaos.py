"""Real ranks killed with kill -9 at drawn places, each run started again and finished: equal to the unbroken one?

A trial is a short run of the embedded digits at 16 px, on 2 to 4 ranks, by the separate or the shared way: a rank is
killed, the same run started again, and its end compared to the bit with that of an unbroken run of the same settings:
every tensor of the last checkpoint, progress, metrics, labels, summary. Its seed draws rank, place and moment.

Trials are kept in ROOT/trials.jsonl, a line each: called again after a stop, this goes on with the next one.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from autodo_dist import run_folder
from autodo_dist.config import Config, differences
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, write_json, write_text
from autodo_dist.load_config import load_config
from autodo_dist.proof.compare import compare
from autodo_dist.proof.kill import Start, parted, submit
from autodo_dist.proof.plan import Aim, Phase, Place, aim, named, places
from autodo_dist.proof.prove import Fallen, describe, one, usual
from benchmarks import warm
from benchmarks.runs import CONFIG, as_command, write_rows

SMALL = (
    *("data.image_size=16", "data.crop_padding=1", "train.batch_size=32", "train.epochs=2", "train.steps_per_pass=8"),
    *("optim.warmup_epochs=1", "hyper.start_epoch=1", "hyper.terms=5", "train.log_every=4", "checkpoint.every_steps=3"),
    "launch.max_restarts=0",  # it is started again by hand
)
PHASES: tuple[Phase, ...] = ("start", "task", "hyper", "save", "evaluation")  # in turn
LIMIT_S = 300.0  # that a start may take
MOST_MISSED = 20  # kills of a trial that do not fall

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Settings of a trial."""

    way: str
    ranks: int

    @property
    def name(self) -> str:
        """Part of its runs' names."""
        return f"{self.way}-{self.ranks}"

    def config(self, root: Path, words: Sequence[str]) -> Config:
        """Its settings, over configs/digits.yaml."""
        return load_config(CONFIG, [*SMALL, f"hyper.way={self.way}", f"run.root={root / self.name}", *words])


CASES = [Case(way, ranks) for ranks in (2, 3, 4) for way in ("separate", "shared")]


def main(
    root: Annotated[Path, typer.Option(help="folder of the runs and of trials.jsonl")] = Path("runs/chaos"),
    trials: Annotated[int, typer.Option(min=1, help="how many, those done before among them")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="of trial 0; the next one has the next seed")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="four trials: under a minute on a quiet machine")] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="start by the user's command, not from a process that has imported all")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="over all settings")] = None,
) -> None:
    """Run the trials that are still to be done, then print the figures; exit status 1 if a trial was not equal."""
    trials = 4 if quick else trials
    root = root / ("quick" if quick else "") / ("cold" if cold else "warm")
    kept, start = root / "trials.jsonl", submit if cold else warm.start
    if not cold:
        warm.server()  # so that no trial waits for its imports
    done = {row["seed"]: row for row in read(kept)}
    for trial in range(trials):
        if seed + trial not in done:
            case, phase = CASES[trial // len(PHASES) % len(CASES)], PHASES[trial % len(PHASES)]
            done[seed + trial] = run_trial(case, phase, case.config(root, words or []), seed + trial, start)
            write_text(kept, "".join(f"{json.dumps(row)}\n" for row in done.values()))
        print(told(done[seed + trial]), file=sys.stderr, flush=True)
    rows = figures([done[seed + trial] for trial in range(trials)], "imports included" if cold else "imports apart")
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)
    raise typer.Exit(int(not rows[0]["holds"]))


def read(file: Path) -> list[Row]:
    """The rows of a file of JSON lines; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def run_trial(case: Case, phase: Phase, config: Config, seed: int, start: Start) -> Row:
    """Kill a rank in that phase, start the run again, compare; drawn anew where the run ends before the kill falls.

    A run that is not equal is kept.
    """
    config = named(config, f"trial-{seed}", case.ranks)
    unbroken = unbroken_run(case, config, start)
    generator = np.random.default_rng(seed)
    missed, hit, folder = 0, None, config.folder
    while hit is None:
        if missed == MOST_MISSED:
            raise AutodoError(f"run {folder}: ended before each of {missed} kills; see {folder}.log")
        shutil.rmtree(folder, ignore_errors=True)
        drawn = draw(phase, config, generator)
        ended = one(start, config, folder.name, case.ranks, drawn, unbroken["usual"], LIMIT_S)
        missed, hit = missed + (ended.hit is None), ended.hit
    again = one(start, config, folder.name, case.ranks, limit=LIMIT_S)
    found = compare(config.run.root / "unbroken", folder)
    if not found.differences:
        shutil.rmtree(folder)
    return {
        "seed": seed,
        "case": case.name,
        "kill": describe(Fallen(case.ranks, drawn, hit)),
        "aim": phase,
        "fell": kind(config, *parted(hit.shown)),
        "saving": hit.saving,
        "missed": missed,
        "equal": not found.differences,
        "differences": found.differences[:5],
        "sha256": found.digests,
        "lost": ended.seconds + again.seconds - unbroken["seconds"],
        "git_commit": run_folder.git_commit(),
    }


def unbroken_run(case: Case, config: Config, start: Start) -> Row:
    """The case's unbroken run, made where it is not there: its seconds, and those of each phase.

    AutodoError if it was made with other settings.
    """
    config, file = named(config, "unbroken", case.ranks), config.run.root / "unbroken.json"
    if file.is_file():
        if changed := differences(run_folder.read_config(config.folder), config, ()):
            raise AutodoError(f"run {config.folder}: has other settings ({'; '.join(changed)}); choose another --root")
        return read_json(file)
    shutil.rmtree(config.folder, ignore_errors=True)
    config.run.root.mkdir(parents=True, exist_ok=True)
    ended = one(start, config, "unbroken", case.ranks)
    write_json(file, {"seconds": ended.seconds, "usual": usual(config, ended)})
    return read_json(file)


def draw(phase: Phase, config: Config, generator: np.random.Generator) -> Aim:
    """Where a rank is to be killed in that phase."""
    have = [place for place in (Place("start", 0), *places(config)) if kind(config, place.phase, place.steps) == phase]
    return aim(have[int(generator.integers(len(have)))], config.launch.ranks_per_node, generator)


def kind(config: Config, phase: str, steps: int) -> str:
    """The phase; a task step of the shared way is a hyper step too, from the epoch on in which rows are learnt."""
    learns = config.hyper.way == "shared" and steps >= config.hyper.start_epoch * (config.train.steps_per_pass or 0)
    return "hyper" if phase == "task" and learns else phase


def told(row: Row) -> str:
    """A trial in one line."""
    verdict = "equal" if row["equal"] else f"NOT EQUAL: {row['differences'][0]}"
    return f"seed {row['seed']}, {row['case']}: {row['kill']}; {verdict}; {row['lost']:.1f} s lost"


def figures(trials: Sequence[Row], starts: str) -> list[Row]:
    """Equal trials, kills by the phase of their aim and by where they fell, seconds lost.

    A save goes on beside steps and evaluations, so a kill may break one off wherever it falls.
    """
    equal = sum(row["equal"] for row in trials)
    seeds = [row["seed"] for row in trials]
    rows = [
        figure(
            "trials equal to the unbroken run", equal, f"of {len(trials)}", f">= {len(trials)}", equal == len(trials)
        )
        | {"seeds": [min(seeds), max(seeds)], "unequal": [row for row in trials if not row["equal"]]}
        | {"trials": [told(row) for row in trials]}
        | {"commits": sorted({str(row["git_commit"]) for row in trials}), "command": command(), "machine": machine()},
    ]
    for key, what in (("aim", "aimed at"), ("fell", "that fell in")):
        counts = Counter(row[key] for row in trials)
        rows += [figure(f"kills {what} {name}", count, "kills") for name, count in sorted(counts.items())]
    rows.append(figure("kills that broke off a save", sum(row["saving"] for row in trials), "kills"))
    rows.append(figure("kills drawn anew, as the run had ended", sum(row["missed"] for row in trials), "kills"))
    lost = statistics.median(row["lost"] for row in trials)
    return [*rows, figure(f"lost by a kill, {starts}, median", lost, "s")]


def figure(name: str, value: float, unit: str, bar: str | None = None, holds: bool | None = None) -> Row:
    """A row of a benchmark."""
    return {"name": name, "value": value, "unit": unit, "bar": bar, "holds": holds}


def table(rows: Sequence[Row]) -> str:
    """The figures as Markdown, with command and machine."""
    lines = [f"`{command()}` on {machine()}", "", "| figure | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {row['name']} | {row['value']:.4g} {row['unit']} |" for row in rows)])


def command() -> str:
    """The command that this is."""
    return shlex.join(["python", "-m", "benchmarks.chaos", *sys.argv[1:]])


def machine() -> str:
    """What it runs on."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    as_command(main)

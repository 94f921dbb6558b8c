"""Runs that are asked to stop, lose a rank, or have one that hangs, at drawn moments: how many go on, and how soon.

    signals   USR2 or TERM to a rank or to the launcher at any moment, starts and saves among them; then the same
              command again, and the end compared to the bit with that of a run which nothing happened to
    dead      kill -9 of a rank in a drawn step: until its warden has recorded it, and until no rank is left
    hung      SIGSTOP of a rank in a drawn step: which rank is named, whether its log holds its stack, how soon
    quiet     ranks that stand still for seconds again and again, in whatever phase: nothing may count as hung

By the local executor, as in benchmarks/chaos.py: the launcher and the ranks are real, and start warm. On Slurm the same
ranks and wardens run; what Slurm adds (it ends the peers, and requeues) is in tests/slurm.
Trials are kept in ROOT/*.jsonl, a line each: called again after a stop, this goes on with the next one.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, write_text
from autodo_dist.proof.compare import compare
from autodo_dist.proof.kill import Launcher, parted, shown
from autodo_dist.proof.plan import named
from benchmarks import warm
from benchmarks.chaos import CASES, LIMIT_S, Case, figure, machine, read, unbroken_run
from benchmarks.runs import as_command, write_rows

HANG_AFTER = 5.0  # s, train.hang_after of the runs with a rank that hangs
PATIENT = 20.0  # s, that of the run whose ranks stand still
LONGEST_STOP = 8.0  # s for which one does; warden.STOPPED_S is 10
SHOWN_S = 30.0  # s in which a hung rank is to be named

Row = dict[str, Any]


@dataclass
class Going:
    """A run that was started: its launcher, its ranks, and where all print."""

    config: Config
    launcher: Launcher
    ranks: list[psutil.Process]
    log: Path

    @property
    def errors(self) -> list[Row]:
        """What ranks and wardens have recorded so far."""
        found = []
        for path in (self.config.folder / "errors").glob("rank-*.json"):
            with suppress(OSError, ValueError):
                found.append(read_json(path))
        return found

    @property
    def alive(self) -> bool:
        """Whether any rank is there."""
        return any(running(rank) for rank in self.ranks)

    def until(self, condition: Callable[[], object], limit: float = LIMIT_S) -> bool:
        """Wait until that holds; whether it does. AutodoError after so many seconds."""
        end = time.monotonic() + limit
        while not (met := bool(condition())) and self.launcher.poll() is None:
            if time.monotonic() > end:
                raise AutodoError(f"run {self.config.folder}: stands still; see {self.log}")
            time.sleep(0.002)
        return met or bool(condition())

    def end(self) -> int:
        """Wait for the launcher; its exit status."""
        self.until(lambda: False)
        return self.launcher.wait()

    def at_step(self, rank: int, steps: int) -> None:
        """Wait until a rank has done so many steps."""
        self.until(lambda: parted(shown(self.ranks[rank].pid))[1] >= steps)


def running(process: psutil.Process) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def begin(config: Config) -> Going:
    """Start a run, and wait until all of its ranks are there."""
    config.run.root.mkdir(parents=True, exist_ok=True)
    file, log = (config.folder.with_name(f"{config.run.name}.{suffix}") for suffix in ("yaml", "log"))
    write_text(file, config.to_yaml())
    going = Going(config, warm.start(file, log), [], log)
    count = config.launch.ranks_per_node

    def there() -> bool:
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(going.launcher.pid).children()
            going.ranks = sorted(found, key=lambda it: (it.create_time(), it.pid))
        return len(going.ranks) == count

    going.until(there)
    return going


def fresh(config: Config) -> Config:
    """The config of a run whose folder is taken away first."""
    shutil.rmtree(config.folder, ignore_errors=True)
    return config


def lasting(config: Config) -> Config:
    """The config of a run that does not come to its end by itself."""
    return config.model_copy(update={"train": config.train.model_copy(update={"epochs": 10_000})})


def signalled(case: Case, config: Config, seed: int) -> Row:
    """A run that gets a signal at a drawn moment, drawn anew where it had ended by then; and its end, compared."""
    generator = np.random.default_rng(seed)
    config = named(config, f"signal-{seed}", case.ranks)
    seconds = unbroken_run(case, config, warm.start)["seconds"]
    status, missed = 0, -1
    while not status:
        missed += 1
        number = (signal.SIGUSR2, signal.SIGTERM)[int(generator.integers(2))]
        to, moment = int(generator.integers(-1, case.ranks)), float(generator.random()) * seconds
        going = begin(fresh(config))
        time.sleep(moment)
        at = shown(going.ranks[max(to, 0)].pid) if going.ranks else ""
        with suppress(ProcessLookupError):
            os.kill(going.ranks[to].pid if to >= 0 else going.launcher.pid, number)
        status = going.end()
    again = begin(config).end()
    found = compare(config.run.root / "unbroken", config.folder) if again == 0 else None
    equal = found is not None and not found.differences
    if equal:
        shutil.rmtree(config.folder)
    row = {"seed": seed, "case": case.name, "signal": number.name, "to": to, "at": at, "status": status}
    return row | {
        "missed": missed,
        "equal": equal,
        "differences": found.differences[:3] if found else [f"exit {again}"],
    }


def dead(case: Case, config: Config, seed: int) -> Row:
    """Kill -9 of a rank: seconds until its warden has recorded that, and until all ranks are gone."""
    generator = np.random.default_rng(seed)
    going = begin(fresh(named(config, f"dead-{seed}", case.ranks)))
    rank = int(generator.integers(case.ranks))
    going.at_step(rank, int(generator.integers(1, 16)))
    begun, at = time.time(), shown(going.ranks[rank].pid)
    going.ranks[rank].kill()
    going.until(lambda: not going.alive)
    stopped = time.time() - begun
    going.end()
    seen = [it["time"] - begun for it in going.errors if (it["rank"], it["kind"]) == (rank, "death")]
    said = f"rank {rank} was killed by signal 9" in going.log.read_text()
    return {
        "seed": seed,
        "case": case.name,
        "at": at,
        "seen": min(seen, default=None),
        "stopped": stopped,
        "said": said,
    }


def hung(case: Case, config: Config, seed: int) -> Row:
    """SIGSTOP of a rank: seconds until one is named, which, and whether its log holds its stack."""
    generator = np.random.default_rng(seed)
    going = begin(fresh(lasting(named(config, f"hung-{seed}", case.ranks))))  # woken for its stack, it may go on
    rank = int(generator.integers(case.ranks))
    going.at_step(rank, int(generator.integers(1, 16)))
    begun, at = time.time(), shown(going.ranks[rank].pid)
    going.ranks[rank].suspend()
    going.end()
    found = [it for it in going.errors if it["kind"] == "hang"]
    log = going.log if rank == 0 else going.config.folder / f"logs/rank-{rank:05d}.out"
    return {
        **{"seed": seed, "case": case.name, "at": at, "rank": rank, "named": [it["rank"] for it in found]},
        "right": [it["rank"] for it in found] == [rank] and f"rank {rank} hangs in" in going.log.read_text(),
        "stack": "most recent call first" in log.read_text(),
        "seconds": min((it["time"] - begun for it in found), default=None),
    }


def quiet(minutes: float, case: Case, config: Config, seed: int) -> Row:
    """A long run whose ranks stand still by turns, for LONGEST_STOP at most: how often one counted as hung.

    It ends with the first one.
    """
    generator, begun, stops, longest = np.random.default_rng(seed), time.monotonic(), 0, 0.0
    config = lasting(named(config, "quiet", case.ranks))
    going = begin(fresh(config))
    going.at_step(0, 8)
    while time.monotonic() - begun < 60 * minutes and going.launcher.poll() is None:
        rank, seconds = going.ranks[int(generator.integers(case.ranks))], float(generator.random()) * LONGEST_STOP
        with suppress(psutil.NoSuchProcess):  # an alarm has ended it
            rank.suspend()
            time.sleep(seconds)
            rank.resume()
        stops, longest = stops + 1, max(longest, seconds)
        time.sleep(2 + float(generator.random()))  # two with no step between would be one that is too long
    if going.launcher.poll() is None:
        going.launcher.terminate()
    going.end()
    steps = json.loads((config.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    row = {"seed": seed, "minutes": (time.monotonic() - begun) / 60, "stops": stops, "longest": longest, "steps": steps}
    return row | {"alarms": len([it for it in going.errors if it["kind"] == "hang"])}


def main(
    root: Annotated[Path, typer.Option(help="folder of the runs and of the trials")] = Path("runs/slurm_faults"),
    signals: Annotated[int, typer.Option(min=1)] = 50,
    kills: Annotated[int, typer.Option(min=1)] = 20,
    hangs: Annotated[int, typer.Option(min=1)] = 20,
    minutes: Annotated[float, typer.Option(help="of the run whose ranks stand still by turns")] = 60.0,
    quick: Annotated[bool, typer.Option("--quick", help="a few of each: under a minute on a quiet machine")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="over all settings")] = None,
) -> None:
    """Do the trials that are still to be done, then print the figures; exit status 1 if a bar does not hold."""
    if quick:
        root, signals, kills, hangs, minutes = root / "quick", 4, 2, 1, 0.15
    warm.server()  # so that no trial waits for its imports

    def trials(kind: str, count: int, one: Callable[..., Row], *more: str) -> list[Row]:
        kept = root / f"{kind}.jsonl"
        done = read(kept)
        for seed in range(len(done), count):
            case = CASES[seed % len(CASES)]
            done.append(one(case, case.config(root, [*more, *(words or [])]), seed))
            write_text(kept, "".join(f"{json.dumps(row)}\n" for row in done))
            print(f"{kind}: {json.dumps(done[-1])}", file=sys.stderr, flush=True)
        return done[:count]

    root.mkdir(parents=True, exist_ok=True)
    rows = signal_figures(trials("signals", signals, signalled))
    rows += dead_figures(trials("dead", kills, dead))
    rows += hung_figures(trials("hung", hangs, hung, f"train.hang_after={HANG_AFTER:g}"))
    patient = f"train.hang_after={PATIENT:g}"
    rows += quiet_figures(trials("quiet", 1, functools.partial(quiet, minutes), patient))
    rows[0] |= {"command": shlex.join(["python", "-m", "benchmarks.slurm_faults", *sys.argv[1:]]), "machine": machine()}
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)
    raise typer.Exit(int(not all(row["holds"] for row in rows if row["bar"])))


def signal_figures(trials: list[Row]) -> list[Row]:
    """How many runs with a signal were equal, and where the signal fell."""
    equal, count = sum(row["equal"] for row in trials), len(trials)
    first = figure("signal at a random moment: equal to the bit", equal, f"of {count}", f">= {count}", equal == count)
    saved = sum(row["status"] != 1 for row in trials)
    return [
        first | {"unequal": [row for row in trials if not row["equal"]], "trials": trials},
        figure("… of these saved before the end", saved, "runs"),
        figure("… of these ended before there was a handler", count - saved, "runs"),
    ]


def dead_figures(trials: list[Row]) -> list[Row]:
    """How soon a dead rank is seen, and the group is gone."""
    seen = [row["seen"] for row in trials if row["seen"] is not None]
    count = len(trials)
    told = len(seen) == count and all(row["said"] for row in trials)
    rows = [
        figure("dead rank: recorded by its warden and named", sum(row["said"] for row in trials), f"of {count}")
        | {"bar": f">= {count}", "holds": told, "trials": trials}
    ]
    for name, values, bar in (("seen", seen, 2.0), ("group stopped", [row["stopped"] for row in trials], 5.0)):
        value = percentile(values)
        rows.append(figure(f"dead rank: {name}, p95", value, "s", f"<= {bar:g}", value <= bar))
    return rows


def hung_figures(trials: list[Row]) -> list[Row]:
    """How often the right rank was named with its stack, and how soon."""
    right, count = sum(row["right"] and row["stack"] for row in trials), len(trials)
    value = percentile([row["seconds"] for row in trials if row["seconds"] is not None])
    name = f"hung rank (train.hang_after={HANG_AFTER:g})"
    return [
        figure(f"{name}: the right one named, with its stack", right, f"of {count}", f">= {count}", right == count)
        | {"trials": trials},
        figure(f"{name}: until it is named, p95", value, "s", f"<= {SHOWN_S:g}", value <= SHOWN_S),
    ]


def quiet_figures(trials: list[Row]) -> list[Row]:
    """How often a rank that goes on counted as hung."""
    (row,) = trials
    stops = f"{row['stops']} stops of up to {row['longest']:.1f} s"
    name = f"train.hang_after={PATIENT:g}: false alarms in {row['minutes']:.1f} minutes, {stops}"
    return [figure(name, row["alarms"], "alarms", "<= 0", row["alarms"] == 0) | {"trials": trials}]


def percentile(values: list[float]) -> float:
    """The 95th percentile; infinite where there is no value."""
    return float(np.percentile(values, 95)) if values else float("inf")


def table(rows: list[Row]) -> str:
    """The figures as Markdown, with command and machine."""
    lines = [f"`{rows[0]['command']}` on {rows[0]['machine']}, local executor, warm starts", ""]
    lines += ["| figure | | bar | |", "|---|---|---|---|"]
    for row in rows:
        verdict = {True: "holds", False: "DOES NOT HOLD", None: ""}[row["holds"]]
        lines.append(f"| {row['name']} | {row['value']:.4g} {row['unit']} | {row['bar'] or ''} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    as_command(main)

"""Whether each rival of `autodo_dist.experiment.rivals` does here what its authors report: better than plain training.

Uniform noise: 40 % of the train labels are drawn anew, classes balanced: ELR, SOP, Meta-Weight-Net and confident
learning. Imbalance: half of the classes keep a hundredth of their pictures, labels right: Meta-Weight-Net and
fine-tuning. Generated house numbers at 16 px, the small convnet without augmentation, which memorises wrong labels
within 24 epochs of AdamW; a seed draws distortion, start weights and order, alike for all. Plain training on train and
clean part together is told for information: it says how much of a gain is that of the clean pictures alone.

A rival's trend shows where the mean of the paired differences of the last epoch's test error is below 0 by more than
its standard error; where it does not, the rival is marked as not reproduced. Results are kept in ROOT/results.jsonl, a
line each: called again after a stop, this goes on with the next one.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.experiment import rivals
from autodo_dist.experiment.rivals import Outcome, loop
from autodo_dist.load_config import load_config
from autodo_dist.run_folder import git_commit
from benchmarks.runs import CONFIG, ONE_RANK, as_command, write_rows

PLAIN, ALL = "plain", "plain, clean part too"
CASES = {  # settings of each case, and the rivals whose authors report a gain there
    "uniform noise 40 %": (
        ("data.imbalance_ratio=1", "data.label_noise=0.4"),
        ("elr", "sop", "meta_weight_net", "confident_learning"),
    ),
    "imbalance 100": (("data.imbalance_ratio=100", "data.label_noise=0"), ("meta_weight_net", "fine_tune")),
}
SHARED = (
    *("learn.augment=none", "learn.weight=false", "learn.soft_label=false"),
    *("data.image_size=16", "data.crop=whole", "data.threads=1", "train.threads=1"),
    *("data.mean=[0.46,0.46,0.46]", "data.std=[0.23,0.23,0.23]"),
    *("train.epochs=24", "train.evaluate_every=8", "optim.name=adamw", "optim.lr=0.003"),
)
QUICK = ("train.epochs=3", "optim.warmup_epochs=1", "train.steps_per_pass=4", "train.evaluate_every=3")
BAR = "< 0 by more than its standard error"

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training of the table."""

    case: str
    method: str
    seed: int

    def config(self, words: Sequence[str]) -> Config:
        """Its settings; `words` are laid over those that all share."""
        distortion, _ = CASES[self.case]
        seeds = (f"data.split_seed={self.seed}", f"train.seed={self.seed}")
        whole = ("data.train_on=all",) if self.method == ALL else ()
        return load_config(CONFIG, [*ONE_RANK, *SHARED, *words, *distortion, *seeds, *whole])


def main(
    root: Annotated[Path, typer.Option(help="folder of the results")] = Path("runs/rivals"),
    data: Annotated[
        Path,
        typer.Option(
            help="packed data set; `autodo pack housenumbers data/small_housenumbers --balanced --train 2500 --test "
            "500` makes the default one"
        ),
    ] = Path("data/small_housenumbers"),
    seeds: Annotated[int, typer.Option(min=2, help="seeds 0 to this, less one")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="trainings at a time")] = os.cpu_count() or 1,
    quick: Annotated[bool, typer.Option("--quick", help="two seeds, three epochs of four steps")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="over all settings")] = None,
) -> None:
    """Train what is still to be trained, then print the table."""
    seeds, root = (2, root / "quick") if quick else (seeds, root)
    laid_over = [f"data.root={data}", *(QUICK if quick else ()), *(words or ())]
    root.mkdir(parents=True, exist_ok=True)
    rows = figures(seeds, train_all(cells(seeds), laid_over, root / "results.jsonl", jobs))
    print(table(rows, seeds))
    if json_file is not None:
        write_rows(json_file, rows)


def cells(seeds: int) -> Iterator[Cell]:
    """Every training, seed by seed."""
    for seed, (case, (_, names)) in itertools.product(range(seeds), CASES.items()):
        yield from (Cell(case, method, seed) for method in (PLAIN, ALL, *names))


def train_all(wanted: Iterator[Cell], words: Sequence[str], file: Path, jobs: int) -> dict[Cell, Outcome]:
    """What each cell comes to, `jobs` at a time; those in the file are only read. AutodoError for other settings."""
    done: dict[Cell, Outcome] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        found = json.loads(line)
        if found["words"] != list(words):
            raise AutodoError(f"{file}: made with other settings ({' '.join(found['words'])}); choose another --root")
        done[Cell(**found["cell"])] = Outcome(**found["outcome"])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, file.open("a") as out:
        futures = {pool.submit(train, cell, words): cell for cell in wanted if cell not in done}
        try:
            for future in as_completed(futures):
                cell, outcome = futures[future], future.result()
                done[cell] = outcome
                kept = {"cell": asdict(cell), "outcome": asdict(outcome), "words": words, "commit": git_commit()}
                out.write(json.dumps(kept) + "\n")
                out.flush()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def train(cell: Cell, words: Sequence[str]) -> Outcome:
    """Train one cell in this process."""
    config = cell.config(words)
    if cell.method in (PLAIN, ALL):
        with loop.site(config) as here:
            found = loop.run(here, loop.plain)
    else:
        found = rivals.run(config, cell.method, {})
    print(f"{cell}: test error {error(found):.2f} %, {found.seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def error(outcome: Outcome) -> float:
    """Test error of the last epoch, %."""
    return 100 * (1 - outcome.test_accuracy)


def figures(seeds: int, done: dict[Cell, Outcome]) -> list[Row]:
    """Mean and standard deviation over seeds of the test error, each rival's paired difference, and its cost."""
    rows: list[Row] = []
    for case, (_, names) in CASES.items():
        of = {method: [done[Cell(case, method, seed)] for seed in range(seeds)] for method in (PLAIN, ALL, *names)}
        for method, outcomes in of.items():
            rows.append(row(f"test error, {case}, {method}", list(map(error, outcomes))))
        for method in (ALL, *names):
            pairs = zip(of[method], of[PLAIN], strict=True)
            more = [error(ours) - error(theirs) for ours, theirs in pairs]
            spread = statistics.stdev(more) / seeds**0.5
            bar = {"bar": BAR, "holds": statistics.mean(more) + spread < 0} if method in names else {}
            rows.append(row(f"test error, {case}, {method} - plain", more) | {"standard_error": spread} | bar)
            cost = statistics.mean(found.flops for found in of[method]) / statistics.mean(
                found.flops for found in of[PLAIN]
            )
            rows.append({"name": f"operations, {case}, {method}", "value": cost, "unit": "of plain"} | NO_BAR)
    minutes = sum(found.seconds for found in done.values()) / 60
    return [*rows, {"name": "time of training", "value": minutes, "unit": "minutes"} | NO_BAR]


NO_BAR: Row = {"bar": None, "holds": None}


def row(name: str, values: Sequence[float]) -> Row:
    """One figure: the mean over seeds, its spread, and each seed's."""
    spread = {"std": statistics.stdev(values), "seeds": list(values)}
    return {"name": name, "value": statistics.mean(values), "unit": "%"} | NO_BAR | spread


def table(rows: Sequence[Row], seeds: int) -> str:
    """The figures as Markdown, a line a method."""
    found = {each["name"]: each for each in rows}
    lines = [
        f"| {seeds} seeds | test error of the last epoch | paired difference to plain | operations | trend |",
        "|---|---|---|---|---|",
    ]
    for case, (_, names) in CASES.items():
        for method in (PLAIN, ALL, *names):
            of = found[f"test error, {case}, {method}"]
            shown = f"| {case}: {method} | {of['value']:.2f} ± {of['std']:.2f} % |"
            if method == PLAIN:
                lines.append(f"{shown} | 1.00 | |")
                continue
            more = found[f"test error, {case}, {method} - plain"]
            trend = {True: "shows", False: "**not reproduced**", None: ""}[more["holds"]]
            lines.append(
                f"{shown} {more['value']:+.2f} ± {more['standard_error']:.2f} % "
                f"| {found[f'operations, {case}, {method}']['value']:.2f} | {trend} |"
            )
    return "\n".join([*lines, f"\n{found['time of training']['value']:.1f} minutes of training"])


if __name__ == "__main__":
    as_command(main)

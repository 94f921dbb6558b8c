"""Plain training against AutoDO on the same distorted digits: last epoch, several seeds, paired differences.

Both see the same train pictures and the same wrong labels; AutoDO also learns from the clean validation part. A seed
draws distortion, start weights and order, alike for both. Runs are kept in run folders: called again after a
stop, this goes on, and finished runs are only read.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from autodo_dist.experiment.table import insert
from autodo_dist.ledger import START
from benchmarks.runs import as_command, run_all, summary, write_rows

DISTORTIONS = ((10, 0.1), (1, 0.4))  # imbalance ratio, label noise
METHODS = {"plain": ("learn.augment=none", "learn.weight=false", "learn.soft_label=false"), "AutoDO": ()}
QUICK = ("train.epochs=2", "optim.warmup_epochs=1", "hyper.start_epoch=1", "hyper.terms=5")


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    imbalance: float
    noise: float
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"ir{self.imbalance:g}-noise{self.noise:g}-{self.method.lower()}-seed{self.seed}"

    def words(self, root: Path) -> list[str]:
        """Its settings, over configs/digits.yaml."""
        distortion = (f"data.imbalance_ratio={self.imbalance}", f"data.label_noise={self.noise}")
        seeds = (f"data.split_seed={self.seed}", f"train.seed={self.seed}")
        place = (f"run.root={root}", f"run.name={self.name}")
        return [*place, *distortion, *seeds, *METHODS[self.method]]


def main(
    root: Annotated[Path, typer.Option(help="folder of the run folders")] = Path("runs/results"),
    seeds: Annotated[int, typer.Option(min=2, help="seeds 0 to this, less one")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = os.cpu_count() or 1,
    quick: Annotated[bool, typer.Option("--quick", help="two seeds of two epochs: shows that it works")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    readme: Annotated[Path | None, typer.Option(help="put the table between the marks in this file")] = None,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="over configs/digits.yaml")
    ] = None,
) -> None:
    """Train every cell of the table, then print it."""
    seeds, root = (2, root / "quick") if quick else (seeds, root)
    cells = [Cell(*them, method, seed) for them in DISTORTIONS for seed in range(seeds) for method in METHODS]
    laid_over = [*(QUICK if quick else ()), *(words or ())]
    folders = run_all({cell: [*cell.words(root), *laid_over] for cell in cells}, jobs)
    rows = figures({cell: summary(folder) for cell, folder in folders.items()}, jobs)
    text = table(rows, seeds)
    print(text)
    if json_file is not None:
        write_rows(json_file, rows)
    if readme is not None:
        insert(readme, "results", text)


def figures(summaries: dict[Cell, dict[str, Any]], jobs: int) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of the last epoch's test error, and of its paired difference; minutes."""
    rows: list[dict[str, Any]] = []
    for imbalance, noise in DISTORTIONS:
        errors = {
            method: [
                100 * (1 - found["test_accuracy_final"])
                for cell, found in summaries.items()
                if (cell.imbalance, cell.noise, cell.method) == (imbalance, noise, method)
            ]
            for method in METHODS
        }
        pairs = [ours - theirs for ours, theirs in zip(errors["AutoDO"], errors["plain"], strict=True)]
        for what, values in (*errors.items(), ("AutoDO - plain", pairs)):
            spread = {"std": statistics.stdev(values), "seeds": values}
            name = f"test error, IR {imbalance:g}, noise {noise:g}, {what}"
            rows.append(
                {"name": name, "value": statistics.mean(values), "unit": "%", "bar": None, "holds": None} | spread
            )
    seconds = sum(map(working_seconds, summaries.values()))
    minutes = seconds / 60 / jobs
    rows.append({"name": "time", "value": minutes, "unit": "minutes", "bar": "<= 30", "holds": minutes <= 30})
    return rows


def working_seconds(summary: dict[str, Any]) -> float:
    """Seconds of a run without those of its starts."""
    spent: dict[str, float] = summary["seconds"]
    return sum(seconds for phase, seconds in spent.items() if phase not in START)


def table(rows: Sequence[dict[str, Any]], seeds: int) -> str:
    """The figures as Markdown."""
    lines = [
        f"| test error of the last epoch, {seeds} seeds | plain | AutoDO | paired difference |",
        "|---|---|---|---|",
    ]
    for (imbalance, noise), three in zip(
        DISTORTIONS, (rows[at : at + 3] for at in range(0, len(rows) - 1, 3)), strict=True
    ):
        shown = [f"{row['value']:.2f} ± {row['std']:.2f} %" for row in three]
        better = sum(value < 0 for value in three[2]["seeds"])
        lines.append(f"| IR {imbalance:g}, noise {noise:g} | {' | '.join(shown)} ({better} of {seeds} better) |")
    return "\n".join(lines)


if __name__ == "__main__":
    as_command(main)

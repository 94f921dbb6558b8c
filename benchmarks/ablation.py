"""What solver, way and groups are worth: test error, and how well small weights find the wrong labels.

The embedded digits at 16 px, distorted; a run of each kind and seed forks from the plain run of that seed where AutoDO
starts, so that all share what came before. Label errors: area under the ROC curve of the weight as a sign that the
given label is not the true one (0.5: none, 1: perfect). What the kinds cost is counted by benchmarks/hyper_step.py.
"""

from __future__ import annotations

import csv
import itertools
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from sklearn.metrics import roc_auc_score

from autodo_dist.data.manifest import read_manifest
from autodo_dist.run_folder import read_config
from benchmarks.runs import as_command, run_all, summary, test_error, write_rows

START = 5  # the epoch from which on rows are learnt
SMALL = ("data.image_size=16", "data.crop_padding=1", "train.epochs=20", f"hyper.start_epoch={START}")
QUICK = ("train.epochs=7",)
SOLVERS = {
    "identity": ("hyper.solver=identity",),
    "neumann T=5": ("hyper.solver=neumann", "hyper.terms=5", "hyper.power_iterations=5"),
    "neumann T=50": ("hyper.solver=neumann", "hyper.terms=50", "hyper.power_iterations=10"),
    "exact T=5": ("hyper.solver=neumann", "hyper.hessian=exact", "hyper.terms=5", "hyper.power_iterations=5"),
    "exact T=50": ("hyper.solver=neumann", "hyper.hessian=exact", "hyper.terms=50", "hyper.power_iterations=10"),
    "cg": ("hyper.solver=cg",),
    "fisher": ("hyper.solver=fisher",),
}
WAYS = ("separate", "shared")
GROUPS = {
    "W": ("learn.augment=none", "learn.weight=true", "learn.soft_label=false"),
    "W, S": ("learn.augment=none", "learn.weight=true", "learn.soft_label=true"),
    "A, W, S": ("learn.augment=per_sample", "learn.weight=true", "learn.soft_label=true"),
}
PLAIN = ("learn.augment=none", "learn.weight=false", "learn.soft_label=false")


@dataclass(frozen=True)
class Kind:
    """One row of the table."""

    solver: str
    way: str
    groups: str

    @property
    def name(self) -> str:
        """Part of its runs' names."""
        return f"{self.solver}-{self.way}-{self.groups}".lower().replace(" t=", "").replace(", ", "")

    @property
    def words(self) -> tuple[str, ...]:
        """Its settings."""
        return (*SOLVERS[self.solver], f"hyper.way={self.way}", *GROUPS[self.groups])


KINDS = [Kind(*it) for it in itertools.product(SOLVERS, WAYS, GROUPS)]


def main(
    root: Annotated[Path, typer.Option(help="folder of the run folders")] = Path("runs/ablation"),
    seeds: Annotated[int, typer.Option(min=2, help="seeds 0 to this, less one")] = 10,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = os.cpu_count() or 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="two seeds, two kinds, seven epochs: shows that it works")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="over all runs' settings")] = None,
) -> None:
    """Train every kind on every seed, then print the table."""
    seeds, root = (2, root / "quick") if quick else (seeds, root)
    kinds = [KINDS[0], KINDS[-1]] if quick else KINDS
    common = [*SMALL, *(QUICK if quick else ()), *(words or ())]

    def settings(name: str, seed: int, *own: str) -> list[str]:
        place = (f"run.root={root}", f"run.name={name}-{seed}", f"data.split_seed={seed}", f"train.seed={seed}")
        return [*common, *place, *own]

    keep = ("checkpoint.keep=999", "train.evaluate_every=999")
    plain = run_all({seed: settings("plain", seed, *keep, *PLAIN) for seed in range(seeds)}, jobs)
    forks = {
        (kind, seed): settings(kind.name, seed, *keep, *kind.words, f"run.fork={folder}@{START * steps(folder)}")
        for seed, folder in plain.items()
        for kind in kinds
    }
    learnt = run_all(forks, jobs)
    rows = figures(plain, learnt, kinds)
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)


def steps(folder: Path) -> int:
    """Steps of an epoch of a plain run."""
    found = summary(folder)
    return int(found["steps"] / found["epochs"])


def figures(
    plain: dict[int, Path], learnt: dict[tuple[Kind, int], Path], kinds: Sequence[Kind]
) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds; a kind's differences from plain are within seeds."""
    errors = [test_error(folder) for folder in plain.values()]
    rows = [row("plain: test error", errors, "%")]
    for kind in kinds:
        folders = [learnt[kind, seed] for seed in plain]
        own = [test_error(folder) for folder in folders]
        name = f"{kind.solver}, {kind.way}, {kind.groups}"
        rows += [
            row(f"{name}: test error", own, "%"),
            row(f"{name}: less than plain", [theirs - ours for ours, theirs in zip(own, errors, strict=True)], "%"),
            row(f"{name}: AUROC of label errors", [label_error_auroc(folder) for folder in folders], ""),
        ]
    return rows


def row(name: str, values: list[float], unit: str) -> dict[str, Any]:
    """One figure: the mean over seeds, its spread, and each seed's."""
    spread = {"std": statistics.stdev(values), "seeds": values}
    return {"name": name, "value": statistics.mean(values), "unit": unit, "bar": None, "holds": None} | spread


def label_error_auroc(folder: Path) -> float:
    """How well a small weight tells a train sample whose given label is not the true one."""
    manifest = read_manifest(read_config(folder).data.root)
    with (folder / "labels.csv").open(newline="") as file:
        samples = list(csv.DictReader(file))
    wrong = [sample["given_label"] != manifest.classes[manifest.label_N[int(sample["id"])]] for sample in samples]
    return float(roc_auc_score(wrong, [-float(sample["weight"]) for sample in samples]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| solver, way, groups | test error | less than plain | AUROC |", "|---|---|---|---|"]
    plain, rest = rows[0], rows[1:]
    lines.append(f"| plain | {plain['value']:.2f} ± {plain['std']:.2f} % | | |")
    for at in range(0, len(rest), 3):
        error, less, auroc = rest[at : at + 3]
        better = sum(value > 0 for value in less["seeds"])
        lines.append(
            f"| {error['name'].split(':')[0]} | {error['value']:.2f} ± {error['std']:.2f} % "
            f"| {less['value']:.2f} ± {less['std']:.2f} % ({better} of {len(less['seeds'])}) "
            f"| {auroc['value']:.3f} ± {auroc['std']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    as_command(main)

"""What it costs that clean pictures, trained on in rotating folds, later judge what was learnt with their help.

With `learn.clean_folds` no step is judged by pictures of its own epoch, but by such as the network saw in earlier ones:
a leak. Here it is beside what has none, on the same pictures and wrong labels:

    folded   one network, two folds: it trains on train part and half of the clean part, in turn, and the other half
             gives the validation gradient
    blind    two networks, each blind to the other's half: it trains on train part and its own half throughout, and the
             half that it never sees gives the validation gradient

Both see as many pictures in an epoch. Soft labels do not follow predictions (learn.ensembling=0), so that rows come
from validation gradients alone. What is compared: the AUROC of wrong labels by the weights; the share of learnt labels
that are right; the test error; of the two networks the mean. The clean pictures that a blind network trains on have
rows, which those of a fold have not.

Finished runs are kept below ROOT: called again after a stop, this goes on with the next one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from autodo_dist.data.manifest import read_manifest
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Recipe, Split, folds, make_split
from autodo_dist.data.split_file import encode, write_split
from autodo_dist.errors import AutodoError
from autodo_dist.label_errors import measures
from autodo_dist.learnt import open_source, read_columns
from benchmarks.runs import as_command, run_all, test_error, write_rows

OURS = (
    *("recipe=autodo", "learn.augment=shared", "data.image_size=16", "data.crop_padding=1", "train.channels_last=true"),
    *("data.imbalance_ratio=1", "data.label_noise=0", "data.threads=1", "checkpoint.keep=1", "learn.ensembling=0"),
)
EPOCHS = ("train.epochs={0}", "train.evaluate_every={0}")
# Settings of a data set, its epochs, and the imbalance of its cell; 20 % of the labels are redrawn.
SETS: dict[str, tuple[tuple[str, ...], int, float]] = {
    "digits": ((), 40, 50.0),
    "housenumbers": (
        (
            *("data.mean=[0.46,0.46,0.46]", "data.std=[0.23,0.23,0.23]", "optim.lr=0.1", "optim.warmup_epochs=1"),
            "train.batch_size=128",
        ),
        60,
        20.0,
    ),
}
NOISE = 0.2
KINDS = ("folded", "blind 0", "blind 1")
MEASURES = {"wrong labels by weight, AUROC": "", "learnt labels that are right": "", "test error": "%"}


def main(
    root: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs/fold_leak"),
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="packed data sets; data/digits by default. House numbers: `autodo pack housenumbers "
            "data/housenumbers5k --balanced --train 5000`"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="seeds 0 to this, less one")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="digits, two seeds, three epochs")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
) -> None:
    """Train what is still to be trained, then print the table."""
    root, seeds = (root / "quick", 2) if quick else (root, seeds)
    root.mkdir(parents=True, exist_ok=True)
    sets = {read_manifest(folder).name: folder for folder in data or [Path("data/digits")]}
    if unknown := sets.keys() - SETS.keys():
        raise AutodoError(f"--data: no settings for {', '.join(sorted(unknown))}; give of {', '.join(SETS)}")
    splits = {(name, seed): halved(sets[name], name, seed) for name in sets for seed in range(seeds)}
    wanted = {
        (name, seed, kind): words(root, sets[name], name, seed, kind, splits[name, seed][kind], quick)
        for name, seed in splits
        for kind in KINDS
    }
    folders = run_all(wanted, jobs)
    found = {key: figures(folder, splits[key[:2]]["folded"].train) for key, folder in folders.items()}
    rows = [
        row
        for name in sets
        for number, (measure, unit) in enumerate(MEASURES.items())
        for row in compared(
            f"{name}, IR {SETS[name][2]:g}, uniform {NOISE:.0%}: {measure}",
            unit,
            [[found[name, seed, kind][number] for kind in KINDS] for seed in range(seeds)],
        )
    ]
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)


def halved(folder: Path, name: str, seed: int) -> dict[str, Split]:
    """The parts of each kind of run: the clean part as a whole, or one half in the train part."""
    manifest = read_manifest(folder)
    recipe = Recipe(0.2, "step", SETS[name][2], "uniform", NOISE, None, seed)
    whole = make_split(manifest.label_N, manifest.part_N, len(manifest.classes), recipe)
    halves = folds(whole.validation, whole.label_N, len(manifest.classes), 2, seed)
    found = {"folded": whole}
    for number, (own, other) in enumerate((halves, halves[::-1])):
        found[f"blind {number}"] = replace(whole, train=np.union1d(whole.train, own), validation=np.sort(other))
    return found


def words(root: Path, data: Path, name: str, seed: int, kind: str, split: Split, quick: bool) -> list[str]:
    """The settings of a run, over configs/digits.yaml; its split is written beside it."""
    own, epochs, _ = SETS[name]
    run = f"{name}-{seed}-{kind.replace(' ', '')}"
    file = root / f"{run}.split"
    write_split(file, encode(split, read_manifest(data), {"half": kind, "seed": seed}))
    short = ("hyper.start_epoch=1",) if quick else ("hyper.start_epoch=5",)
    return [
        *(*OURS, *own, *short, *(word.format(3 if quick else epochs) for word in EPOCHS)),
        *(f"data.root={data}", f"data.split={file}", f"train.seed={seed}", f"run.root={root}", f"run.name={run}"),
        f"learn.clean_folds={2 if kind == 'folded' else 0}",
    ]


def figures(folder: Path, train: Ids) -> tuple[float, float, float]:
    """MEASURES of a run, of the samples that are in everyone's train part."""
    source = open_source(folder)
    columns = read_columns(source)
    assert columns.weight_N is not None
    assert columns.learnt_N is not None
    inside_N = np.isin(columns.id_N, train)
    true_n = source.manifest.label_N[columns.id_N[inside_N]]
    auroc = measures(-columns.weight_N[inside_N], columns.given_N[inside_N] != true_n)["auroc"]
    return auroc, float((columns.learnt_N[inside_N] == true_n).mean()), test_error(folder)


def compared(name: str, unit: str, values: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """A measure folded and blind, and the mean paired difference with its standard error; `values`: KINDS by seed."""
    folded = [each[0] for each in values]
    blind = [statistics.mean(each[1:]) for each in values]
    more = [one - other for one, other in zip(folded, blind, strict=True)]
    kinds = {"folded": folded, "blind": blind, "folded - blind": more}
    return [
        {
            "name": f"{name}, {kind}",
            "value": statistics.mean(numbers),
            "unit": unit,
            "bar": None,
            "holds": None,
            "standard_error": statistics.stdev(numbers) / len(numbers) ** 0.5,
            "seeds": numbers,
        }
        for kind, numbers in kinds.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown, a line a measure; ± is the standard error of the mean."""
    lines = ["| | folded | blind | folded - blind |", "|---|---|---|---|"]
    for start in range(0, len(rows), 3):
        shown = [f"{row['value']:.4f} ± {row['standard_error']:.4f}" for row in rows[start : start + 3]]
        lines.append(f"| {rows[start]['name'].removesuffix(', folded')} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    as_command(main)

"""How well wrong labels are found: AutoDO's score beside confident learning, on the same pictures and wrong labels.

Ours: one run of `recipe: autodo`, but for ensembling, the solver (cg) and the rate (0.02), which learns weights, soft
labels from the clean part and trains on it in folds, and `label_errors.scores` of it, without learnt augmentation and
with a validation batch in every step. The rival: cleanlab's label quality scores on out-of-sample probabilities, from K
runs of the same network with the same settings and as many epochs, without AutoDO, each predicting the fold that it did
not train on. AutoDO has the clean validation part, so the rival trains on it, too, in every fold ("clean"); the same
without it ("train alone") is told for information. Scores are compared by the AUROC of wrong labels, with cleanlab's
default method and with the one that is best in the cell, chosen by the truth.

Results are kept in ROOT/results.jsonl, a line each: called again after a stop, this goes on with the next one.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from sklearn.model_selection import StratifiedKFold

from autodo_dist import build, build_data
from autodo_dist.data.manifest import Manifest, read_manifest
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Noise, Recipe, Split, make_split
from autodo_dist.data.split_file import encode, write_split
from autodo_dist.label_errors import measures, scores
from autodo_dist.learnt import open_source, read_columns
from autodo_dist.parallel import comm
from autodo_dist.parallel.checkpoint_rows import find_checkpoint
from autodo_dist.run_folder import git_commit, read_config
from benchmarks.runs import as_command, run, write_rows

SMALL = ("data.image_size=16", "data.crop_padding=1", "data.imbalance_ratio=1", "data.label_noise=0")
ONE = ("data.threads=1", "train.threads=1")
SHORT = ("train.epochs=12", "train.evaluate_every=12", "optim.warmup_epochs=1", "checkpoint.keep=1")
OURS = (  # the recipe as it was when the table was made
    *("recipe=autodo", "learn.augment=none", "learn.ensembling=0", "hyper.lr=0.02", "hyper.solver=cg"),
    *("hyper.validation_every=1", "hyper.start_epoch=3"),
)
PLAIN = ("learn.augment=none", "learn.weight=false", "learn.soft_label=false")
SETS = {  # settings of a data set, by its name
    "digits": (),
    "housenumbers": (
        *("data.mean=[0.46,0.46,0.46]", "data.std=[0.23,0.23,0.23]"),
        *("train.epochs=20", "train.evaluate_every=20", "hyper.start_epoch=5"),
    ),
}
METHODS: dict[str, dict[str, Any]] = {  # of cleanlab; the first is its default
    "self_confidence": {},
    "normalized_margin": {"method": "normalized_margin"},
    "confidence_weighted_entropy": {"method": "confidence_weighted_entropy"},
    "self_confidence, adjusted": {"adjust_pred_probs": True},
    "normalized_margin, adjusted": {"method": "normalized_margin", "adjust_pred_probs": True},
}
DEFAULT = next(iter(METHODS))
NOISES: tuple[Noise, ...] = ("uniform", "asymmetric")
RATES = (0.1, 0.2, 0.4)
CLEAN, ALONE = "rival, clean", "rival, train alone"
QUICK = ("train.epochs=3", "train.evaluate_every=3", "hyper.start_epoch=1", "hyper.terms=5")

Row = dict[str, Any]
Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Cell:
    """A data set with its wrong labels; a seed draws these, the folds, the start weights and the order of pictures."""

    data: str
    imbalance: float
    noise: Noise
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Part of the names of its runs."""
        return f"{self.data}-ir{self.imbalance:g}-{self.noise}-{self.rate:g}-seed{self.seed}"

    def split(self, manifest: Manifest) -> Split:
        """Its parts and given labels."""
        recipe = Recipe(None, "step", self.imbalance, self.noise, self.rate, None, self.seed)
        return make_split(manifest.label_N, manifest.part_N, len(manifest.classes), recipe)


@dataclass(frozen=True)
class Place:
    """Where data sets and runs are, and the settings that all runs share."""

    root: Path
    sets: dict[str, Path]
    folds: int
    words: tuple[str, ...]

    def train(self, cell: Cell, name: str, split: Split, words: Sequence[str]) -> Path:
        """Train on this split; the run's folder."""
        manifest = read_manifest(self.sets[cell.data])
        file = self.root / f"{cell.name}-{name}.split"
        write_split(file, encode(split, manifest, asdict(cell)))
        own = (f"run.root={self.root}", f"run.name={cell.name}-{name}", f"train.seed={cell.seed}")
        data = (f"data.root={self.sets[cell.data]}", f"data.split={file}")
        return run([*SMALL, *ONE, *SHORT, *words, *SETS.get(cell.data, ()), *self.words, *own, *data])

    def forget(self, cell: Cell) -> None:
        """Delete its runs."""
        for path in self.root.glob(f"{cell.name}-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(
    root: Annotated[Path, typer.Option(help="folder of results and run folders")] = Path("runs/label_errors"),
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="packed data sets; data/digits by default. House numbers: `autodo pack housenumbers "
            "data/small_housenumbers --balanced --train 2500 --test 500`"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="seeds 0 to this, less one")] = 5,
    folds: Annotated[int, typer.Option(min=2, help="K of the rival's out-of-sample probabilities")] = 5,
    imbalance: Annotated[list[float] | None, typer.Option(help="imbalance ratios; 1 by default")] = None,
    alone: Annotated[bool, typer.Option(help="the rival without the clean part, too")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="one cell, two seeds, two folds, three epochs")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="over all runs' settings")] = None,
) -> None:
    """Train what is still to be trained, then print the table."""
    root = root / "quick" if quick else root
    root.mkdir(parents=True, exist_ok=True)
    sets = {read_manifest(folder).name: folder for folder in data or [Path("data/digits")]}
    place = Place(root, sets, 2 if quick else folds, (*(QUICK if quick else ()), *(words or ())))
    noises, rates = (NOISES[:1], (0.2,)) if quick else (NOISES, RATES)
    kinds = ["ours", CLEAN, *([ALONE] if alone and not quick else [])]
    cells = [
        Cell(*it) for it in itertools.product(sets, imbalance or [1.0], noises, rates, range(2 if quick else seeds))
    ]
    wanted = [(cell, kind) for kind in kinds for cell in cells]
    results = root / "results.jsonl"
    done = {(row["cell"]["name"], row["kind"]): row for row in read(results)}
    for cell, kind in wanted:
        if (cell.name, kind) not in done:
            done[cell.name, kind] = row = outcome(place, cell, kind)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            place.forget(cell)
    rows = figures(cells, kinds, done)
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)


def read(file: Path) -> list[Row]:
    """The results so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def outcome(place: Place, cell: Cell, kind: str) -> Row:
    """How well the wrong labels of a cell are found."""
    start, manifest = time.perf_counter(), read_manifest(place.sets[cell.data])
    split = cell.split(manifest)
    if kind == "ours":
        found = ours(place, cell, split, manifest)
    else:
        found = rival(place, cell, split, manifest, clean=kind == CLEAN)
    facts = {"seconds": time.perf_counter() - start, "commit": git_commit(), "words": place.words}
    return {"cell": asdict(cell) | {"name": cell.name}, "kind": kind, "found": found} | facts


def ours(place: Place, cell: Cell, split: Split, manifest: Manifest) -> dict[str, dict[str, float]]:
    """Measures of our score, and of each of its sources alone; and how many labels are right."""
    columns = read_columns(open_source(place.train(cell, "ours", split, OURS)))
    true_N = manifest.label_N[split.train]
    parts = {"prediction alone": columns.given_prediction_N, "soft label alone": columns.given_probability_N}
    parts |= {"weight alone": columns.weight_N}
    named = {"given": columns.given_N, "learnt": columns.learnt_N, "suggested": columns.suggested_N}
    signs = {"score": scores(columns)} | {name: -it for name, it in parts.items() if it is not None}
    found = {name: measures(score_N, columns.given_N != true_N) for name, score_N in signs.items()}
    return found | {"right": {name: float((it == true_N).mean()) for name, it in named.items() if it is not None}}


def rival(place: Place, cell: Cell, split: Split, manifest: Manifest, clean: bool) -> dict[str, dict[str, float]]:
    """Measures of every method of cleanlab, on out-of-sample probabilities of the train part."""
    from cleanlab.rank import get_label_quality_scores

    ids, given_N = split.train, split.label_N[split.train]
    share_NC = np.zeros((len(ids), len(manifest.classes)), np.float32)
    folds = StratifiedKFold(place.folds, shuffle=True, random_state=cell.seed).split(ids, given_N)
    for fold, (inside, outside) in enumerate(folds):
        own = np.sort(np.concatenate([ids[inside], split.validation])) if clean else ids[inside]
        label_N = split.label_N.copy()
        label_N[ids[outside]] = manifest.label_N[ids[outside]]  # as of all samples that are left out
        parts = replace(split, train=own, validation=split.validation[:0] if clean else split.validation)
        folder = place.train(cell, f"fold{fold}-{clean}", replace(parts, label_N=label_N), PLAIN)
        share_NC[outside] = probabilities(folder, ids[outside])
    wrong_N = given_N != manifest.label_N[ids]
    return {
        name: measures(-get_label_quality_scores(given_N, share_NC, **options), wrong_N)
        for name, options in METHODS.items()
    }


@torch.no_grad()
def probabilities(folder: Path, ids: Ids) -> Probabilities:
    """The softmax of a run's last model for these samples, as rows."""
    config = read_config(folder)
    manifest = build_data.read_data(config)
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        path = find_checkpoint(folder / "checkpoints", None)
        model = build.restore_classifier(config, path, len(manifest.classes), ranks).eval()
        split = build_data.build_split(config, manifest)
        loader = build_data.build_loaders(config, manifest, split, ranks).validation.over(ids, manifest.label_N)
        shares = [model(batch.images_BCHW)[1].softmax(1) for batch in loader.batches(0)]
    found: Probabilities = torch.cat(shares).numpy()
    return found


def figures(cells: Sequence[Cell], kinds: Sequence[str], done: dict[tuple[str, str], Row]) -> list[Row]:
    """Means and standard deviations over seeds, and paired differences of AUROC within seeds.

    A difference holds if its mean is at least 0 less its standard error.
    """
    rows: list[Row] = []
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(f"{cell.data}, IR {cell.imbalance:g}, {cell.noise} {cell.rate:.0%}", []).append(cell)
    for name, same in groups.items():
        own = [done[cell.name, "ours"]["found"] for cell in same]
        auroc = [it["score"]["auroc"] for it in own]
        easy = "IR 1, uniform 10%" in name
        rows.append(row(f"{name}: score, AUROC", auroc, ">= 0.95" if easy else None, statistics.mean(auroc) >= 0.95))
        rows += [
            row(f"{name}: {part}, {measure}", [it[part][measure] for it in own])
            for part in own[0]
            for measure in own[0][part]
            if (part, measure) != ("score", "auroc") and (part in ("score", "right") or measure == "auroc")
        ]
        for kind in kinds[1:]:
            rows += against(name, kind, auroc, [done[cell.name, kind]["found"] for cell in same])
    seconds = sum(done[cell.name, kind]["seconds"] for cell in cells for kind in kinds)
    return [*rows, {"name": "time", "value": seconds / 60, "unit": "minutes", "bar": None, "holds": None}]


def against(name: str, kind: str, auroc: Sequence[float], theirs: Sequence[dict[str, dict[str, float]]]) -> list[Row]:
    """The rival by its default method and by its best in this cell, each with how much better ours is."""
    means = {method: statistics.mean(it[method]["auroc"] for it in theirs) for method in METHODS}
    best = max(means, key=lambda method: means[method])
    rows = []
    for word, method in (("default", DEFAULT), ("best", best)):
        values = [it[method]["auroc"] for it in theirs]
        more = [own - other for own, other in zip(auroc, values, strict=True)]
        error = statistics.stdev(more) / len(more) ** 0.5
        bar = ">= 0 within its standard error" if kind == CLEAN else None
        rows.append(row(f"{name}: {kind}, {word}, AUROC", values) | {"method": method})
        difference = row(f"{name}: ours - {kind}, {word}", more, bar, statistics.mean(more) + error >= 0)
        rows.append(difference | {"standard_error": error})
    return rows


def row(name: str, values: Sequence[float], bar: str | None = None, holds: bool = False) -> Row:
    """One figure: the mean over seeds, its spread, and each seed's."""
    spread = {"std": statistics.stdev(values), "seeds": list(values)}
    about = {"unit": "", "bar": bar, "holds": holds if bar else None}
    return {"name": name, "value": statistics.mean(values)} | about | spread


def table(rows: Sequence[Row]) -> str:
    """The figures as Markdown, a line a cell."""
    found = {row["name"]: row for row in rows}
    cells = [name.removesuffix(": score, AUROC") for name in found if name.endswith(": score, AUROC")]
    lines = [
        "| cell | AUROC | rival, default | ours - rival | rival, best | ours - rival |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        shown = [mean_and_std(found[f"{cell}: score, AUROC"])]
        for word in ("default", "best"):
            shown.append(mean_and_std(found[f"{cell}: {CLEAN}, {word}, AUROC"]))
            more = found[f"{cell}: ours - {CLEAN}, {word}"]
            shown.append(f"{more['value']:+.4f} ± {more['standard_error']:.4f}{'' if more['holds'] else ' (worse)'}")
        lines.append(f"| {cell} | {' | '.join(shown)} |")
    return "\n".join([*lines, f"\n{found['time']['value']:.1f} minutes"])


def mean_and_std(row: Row) -> str:
    """A figure and its spread."""
    return f"{row['value']:.4f} ± {row['std']:.4f}"


if __name__ == "__main__":
    as_command(main)

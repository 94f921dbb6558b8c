"""`autodo split`: parts, class imbalance and wrong labels over a packed data set, as one small file."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from autodo_dist.data.label_file import read_labels, read_mapping
from autodo_dist.data.manifest import Manifest, read_manifest
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Imbalance, Noise, Recipe, Split, make_split
from autodo_dist.data.split_file import checksum, encode, write_split
from autodo_dist.errors import AutodoError
from autodo_dist.files import sha256

WIDTH = 100  # characters, where the output goes to a file
MOST_ROWS, MOST_COLUMNS = 20, 12  # classes that are shown one by one; above: quantiles, and the largest cells
EXTREMES, CELLS = 3, 10  # classes with the fewest and most train samples; cells of the noise matrix
QUANTILES = {"fewest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "most": 1.0}

Counts = npt.NDArray[np.int64]


def split(
    data: Annotated[str, typer.Argument(metavar="DATA", help="packed data set: a folder, or a URL as data.root")],
    out: Annotated[Path, typer.Argument(metavar="OUT_FILE", help="the split; a run takes it by data.split=OUT_FILE")],
    validation_fraction: Annotated[
        float | None,
        typer.Option(help="share of each class of packed train + validation for validation; by default as packed"),
    ] = None,
    imbalance: Annotated[
        Imbalance,
        typer.Option(help="step: the upper half of the classes keeps n / ratio; exponential: a tail down to n / ratio"),
    ] = "step",
    ratio: Annotated[float, typer.Option(help="IR: imbalance between the largest and the smallest class")] = 1.0,
    noise: Annotated[
        Noise,
        typer.Option(
            help="uniform: labels drawn from all classes; asymmetric: class c becomes the next, or --mapping's"
        ),
    ] = "uniform",
    noise_rate: Annotated[float, typer.Option(help="NR: share of the train labels that are drawn or changed")] = 0.0,
    mapping: Annotated[
        Path | None, typer.Option(help="asymmetric noise: CSV `from,to` of class names; others stay right")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV `key,label` or `id,label` with the given labels, in place of drawn noise")
    ] = None,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
) -> None:
    """Write who is in which part, which train samples are kept, and which label each is given; no tar is touched.

    Validation and test keep their true labels. The same options give the same bytes on every machine.
    """
    manifest = read_manifest(data)
    check_options(noise, noise_rate, mapping, labels)
    flips = read_mapping(mapping, manifest.classes) if mapping is not None else None
    recipe = Recipe(validation_fraction, imbalance, ratio, noise, noise_rate, flips, seed)
    made = make_split(manifest.label_N, manifest.part_N, len(manifest.classes), recipe)
    check_classes(made, manifest)
    if labels is not None:
        made = replace(made, label_N=read_labels(labels, manifest, made.train))
    content = encode(made, manifest, asdict(recipe) | {"labels_sha256": None if labels is None else sha256(labels)})
    new = write_split(out, content)
    show(made, manifest, Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False))
    said = "" if new else ", was there already with the same bytes"
    typer.echo(f"{out}: {len(manifest)} samples, {len(content):,} bytes, checksum {checksum(out)[:12]}{said}")


def check_options(noise: Noise, rate: float, mapping: Path | None, labels: Path | None) -> None:
    """Refuse options that contradict each other, or of which one would do nothing."""
    if labels is not None and (rate > 0 or noise != "uniform" or mapping is not None):
        raise AutodoError(
            f"--labels {labels}: takes the place of drawn noise; leave out --noise, --noise-rate, --mapping"
        )
    if mapping is not None and noise != "asymmetric":
        raise AutodoError(f"--mapping {mapping}: says what asymmetric noise does; add --noise asymmetric")
    if noise == "asymmetric" and rate == 0:
        raise AutodoError("--noise asymmetric: changes no label at a rate of 0; add --noise-rate, e.g. 0.2")


def check_classes(made: Split, manifest: Manifest) -> None:
    """Refuse a split that leaves a class without a train sample."""
    missing = np.flatnonzero(histogram(made.train, manifest.label_N, manifest) == 0)
    if len(missing):
        names = ", ".join(manifest.classes[label] for label in missing[:5])
        raise AutodoError(f"--validation-fraction: leaves class {names} without a train sample; lower it")


def show(made: Split, manifest: Manifest, console: Console) -> None:
    """Print how many samples each class has in each part, and which labels are wrong."""
    counts = histograms(made, manifest)
    console.print(class_table(counts, manifest.classes))
    if len(manifest.classes) > MOST_ROWS:
        console.print(extremes(counts["train"], manifest.classes), soft_wrap=True)
    true, given = manifest.label_N[made.train], made.label_N[made.train]
    wrong = np.count_nonzero(true != given)
    console.print(
        f"noise: {wrong} of {len(true)} train labels are not the true ones ({100 * wrong / len(true):.2f} %)",
        soft_wrap=True,
    )
    if wrong:
        console.print(noise_table(true, given, manifest.classes))


def histogram(ids: Ids, label_N: npt.NDArray[np.int32], manifest: Manifest) -> Counts:
    """How many of the ids each class has."""
    return np.bincount(label_N[ids], minlength=len(manifest.classes))


def histograms(made: Split, manifest: Manifest) -> dict[str, Counts]:
    """Samples of each class by part; train before it was thinned out, after it, and by given label."""
    true_N = manifest.label_N
    before_N = np.ones(len(manifest), bool)
    before_N[made.validation] = before_N[made.test] = False
    return {
        "train before": histogram(np.flatnonzero(before_N), true_N, manifest),
        "train": histogram(made.train, true_N, manifest),
        "train, given": histogram(made.train, made.label_N, manifest),
        "validation": histogram(made.validation, true_N, manifest),
        "test": histogram(made.test, true_N, manifest),
    }


def class_table(counts: dict[str, Counts], classes: tuple[str, ...]) -> Table:
    """A row a class, or of many classes the quantiles of each column; then the sums."""
    few = len(classes) <= MOST_ROWS
    title = "samples of each class" if few else f"samples of a class, over {len(classes)} classes"
    table = Table("class" if few else "quantile", title=title, box=box.SIMPLE)
    for name in counts:
        table.add_column(name, justify="right")
    if few:
        for label, name in enumerate(classes):
            table.add_row(name, *(str(column[label]) for column in counts.values()))
    else:
        for name, share in QUANTILES.items():
            table.add_row(name, *(str(np.quantile(column, share, method="nearest")) for column in counts.values()))
    table.add_section()
    table.add_row("all", *(str(column.sum()) for column in counts.values()))
    return table


def extremes(counts: Counts, classes: tuple[str, ...]) -> str:
    """The classes with the most and the fewest train samples."""
    order = np.argsort(-counts, kind="stable")
    most, fewest = (
        ", ".join(f"{classes[label]} {counts[label]}" for label in some)
        for some in (order[:EXTREMES], order[::-1][:EXTREMES])
    )
    return f"train: most {most}; fewest {fewest}"


def noise_table(true: npt.NDArray[np.int32], given: npt.NDArray[np.int32], classes: tuple[str, ...]) -> Table:
    """The noise matrix, true class by given label; of many classes its largest cells off the diagonal."""
    cells, counts = np.unique(true.astype(np.int64) * len(classes) + given, return_counts=True)
    pairs = np.stack(np.divmod(cells, len(classes)))
    if len(classes) <= MOST_COLUMNS:
        matrix = np.zeros((len(classes), len(classes)), np.int64)
        matrix[tuple(pairs)] = counts
        numbers = [str(label) for label in range(len(classes))]  # class names would not fit as headings
        table = Table("", "true \\ given", *numbers, title="noise matrix, labels", box=box.SIMPLE)
        for number, name, row in zip(numbers, classes, matrix.tolist(), strict=True):
            table.add_row(number, name, *map(str, row))
        return table
    of_class = np.bincount(true, minlength=len(classes))
    wrong = np.flatnonzero(pairs[0] != pairs[1])
    table = Table(
        "true", "given", "labels", "% of the class", title="largest cells of the noise matrix", box=box.SIMPLE
    )
    for cell in wrong[np.argsort(-counts[wrong], kind="stable")][:CELLS].tolist():
        (source, target), count = pairs[:, cell].tolist(), int(counts[cell])
        table.add_row(classes[source], classes[target], str(count), f"{100 * count / of_class[source]:.2f}")
    return table

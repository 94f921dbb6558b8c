"""`autodo pack`: pictures -> a packed data set, and the check that one is still as it was packed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from autodo_dist.data import pack as packing
from autodo_dist.data.manifest import PARTS, Manifest, read_manifest, verify_bytes
from autodo_dist.errors import AutodoError

app = typer.Typer(help="Pack pictures into shards that training streams, or check packed ones.")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="folder of the packed data set; new or empty")]
Src = Annotated[Path, typer.Argument(metavar="SRC", help="folder that holds train/<class>/, maybe val/ and test/")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the drawn parts and of the shuffle")]
ValidationFraction = Annotated[
    float,
    typer.Option(min=0, max=1, help="share of each class, less test, for validation (folder: if val is missing)"),
]
TestFraction = Annotated[
    float, typer.Option(min=0, max=1, help="share of each class for test (folder: if test is missing)")
]
ShardSamples = Annotated[int, typer.Option(min=1, help="most pictures in a shard")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="leave out pictures that do not decode, instead of stopping")
]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="ROOT", help="read every byte of a packed data set and compare it with its manifest"),
    ] = None,
) -> None:
    """Pack pictures into shards that training streams, or check packed ones."""
    if verify is not None:
        if context.invoked_subcommand:
            raise AutodoError(f"pack: --verify and {context.invoked_subcommand} at once; run one after the other")
        manifest = read_manifest(verify)
        verify_bytes(manifest)
        typer.echo(f"{verify}: {len(manifest)} samples in {len(manifest.shards)} shards, every byte as packed")
    elif not context.invoked_subcommand:
        typer.echo(context.get_help())


@app.command()
def digits(
    out: Out,
    seed: Seed = 0,
    validation_fraction: ValidationFraction = 0.2,
    test_fraction: TestFraction = 0.2,
    shard_samples: ShardSamples = packing.DIGITS_SHARD_SAMPLES,
) -> None:
    """Pack scikit-learn's 1,797 handwritten digits, enlarged to 32 × 32 pixels: needs no download."""
    classes, sources = packing.digits_sources(seed, validation_fraction, test_fraction)
    origin = {
        "command": "digits",
        "seed": seed,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "shard_samples": shard_samples,
    }
    _pack(out, "digits", classes, sources, origin, skip_unreadable=False)


@app.command()
def folder(
    src: Src,
    out: Out,
    seed: Seed = 0,
    validation_fraction: ValidationFraction = 0.2,
    test_fraction: TestFraction = 0.2,
    shard_samples: ShardSamples = packing.SHARD_SAMPLES,
    skip_unreadable: SkipUnreadable = False,
) -> None:
    """Pack SRC/train/<class>/*, with SRC/val/<class>/* as clean validation and SRC/test/<class>/* if they are there."""
    classes, sources = packing.folder_sources(src, seed, validation_fraction, test_fraction)
    origin = {
        "command": "folder",
        "seed": seed,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "shard_samples": shard_samples,
    }
    _pack(out, src.resolve().name, classes, sources, origin, skip_unreadable=skip_unreadable)


def _pack(
    out: Path,
    name: str,
    classes: list[str],
    sources: list[packing.Source],
    origin: dict[str, Any],
    *,
    skip_unreadable: bool,
) -> None:
    """Pack under a progress bar, then print what was packed."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        left_out = packing.pack(
            out,
            name,
            classes,
            sources,
            seed=origin["seed"],
            shard_samples=origin["shard_samples"],
            skip_unreadable=skip_unreadable,
            origin=origin,
            report=report,
        )
    _print_summary(read_manifest(out))
    if left_out:
        typer.echo(f"  left out: {len(left_out)} unreadable, listed in {out / 'unreadable.txt'}")


def _print_summary(manifest: Manifest) -> None:
    size = sum(shard.size for shard in manifest.shards)
    typer.echo(
        f"{manifest.root}: {manifest.name}, {len(manifest.classes)} classes, {len(manifest)} samples, "
        f"{len(manifest.shards)} shards, {size:,} bytes"
    )
    for part, count in zip(PARTS, np.bincount(manifest.part_N, minlength=len(PARTS)), strict=True):
        shards = [shard for shard in manifest.shards if shard.name.startswith(part)]
        typer.echo(
            f"  {part:10} {count:9} samples {len(shards):5} shards {sum(shard.size for shard in shards):15,} bytes"
        )

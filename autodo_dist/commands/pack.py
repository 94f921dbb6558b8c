"""`autodo pack`: pictures -> a packed data set, and the check that one is still as it was packed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from autodo_dist.commands.pack_progress import progress
from autodo_dist.data import digits as digits_set
from autodo_dist.data import housenumbers as housenumbers_set
from autodo_dist.data import imagenet as imagenet_set
from autodo_dist.data import pack as packing
from autodo_dist.data.encode import Shrink
from autodo_dist.data.folder import folder_sources, require_outside
from autodo_dist.data.manifest import PARTS, Manifest, read_manifest, verify_bytes
from autodo_dist.data.sources import Source
from autodo_dist.data.torchvision_sets import NAMES, torchvision_sources
from autodo_dist.data.unfinished import require_usable
from autodo_dist.errors import AutodoError

app = typer.Typer(
    help="Pack pictures into shards that training streams, or check packed ones. A pack that was stopped goes on when "
    "the same command is given again."
)

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
Workers = Annotated[
    int | None, typer.Option(min=1, help="processes that read and write; as many as cores if it is not given")
]
MaxSide = Annotated[
    int | None,
    typer.Option(min=1, help="shrink larger pictures to so many pixels on the longer side, as JPEG; others keep bytes"),
]
Quality = Annotated[int | None, typer.Option(min=1, max=95, help="JPEG quality of shrunk pictures; 90 if not given")]


TorchvisionName = Annotated[str, typer.Argument(metavar="NAME", help=", ".join(NAMES))]

Contents = tuple[list[str], list[Source], dict[str, Any]]  # class names, pictures, what else the manifest shall say


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    verify: Annotated[
        str | None,
        typer.Option(metavar="ROOT", help="read every byte of a packed data set and compare it with its manifest"),
    ] = None,
) -> None:
    """Pack pictures into shards that training streams, or check packed ones.

    A pack that was stopped goes on when the same command is given again.
    """
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
    shard_samples: ShardSamples = digits_set.SHARD_SAMPLES,
) -> None:
    """Pack scikit-learn's 1,797 handwritten digits, enlarged to 32 × 32 pixels: needs no download."""
    origin = {
        "command": "digits",
        "seed": seed,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "shard_samples": shard_samples,
    }
    _pack(
        out, "digits", origin, lambda report: (*digits_set.digits_sources(seed, validation_fraction, test_fraction), {})
    )


@app.command()
def housenumbers(
    out: Out,
    train: Annotated[int, typer.Option(help="pictures of train and validation")] = housenumbers_set.TRAIN_PICTURES,
    test: Annotated[int, typer.Option(help="pictures of test")] = housenumbers_set.TEST_PICTURES,
    balanced: Annotated[bool, typer.Option("--balanced", help="equally many of each digit, not as in SVHN")] = False,
    seed: Seed = 0,
    validation_fraction: ValidationFraction = 0.2,
    shard_samples: ShardSamples = packing.SHARD_SAMPLES,
    workers: Workers = None,
) -> None:
    """Pack generated house numbers, 32 × 32 pixels in colour: a stand-in for SVHN that needs no download."""
    origin = {
        "command": "housenumbers",
        "seed": seed,
        "train": train,
        "test": test,
        "balanced": balanced,
        "validation_fraction": validation_fraction,
        "shard_samples": shard_samples,
    }

    def find(report: packing.Report) -> Contents:
        return *housenumbers_set.housenumbers_sources(seed, train, test, validation_fraction, balanced=balanced), {}

    _pack(out, "housenumbers", origin, find, workers=workers)


@app.command()
def folder(
    src: Src,
    out: Out,
    seed: Seed = 0,
    validation_fraction: ValidationFraction = 0.2,
    test_fraction: TestFraction = 0.2,
    shard_samples: ShardSamples = packing.SHARD_SAMPLES,
    max_side: MaxSide = None,
    quality: Quality = None,
    skip_unreadable: SkipUnreadable = False,
    workers: Workers = None,
) -> None:
    """Pack SRC/train/<class>/*, with SRC/val/<class>/* as clean validation and SRC/test/<class>/* if they are there."""
    require_outside(out, src)
    shrink = _shrink(max_side, quality)
    origin = {
        "command": "folder",
        "seed": seed,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "shard_samples": shard_samples,
    } | (asdict(shrink) if shrink else {})
    _pack(
        out,
        src.resolve().name,
        origin,
        lambda report: (*folder_sources(src, seed, validation_fraction, test_fraction), {}),
        inputs=[src],
        shrink=shrink,
        skip_unreadable=skip_unreadable,
        workers=workers,
    )


@app.command()
def imagenet(
    train_tar: Annotated[Path, typer.Argument(metavar="TRAIN_TAR", help="ILSVRC2012_img_train.tar")],
    val_tar: Annotated[Path, typer.Argument(metavar="VAL_TAR", help="ILSVRC2012_img_val.tar")],
    devkit: Annotated[Path, typer.Argument(metavar="DEVKIT", help="ILSVRC2012_devkit_t12.tar.gz")],
    out: Out,
    seed: Seed = 0,
    validation_fraction: ValidationFraction = imagenet_set.VALIDATION_FRACTION,
    shard_samples: ShardSamples = packing.SHARD_SAMPLES,
    max_side: MaxSide = None,
    quality: Quality = None,
    skip_unreadable: SkipUnreadable = False,
    workers: Workers = None,
) -> None:
    """Pack ImageNet's official archives (ILSVRC2012), without unpacking them.

    The official validation set becomes the test part; a clean validation part is drawn from train.
    """
    shrink = _shrink(max_side, quality)
    origin = {
        "command": "imagenet",
        "seed": seed,
        "validation_fraction": validation_fraction,
        "shard_samples": shard_samples,
    } | (asdict(shrink) if shrink else {})

    def find(report: packing.Report) -> Contents:
        found = imagenet_set.imagenet_sources(train_tar, val_tar, devkit, seed, validation_fraction, report)
        return found.classes, found.sources, {"words": found.words}

    _pack(
        out,
        "imagenet",
        origin,
        find,
        inputs=[train_tar, val_tar, devkit],
        shrink=shrink,
        skip_unreadable=skip_unreadable,
        workers=workers,
    )


@app.command()
def torchvision(
    name: TorchvisionName,
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="the folder that torchvision knows as root")],
    out: Out,
    seed: Seed = 0,
    validation_fraction: ValidationFraction = 0.2,
    shard_samples: ShardSamples = packing.SHARD_SAMPLES,
    extra: Annotated[bool, typer.Option("--extra", help="svhn: add the split extra to train")] = False,
    download: Annotated[bool, typer.Option("--download", help="let torchvision download what is missing")] = False,
    workers: Workers = None,
) -> None:
    """Pack a data set as torchvision reads it, as PNG; its test split becomes the test part."""
    origin = {
        "command": "torchvision",
        "dataset": name,
        "seed": seed,
        "validation_fraction": validation_fraction,
        "extra": extra,
        "shard_samples": shard_samples,
    }

    def find(report: packing.Report) -> Contents:
        return *torchvision_sources(name, root, seed, validation_fraction, extra=extra, download=download), {}

    _pack(out, name, origin, find, inputs=[root], workers=workers)


def _pack(
    out: Path,
    name: str,
    origin: dict[str, Any],
    find: Callable[[packing.Report], Contents],
    *,
    inputs: Sequence[Path] = (),
    shrink: Shrink | None = None,
    skip_unreadable: bool = False,
    workers: int | None = None,
) -> None:
    """Find the pictures and pack them under a progress bar, then print what was packed."""
    require_usable(out, packing.command(origin, inputs))  # said at once, not after a scan of minutes
    with progress() as report:
        classes, sources, about = find(report)
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
            inputs=inputs,
            about=about,
            shrink=shrink,
            workers=workers or len(os.sched_getaffinity(0)),
        )
    _print_summary(read_manifest(out))
    if left_out:
        typer.echo(f"  left out: {len(left_out)} unreadable, listed in {out / 'unreadable.txt'}")


def _shrink(max_side: int | None, quality: int | None) -> Shrink | None:
    if max_side is None and quality is not None:
        raise AutodoError("pack: --quality changes nothing without --max-side; give both or neither")
    return None if max_side is None else Shrink(max_side, 90 if quality is None else quality)


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

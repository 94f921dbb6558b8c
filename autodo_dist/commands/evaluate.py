"""`autodo evaluate`: the test accuracy of a run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autodo_dist.errors import AutodoError


def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder, e.g. runs/digits")],
    step: Annotated[int | None, typer.Option(help="the checkpoint of this step; by default the newest")] = None,
    data: Annotated[str | None, typer.Option(help="the packed data set, where it lies elsewhere by now")] = None,
) -> None:
    """Evaluate a checkpoint on the test part, every picture once."""
    found = evaluate_checkpoint(run, step, data)
    if found["accuracy"] is None:
        raise AutodoError(f"run {run}: its data set has no test part; pack one with test pictures")
    left_out = f", {found['dropped']} left out that do not decode" if found["dropped"] else ""
    typer.echo(
        f"step {found['step']}: test accuracy {found['accuracy']:.6f}, test loss {found['loss']:.6f} nats, "
        f"{found['pictures']} pictures{left_out}"
    )
    for name, accuracy in found["accuracy_per_class"].items():
        typer.echo(f"  {name}: " + ("no pictures" if accuracy is None else f"{accuracy:.4f}"))


def evaluate_checkpoint(run: Path, step: int | None, data: Path | str | None) -> dict[str, Any]:
    """What `evaluate.evaluate` finds on the test part with the weights of a checkpoint, and its step."""
    from autodo_dist import build, build_data, run_folder
    from autodo_dist.data.manifest import check_files
    from autodo_dist.evaluate import evaluate
    from autodo_dist.parallel import checkpoint, comm

    config = run_folder.read_config(run)
    manifest = build_data.read_data_of(run, config, data)
    check_files(manifest)
    with comm.process_group(comm.Place(), build.choose_device(config.train.device, 0)) as ranks:
        root = run / "checkpoints"
        path = checkpoint.newest(root, ranks) if step is None else checkpoint.existing(root, step)
        if path is None:
            raise AutodoError(f"run {run}: has no checkpoint yet")
        model = build.restore_classifier(config, path, len(manifest.classes), ranks)
        loaders = build_data.build_loaders(config, manifest, build_data.build_split(config, manifest), ranks)
        found = evaluate(model, loaders.test, manifest.classes, build.DTYPES[config.train.precision], ranks)
        loaders.dropped.check(len(loaders.dropped.why))
        return {"step": checkpoint.step_of(path), "dropped": len(loaders.dropped.why)} | found

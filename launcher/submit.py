"""The one command that starts a run: settings and launch options -> ranks on this machine, or a Slurm job."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from autodo_dist import engine_settings
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.files import write_text
from autodo_dist.load_config import load_config
from autodo_dist.run_lock import refuse_if_held
from launcher import local, slurm
from launcher.job import Job

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="yaml file with what differs from the defaults", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over the file's, e.g. train.epochs=3")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="machines; sets launch.nodes")] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="processes per machine, one per GPU; sets launch.ranks_per_node")
    ] = None,
    executor: Annotated[str | None, typer.Option(help="local or slurm; sets launch.executor")] = None,
    fork: Annotated[
        str | None, typer.Option(metavar="RUN@STEP", help="start from that checkpoint of another run; sets run.fork")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be started, and start nothing")] = False,
) -> None:
    """Start a training run, or go on with it from its last checkpoint."""
    options = {
        "launch.nodes": nodes,
        "launch.ranks_per_node": ranks_per_node,
        "launch.executor": executor,
        "run.fork": fork,
    }
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    try:
        status = start(load_config(config, [*(overrides or []), *words]), dry_run)
    except AutodoError as error:
        typer.echo(f"error: {error}", err=True)
        status = 1
    raise typer.Exit(status)


def start(config: Config, dry_run: bool) -> int:
    """Start the ranks, or print them; the exit status. AutodoError if the settings cannot be started."""
    launch, file = config.launch, config.folder / "launch.yaml"
    ranks = launch.nodes * launch.ranks_per_node
    if config.train.batch_size < ranks:
        raise AutodoError(
            f"train.batch_size = {config.train.batch_size}: smaller than the {ranks} ranks, some would get no picture; "
            "raise it or start fewer ranks"
        )
    engine_settings.check(config, ranks)
    shape = f"{ranks} ranks ({launch.nodes} x {launch.ranks_per_node} per node), executor {launch.executor}"
    if launch.executor == "slurm":
        sbatch = slurm.parameters(config.run.name, launch.nodes, launch.ranks_per_node, launch.slurm)
        if not dry_run:
            slurm.submit(Job(config.model_dump(mode="json")), config.folder, sbatch)
            return 0
        what = yaml.safe_dump(sbatch, sort_keys=False)
    else:
        command = [sys.executable, "-u", "-m", "launcher.job", str(file)]
        if not dry_run:
            refuse_if_held(config.folder)
            _write(config, file)
            print(f"{shape}; run folder {config.folder}, other ranks' output in {config.folder / 'logs'}", flush=True)
            return local.launch(command, config.folder, launch.nodes, launch.ranks_per_node)
        what = shlex.join(command)
    print(f"{config.to_yaml()}\n# not started: {shape}; run folder {config.folder}")
    print("\n".join(f"#   {line}" for line in what.splitlines()))
    return 0


def _write(config: Config, file: Path) -> None:
    """Write every setting where the ranks read it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, config.to_yaml())
    except OSError as error:
        raise AutodoError(f"run folder {file.parent}: cannot be written ({error.strerror}); set run.root") from error


if __name__ == "__main__":
    app()

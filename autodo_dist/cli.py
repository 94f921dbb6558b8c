"""The console command `autodo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic_core import PydanticUndefined

from autodo_dist.commands import checkpoint, pack
from autodo_dist.commands.doctor import doctor
from autodo_dist.commands.evaluate import evaluate
from autodo_dist.commands.experiment import experiment
from autodo_dist.commands.explain import explain
from autodo_dist.commands.goodput import goodput
from autodo_dist.commands.labels import labels
from autodo_dist.commands.plan import plan
from autodo_dist.commands.prove import prove_resume
from autodo_dist.commands.report import report
from autodo_dist.commands.rows import rows
from autodo_dist.commands.split import split
from autodo_dist.commands.watch import watch
from autodo_dist.config import settings as all_settings
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import load_config
from autodo_dist.thread_name import show

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="AutoDO for large, biased and mislabelled image data: pack, split, plan, train, evaluate.",
)
app.add_typer(pack.app, name="pack")
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(evaluate)
app.command()(plan)
app.command()(doctor)
app.command()(prove_resume)
app.command()(rows)
app.command()(report)
app.command()(labels)
app.command()(explain)
app.command()(experiment)
app.command()(split)
app.command()(goodput)
app.command()(watch)


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="yaml file with the settings that differ from the defaults")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="laid over the file")] = None,
    fork: Annotated[
        str | None, typer.Option(metavar="RUN@STEP", help="start from that checkpoint of another run; sets run.fork")
    ] = None,
) -> None:
    """Train as one rank: alone, or as the one that srun's environment names. `launcher/submit.py` starts many.

    `autodo settings` lists every setting with its unit and default.
    """
    show("start")
    from autodo_dist.train import train  # imports torch, which the other commands can do without

    train(load_config(config, [*(overrides or []), *([f"run.fork={fork}"] if fork else [])]))


@app.command()
def settings() -> None:
    """List every setting of a run with its default, unit and meaning."""
    for name, setting in all_settings().items():
        default = "(must be set)" if setting.default is PydanticUndefined else f"= {setting.default}"
        typer.echo(f"{name} {default}\n    {setting.description}")


def main() -> None:
    """Run the command; an AutodoError becomes one line on stderr and exit status 1."""
    try:
        app()
    except AutodoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

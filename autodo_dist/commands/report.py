"""`autodo report`: what runs have learnt, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, e.g. runs/digits")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    step: Annotated[
        int | None, typer.Option(help="what the checkpoint of this step holds; by default the newest")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="a packed data set, where it lies elsewhere by now; once for each")
    ] = None,
    suspects: Annotated[int, typer.Option(min=0, help="suspected labels that are shown of each run")] = 300,
) -> None:
    """Write one page that opens without a network: curves, errors and weights by class, suspected labels, settings."""
    from autodo_dist.report.page import write_report  # imports torch and matplotlib

    missing = write_report(runs, out, step, data or [], suspects)
    for what in missing:
        typer.echo(f"not on the page: {what}", err=True)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")

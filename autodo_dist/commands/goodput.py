"""`autodo goodput`: what became of the time of a run, over all its starts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from autodo_dist import ledger
from autodo_dist.errors import AutodoError

WHAT = {
    "useful": "task and hyper steps, evaluations",
    "data": "waiting for data",
    "save": "saves that training waited for",
    "start": "imports, rendezvous, build, restore",
    "lost": "steps that were done again",
    "between": "from an end to the next start: queue",
    "other": "not counted: records, ends, work since the last save",
}


def goodput(
    run: Annotated[Path, typer.Argument(help="run folder")],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Show what became of a run's time: useful steps, waits, saves, restarts, steps lost; and why each start ended."""
    events = ledger.read(run)
    if not events:
        raise AutodoError(f"run {run}: no {ledger.NAME} there; name the folder of a run that was started")
    found = ledger.goodput(events, time.time())
    typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(table(found)))


def table(found: dict[str, Any]) -> list[str]:
    """It in lines."""
    total = max(found["total"], 1e-9)
    lines = [f"{name:8} {value:10.1f} s {value / total:7.1%}  {WHAT[name]}" for name, value in found["seconds"].items()]
    lines += [f"{'total':8} {found['total']:10.1f} s  {found['steps']} steps, {found['lost_steps']} done again", ""]
    for row in found["attempts"]:
        begun, seconds = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["begun"])), row["ended"] - row["begun"]
        why = f": {row['why']}" if row["why"] else ""
        lines.append(f"{begun}  {seconds:8.1f} s  {row['ranks']} ranks from step {row['step']}, {row['cause']}{why}")
    return lines

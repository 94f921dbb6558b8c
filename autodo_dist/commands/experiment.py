"""`autodo experiment`: methods x data settings x seeds, and one table of paired differences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from autodo_dist.errors import AutodoError
from autodo_dist.experiment import table as tables
from autodo_dist.experiment.plan import read_experiment
from autodo_dist.experiment.runner import Request, newest, run, sigterm_as_ctrl_c
from autodo_dist.files import write_text


@dataclass(frozen=True)
class Out:
    """Where tables go beside the terminal."""

    markdown: Path | None
    json_file: Path | None


def experiment(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="e.g. configs/experiments/*.yaml")],
    words: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a setting over all runs'; repeatable")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="seeds 0 to this, less one, in place of the file's")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time, each with one thread")] = os.cpu_count() or 1,
    results: Annotated[
        Path | None, typer.Option(help="lines of finished runs; docs/results/NAME.jsonl by default")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="folder of the runs; runs/experiments/NAME by default")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep the run folders")] = False,
    table: Annotated[bool, typer.Option("--table", help="make the table of what is done, and run nothing")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="put the table between <!-- NAME --> and <!-- /NAME --> there")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write how ours stands to its rivals there")] = None,
    executor: Annotated[
        Literal["local", "slurm"], typer.Option(help="local: this machine; slurm: an array of --tasks jobs")
    ] = "local",
    tasks: Annotated[int, typer.Option(min=1, help="slurm: jobs of the array, each with --jobs processes")] = 8,
    partition: Annotated[str | None, typer.Option(help="slurm: where they queue; others: --set launch.…")] = None,
) -> None:
    """Run every method in every cell with every seed that is not done yet, then print the table.

    Called again it goes on where it was stopped. Exit status 1 if a run failed.
    """
    requests = [
        Request(
            experiment=each,
            extra=tuple(words or ()),
            seeds=seeds,
            results=results or Path("docs/results") / f"{each.name}.jsonl",
            root=root or Path("runs/experiments") / each.name,
            processes=jobs,
            keep=keep,
        )
        for each in map(read_experiment, files)
    ]
    out = Out(markdown, json_file)
    if out.markdown is not None:
        for request in requests:
            tables.check_marks(out.markdown, request.experiment.name)
    if out.json_file is not None and not out.json_file.parent.is_dir():  # said now, not after hours of runs
        raise AutodoError(f"--json {out.json_file}: there is no folder {out.json_file.parent}; make it")
    if executor == "slurm" and not table:
        raise typer.Exit(_on_slurm(files, requests, tasks, partition))
    failed = 0 if table else sum(map(_make, requests))
    _show(requests, out)
    raise typer.Exit(int(failed > 0))


def _make(request: Request) -> int:
    """Make what is to be made; how many failed. Exits with 130 at Ctrl-C."""
    try:
        with sigterm_as_ctrl_c():
            return run(request).failed
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on, what is finished is kept", err=True)
        raise typer.Exit(130) from None


def _show(requests: list[Request], out: Out) -> None:
    """Print the tables, and put them where they are wanted."""
    rows: list[dict[str, Any]] = []
    for request in requests:
        each, lines = request.experiment, newest(request)
        count = request.seeds or each.seeds
        text = tables.markdown(each, lines, count)
        typer.echo(f"\n{text}")
        rows += tables.figures(each, lines, count)
        if out.markdown is not None:
            tables.insert(out.markdown, each.name, text)
    if out.json_file is not None:
        try:
            write_text(out.json_file, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise AutodoError(f"--json {out.json_file}: cannot be written ({error.strerror})") from error


def _on_slurm(files: list[Path], requests: list[Request], tasks: int, partition: str | None) -> int:
    """Hand the experiments to the launcher; its exit status."""
    status = 0
    for file, request in zip(files, requests, strict=True):
        words = [*request.extra, *([f"launch.partition={partition}"] if partition else [])]
        command = [sys.executable, "-m", "launcher.experiment", str(file), "--tasks", str(tasks)]
        command += ["--jobs", str(request.processes), "--results", str(request.results), "--root", str(request.root)]
        command += [word for each in words for word in ("--set", each)]
        command += ["--seeds", str(request.seeds)] if request.seeds is not None else []
        command += ["--keep"] if request.keep else []
        status = subprocess.run(command, check=False).returncode or status
    return status

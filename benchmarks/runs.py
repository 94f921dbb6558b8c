"""Many small runs of configs/digits.yaml, a few at a time, for the benchmarks that compare settings.

Runs are kept in their folders: called again after a stop, a finished run is only read and a broken-off one goes on.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import typer

from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json
from autodo_dist.load_config import load_config
from autodo_dist.train import train

Key = TypeVar("Key")
CONFIG = Path(__file__).resolve().parent.parent / "configs/digits.yaml"
ONE_RANK = ("launch.ranks_per_node=1",)


def run_all(settings: Mapping[Key, Sequence[str]], jobs: int) -> dict[Key, Path]:
    """Train each of the runs, given as words over configs/digits.yaml, `jobs` at a time; their folders."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures: dict[Key, Future[Path]] = {key: pool.submit(run, words) for key, words in settings.items()}
        try:
            return {key: future.result() for key, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run(words: Sequence[str]) -> Path:
    """Train one run to its end in this process, what it prints going to a file beside it; its folder.

    AutodoError names the run and that file beside the cause.
    """
    config = load_config(CONFIG, [*ONE_RANK, *words])
    config.run.root.mkdir(parents=True, exist_ok=True)
    log = config.run.root / f"{config.run.name}.log"  # a name may hold a dot
    with log.open("a") as file, contextlib.redirect_stdout(file):
        try:
            train(config)
        except AutodoError as error:
            raise AutodoError(f"run {config.run.name}: failed, see {log}: error: {error}") from error
    print(f"{config.run.name}: test error {test_error(config.folder):.2f} %", file=sys.stderr, flush=True)
    return config.folder


def summary(folder: Path) -> dict[str, Any]:
    """What the run came to."""
    found: dict[str, Any] = read_json(folder / "summary.json")
    return found


def test_error(folder: Path) -> float:
    """Test error of the last epoch, %."""
    return 100 * (1 - float(summary(folder)["test_accuracy_final"]))


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a benchmark's figures as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def as_command(main: Callable[..., None]) -> None:
    """Run a benchmark's `main` with the words of the command line; an AutodoError is one line, and status 1."""
    try:
        typer.run(main)
    except AutodoError as error:
        sys.exit(f"error: {error}")

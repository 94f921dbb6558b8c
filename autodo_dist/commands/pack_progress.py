"""How far a pack has come: bars on a terminal, a line now and then elsewhere (a log file of a batch job)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

EVERY = 10.0  # seconds between two lines


class Pace(ProgressColumn):
    """Rate and time left, over the last half minute."""

    def render(self, task: Task) -> Text:
        """For the bar of a terminal."""
        return Text(pace(task))


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield the function that is told (stage, done, in all)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Pace())
    tasks: dict[str, TaskID] = {}
    said = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def report(stage: str, done: int, total: int) -> None:
            nonlocal said
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)
            if not console.is_terminal and time.monotonic() - said >= EVERY:
                said = time.monotonic()
                print(f"{stage}: {done:,} of {total:,}{pace(bars.tasks[tasks[stage]])}", file=console.file, flush=True)

        yield report


def pace(task: Task) -> str:
    """`, 640/s, 0:12:03 left`; nothing as long as it is not known."""
    left = "" if task.time_remaining is None else f", {timedelta(seconds=int(task.time_remaining))} left"
    return "" if task.speed is None else f", {task.speed:,.0f}/s{left}"

"""`autodo watch`: a run on one screen, redrawn in place: how far, how fast, how good, how long yet, and each rank."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autodo_dist.standing import Rank, Standing

BARS = "▁▂▃▄▅▆▇█"
ASK_S = 30.0  # between questions to Slurm's controller
COLORS = {"running": "green", "finished": "green", "failed": "red", "silent": "red", "stopped": "yellow"}
DOING = {"task": "task pass", "hyper": "hyper pass", "evaluation": "evaluating", "save": "saving"}


def watch(
    run: Annotated[Path, typer.Argument(help="run folder; it need not be there yet")],
    once: Annotated[bool, typer.Option("--once", help="print it once")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between looks")] = 1.0,
) -> None:
    """Watch a run from any machine that sees its folder; it reads only. Ends with the run, or at Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    from autodo_dist.standing import Looker

    console, looker = Console(highlight=False), Looker(run, seldom(queued, ASK_S))
    standing = looker.look()
    if not once and console.is_terminal:
        try:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while standing.state != "finished":
                    live.update(frame(run, standing, console.height, time.time()), refresh=True)
                    time.sleep(every)
                    standing = looker.look()
        except KeyboardInterrupt:
            pass
    console.print(frame(run, standing, console.height, time.time()))


def queued(job: str) -> str:
    """What Slurm says of a job that waits or runs: state and reason; empty where there is no Slurm or no such job."""
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T %r"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def seldom(ask: Callable[[str], str], seconds: float) -> Callable[[str], str]:
    """The function, asked at most every so many seconds; in between its last answer stands."""
    when, last = -float("inf"), ""

    def answer(word: str) -> str:
        nonlocal when, last
        if time.monotonic() - when >= seconds:
            when, last = time.monotonic(), ask(word)
        return last

    return answer


def frame(run: Path, standing: Standing, height: int, now: float) -> RenderableType:
    """The whole screen, no higher than it."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in [*figures(standing), *safety(standing, now)]]
    top: list[RenderableType] = [head(run, standing), *progress(standing), *lines]
    return Group(*top, *ranks(standing.ranks, height - len(top) - 1))


def head(run: Path, standing: Standing) -> RenderableType:
    """The run's folder and state."""
    from rich.text import Text

    where = DOING.get(standing.pass_, "") if standing.state == "running" else ""
    state = f"{standing.state}{f', {where}' if where else ''}"
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{run}  ", "bold").append(state, COLORS.get(standing.state, "cyan"))
    return text.append(f"  {standing.why}" if standing.why else "")


def progress(standing: Standing) -> list[RenderableType]:
    """A bar, and in words: steps, epoch, time left."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if not standing.total:
        return []
    epochs = f" of {standing.config.train.epochs}" if standing.config is not None else ""
    words = f"step {standing.step:,} of {standing.total:,} ({standing.step / standing.total:.1%})"
    words += f", epoch {standing.epoch}{epochs}" if standing.epoch is not None else ""
    words += f"; {span(standing.left)} left" if standing.left is not None else ""
    bar = Table.grid(expand=True)  # the bar alone ends no line
    bar.add_row(ProgressBar(total=standing.total, completed=standing.step))
    return [bar, Text(words, no_wrap=True, overflow="ellipsis")]


def figures(standing: Standing) -> list[str]:
    """Rates, metrics, hyper figures."""
    rows = [row for row in standing.rows if "images_per_second" in row]
    lines = []
    if rows:
        row, seconds = rows[-1], sum(row["seconds"] for row in rows)
        mean, wait = (
            sum(row[name] * row["seconds"] for row in rows) / seconds
            for name in ("images_per_second", "data_wait_share")
        )
        now = f"{row['images_per_second']:,.0f} now, {mean:,.0f} mean"
        wait_now = f"data wait {row['data_wait_share']:.1%} now, {wait:.1%} mean"
        lines.append(f"images/s    {now}; {wait_now}; memory {size(row['peak_memory_bytes'])}")
    if row := standing.newest("task", "loss"):
        lines.append(f"train       loss {row['loss']:.4f}, accuracy {share(row['accuracy'])}, lr {row['lr']:.4g}")
    if evaluations := standing.evaluations:
        lines += evaluated(evaluations)
    hyper = [standing.newest(kind, "cosine") for kind in ("hyper", "task")]
    if row := max(hyper, key=lambda it: it.get("step", -1)):
        eigenvalue = f", largest eigenvalue {row['largest_eigenvalue']:.3g}" if "largest_eigenvalue" in row else ""
        lines.append(f"hyper       cosine {row['cosine']:.4f}{eigenvalue}, lr {row['hyper_lr']:.4g}")
        facts = standing.newest(row["kind"], "changed_labels")
        if facts:
            below, changed = share(facts["weights_below_half"]), share(facts["changed_labels"])
            lines.append(f"learnt      {below} of the weights below 1/2, {changed} of the labels changed")
    return lines


def evaluated(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The newest evaluation, the best by validation, and the validation error over time."""
    lines = [f"evaluation  {accuracies(rows[-1])}"]
    if known := [it for it in rows if it["validation_accuracy"] is not None]:
        best = max(known, key=lambda it: float(it["validation_accuracy"]))  # the first of equal ones, as in a run
        errors = [1 - it["validation_accuracy"] for it in known]
        lines.append(f"best        {accuracies(best)}")
        lines.append(f"error       {sparkline(errors[-50:])} {share(errors[-1])} on validation")
    return lines


def accuracies(row: dict[str, Any]) -> str:
    """What an evaluation found."""
    return f"validation {share(row['validation_accuracy'])}, test {share(row['test_accuracy'])}, epoch {row['epoch']}"


def safety(standing: Standing, now: float) -> list[str]:
    """Newest checkpoint, starts, goodput."""
    if not standing.starts:
        return []
    saved = standing.saved
    text = "none yet" if saved is None else f"step {saved.step:,}, {span(max(0.0, now - saved.time))} ago"
    goodput = "" if standing.goodput is None else f"; goodput {standing.goodput:.1%}"
    return [f"checkpoint  {text}; restarts {standing.starts - 1}{goodput}"]


def ranks(found: Sequence[Rank], room: int) -> list[RenderableType]:
    """A line a rank; where there is no room for all, those that are silent, then those that are behind, come first."""
    from rich.table import Table
    from rich.text import Text

    if not found or room < 2:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("rank", "host", "pid", "at", "heard", "memory"):
        table.add_column(name, justify="left" if name in ("host", "at") else "right", no_wrap=True, overflow="ellipsis")
    order = list(found) if len(found) < room else sorted(found, key=lambda it: (not it.silent, it.step, it.rank))
    shown = order if len(found) < room else order[: room - 2]
    for it in shown:
        place = f"{it.phase}:{it.step}" if it.step >= 0 else it.phase
        heard = f"no word for {it.age:.0f} s" if it.silent else f"{it.age:.0f} s ago"
        style = "red" if it.silent else ""
        table.add_row(str(it.rank), it.host, str(it.pid), place, heard, size(it.memory_bytes), style=style)
    rest = order[len(shown) :]
    if not rest:
        return [table]
    low, high = min(it.step for it in rest), max(it.step for it in rest)
    steps = f"step {high}" if low == high else f"steps {low} to {high}"
    return [table, Text(f"and {len(rest)} more, at {steps}")]


def sparkline(values: Sequence[float]) -> str:
    """A block a value, from the least to the largest."""
    low, high = min(values), max(values)
    width = (high - low) or 1.0
    return "".join(BARS[round((value - low) / width * (len(BARS) - 1))] for value in values)


def share(value: float | None) -> str:
    """A share in per cent."""
    return "none" if value is None else f"{value:.2%}"


def size(count: float) -> str:
    """Bytes in GB."""
    return f"{count / 1e9:.2f} GB"


def span(seconds: float) -> str:
    """Seconds in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

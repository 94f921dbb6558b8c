"""The table of an experiment: errors over seeds, and ours less each method's within seeds, with its standard error.

The error is that of the last epoch: nothing is chosen by the test part. All standard deviations are those of a sample,
of n - 1. d_s being the paired difference of seed s, its mean has the standard error std(d)/√n; a difference of more
than twice that is called better or worse.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodo_dist.errors import AutodoError
from autodo_dist.experiment.plan import Budget, Experiment, Key
from autodo_dist.experiment.results import Line
from autodo_dist.files import write_text

Lines = Mapping[Key, Line]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of n values; no deviation (None) of a single one."""

    mean: float
    std: float | None
    n: int

    @property
    def error(self) -> float | None:
        """The standard error of the mean."""
        return None if self.std is None else self.std / self.n**0.5

    @property
    def beyond(self) -> bool:
        """Whether the mean is further from 0 than twice its standard error."""
        return self.error is not None and abs(self.mean) > 2 * self.error


@dataclass(frozen=True)
class Row:
    """A method in a cell, over its seeds; None where there is nothing to know. difference: ours less the method's, %.

    seconds, flops: medians over seeds of the method's in ours.
    """

    method: str
    error: Spread | None
    best: Spread | None
    difference: Spread | None
    auroc: float | None
    right: float | None
    seconds: float | None
    flops: float | None


def spread(values: Iterable[float]) -> Spread | None:
    """Of some values; None of none."""
    found = list(values)
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def rows(experiment: Experiment, lines: Lines, cell: str, budget: Budget) -> list[Row]:
    """The methods of a cell under a budget, in the file's order. Ours has the epochs as set under every budget."""
    ours = _of(lines, experiment.ours, cell, "epochs")
    methods = list(experiment.methods) if budget == "epochs" else [experiment.ours, *experiment.rivals]
    found = []
    for method in methods:
        own = method == experiment.ours
        theirs = ours if own else _of(lines, method, cell, budget)
        pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        found.append(
            Row(
                method=method,
                error=spread(line.test_error for line in theirs.values()),
                best=spread(line.best_test_error for line in theirs.values()),
                difference=None if own else spread(our.test_error - their.test_error for our, their in pairs),
                auroc=_mean(line.auroc for line in theirs.values()),
                right=_mean(line.right for line in theirs.values()),
                seconds=statistics.median(their.seconds / our.seconds for our, their in pairs) if pairs else None,
                flops=statistics.median(their.flops / our.flops for our, their in pairs) if pairs else None,
            )
        )
    return found


def _of(lines: Lines, method: str, cell: str, budget: Budget) -> dict[int, Line]:
    """A method's lines in a cell, by seed."""
    return {key[2]: line for key, line in lines.items() if (key[0], key[1], key[3]) == (method, cell, budget)}


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def markdown(experiment: Experiment, lines: Lines, seeds: int) -> str:
    """The whole table, a part for each cell and budget."""
    parts = []
    for cell in experiment.cells:
        for budget in _budgets(experiment):
            found = rows(experiment, lines, cell, budget)
            parts.append("\n".join(_part(experiment, cell, budget, found, seeds)))
    return "\n\n".join(parts)


def _budgets(experiment: Experiment) -> tuple[Budget, ...]:
    """In the order in which they are shown."""
    return tuple(budget for budget in ("epochs", "flops") if budget in experiment.budgets)


def _part(experiment: Experiment, cell: str, budget: Budget, found: Sequence[Row], seeds: int) -> list[str]:
    """The lines of a cell under a budget; columns without any figure are left out."""
    what = f"{cell}: test error of the last epoch, {_seeds(seeds)}" + (", same FLOPs" if budget == "flops" else "")
    columns = {what: [_name(row, seeds) for row in found], "%": [_with_std(row.error) for row in found]}
    if experiment.best_epoch:
        columns["% of the epoch best on test"] = [_with_std(row.best) for row in found]
    columns |= {
        f"{experiment.ours} - it": [_with_error(row.difference) for row in found],
        "beyond 2 SE": [_verdict(row.difference) for row in found],
        "wrong labels, AUROC": [_number(row.auroc, "{:.3f}") for row in found],
        "right suggestions": [_number(row.right, "{:.1%}") for row in found],
        "time": [_number(row.seconds, "{:.2f}") for row in found],
        "FLOPs": [_number(row.flops, "{:.2f}") for row in found],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(shown), ["---"] * len(shown), *(list(line) for line in zip(*shown.values(), strict=True))]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def _name(row: Row, seeds: int) -> str:
    """The method, with its number of seeds where some are missing."""
    n = row.error.n if row.error is not None else 0
    return row.method if n == seeds else f"{row.method} ({n} of {_seeds(seeds)})"


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _with_std(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.2f}" + ("" if found.std is None else f" ± {found.std:.2f}")


def _with_error(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:+.2f}" + ("" if found.error is None else f" ± {found.error:.2f}")


def _verdict(found: Spread | None) -> str:
    if found is None or found.error is None:
        return ""
    return ("better" if found.mean < 0 else "worse") if found.beyond else "no"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def figures(experiment: Experiment, lines: Lines, seeds: int) -> list[dict[str, Any]]:
    """For each cell and budget: the mean paired difference of the rival that comes nearest to ours, which is to be
    below 0, and how many rivals are worse by more than two standard errors.

    The bar does not hold while a trial of the cell is missing.
    """
    found: list[dict[str, Any]] = []
    for cell in experiment.cells:
        for budget in _budgets(experiment):
            part = {row.method: row for row in rows(experiment, lines, cell, budget)}
            rivals = [(name, part[name].difference) for name in experiment.rivals]
            known = [(name, difference) for name, difference in rivals if difference is not None]
            if not known:
                continue
            nearest, largest = max(known, key=lambda it: it[1].mean)
            complete = len(known) == len(rivals) and all(it.n == seeds for _, it in known)
            better = sum(it.beyond and it.mean < 0 for _, it in known)
            name = f"{experiment.name}, {cell}{', same FLOPs' if budget == 'flops' else ''}"
            found += [
                {
                    "name": f"{name}: largest mean of ours - rival, of {len(known)} rivals",
                    "value": largest.mean,
                    "unit": "%",
                    "bar": "< 0",
                    "holds": complete and largest.mean < 0,
                    "rival": nearest,
                    "standard_error": largest.error,
                    "complete": complete,
                },
                {
                    "name": f"{name}: rivals beyond two standard errors",
                    "value": better,
                    "unit": f"of {len(rivals)}",
                    "bar": None,
                    "holds": None,
                },
            ]
    return found


def check_marks(file: Path, name: str) -> None:
    """AutodoError if the file lacks the marks that the table goes between."""
    between_marks(_read(file), name, "", file)


def insert(file: Path, name: str, table: str) -> None:
    """Put the table between the marks of that name."""
    text = between_marks(_read(file), name, table, file)
    try:
        write_text(file, text)
    except OSError as error:
        raise AutodoError(f"{file}: cannot be written ({error.strerror})") from error


def between_marks(text: str, name: str, table: str, file: Path) -> str:
    """The text with the table between `<!-- NAME -->` and `<!-- /NAME -->`. AutodoError if they are not there once."""
    marks = re.compile(f"(?s)(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)")
    found, count = marks.subn(lambda mark: f"{mark[1]}{table}\n{mark[2]}", text)
    if count != 1:
        raise AutodoError(f"{file}: {count} pairs of marks <!-- {name} --> and <!-- /{name} --> there; make it one")
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise AutodoError(f"{file}: cannot be read ({error.strerror})") from error

"""`autodo doctor`: examine this machine and say what to mend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autodo_dist.doctor import Finding, examine

COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    root: Annotated[Path, typer.Option("--runs", help="folder that holds the runs: disk and rights")] = Path("runs"),
) -> None:
    """Examine this machine: packages, GPUs, DALI, gloo, NCCL, ports, disk, Slurm. Exits 1 on an error."""
    console = Console()
    with console.status("Examining this machine: 10 to 30 s"):
        findings = examine(root)
    console.print(table(findings))
    errors, warnings = (sum(finding.status == status for finding in findings) for status in ("error", "warning"))
    console.print(f"{errors} error(s), {warnings} warning(s)")
    raise typer.Exit(exit_status(findings))


def exit_status(findings: Sequence[Finding]) -> int:
    """1 where anything is an error, else 0."""
    return int(any(finding.status == "error" for finding in findings))


def table(findings: Sequence[Finding]) -> Table:
    """One row a finding. Texts go in as Text: a bracket in an error message is no markup."""
    rows = Table("status", "subject", "what", "cure")
    for finding in findings:
        status = Text(finding.status, COLOURS[finding.status])
        rows.add_row(status, Text(finding.subject), Text(finding.what), Text(finding.cure))
    return rows

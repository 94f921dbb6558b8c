"""Follows Slurm jobs to their end: each change of state, the newest metrics, and at last why a run failed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodo_dist.run_folder import finished
from launcher import slurm_job
from launcher.failures import read_failures
from launcher.slurm_job import Answer

POLL_S = 5.0
_SHOWN = ("loss", "cosine", "validation_accuracy", "test_accuracy", "images_per_second")


def follow(jobs: Mapping[str, Path]) -> int:
    """Print what becomes of jobs (number -> run folder); 0 if all came to a good end, else the first bad exit status.

    130 if Ctrl-C ends the following; the jobs go on.
    """
    told: dict[str, str] = {}
    statuses: dict[str, int] = {}
    try:
        while len(statuses) < len(jobs):
            for number, folder in jobs.items():
                if number not in statuses:
                    job = slurm_job.ask(number)
                    _tell(number, folder, job, told)
                    if job is None or job.ended:
                        statuses[number] = _end(folder, number, job)
            if len(statuses) < len(jobs):
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"no longer followed; still in the queue: {' '.join(jobs.keys() - statuses.keys())}")
        return 130
    return next((status for status in statuses.values() if status), 0)


def _tell(number: str, folder: Path, job: Answer | None, told: dict[str, str]) -> None:
    """Print state and newest metrics where they differ from what was told."""
    state = "forgotten by Slurm"
    if job is not None:
        why = f", {job.reason}" if job.state == "PENDING" and job.reason != "None" else ""
        where = f" on {job.nodes}" if job.nodes and job.nodes != "(null)" else ""
        again = f", requeues: {job.restarts}" if job.restarts else ""
        state = f"{job.state}{where}{why}{again}"
    for kind, text in (("state", state), ("metrics", _newest(folder / "metrics.jsonl"))):
        if text and told.get(number + kind) != text:
            told[number + kind] = text
            print(f"{time.strftime('%H:%M:%S')} {folder.name} ({number}): {text}", flush=True)


def _newest(metrics: Path) -> str:
    """The last whole line of metrics.jsonl, in short; empty if there is none."""
    if not metrics.is_file():
        return ""
    lines = _tail(metrics)
    if len(lines) < 2:
        return ""
    row: dict[str, Any] = json.loads(lines[-2])
    shown = [f"{name} {row[name]:.4g}" for name in _SHOWN if row.get(name) is not None]
    return f"{row['kind']}, epoch {row['epoch']}, step {row['step']}: {', '.join(shown)}"


def _tail(file: Path) -> list[bytes]:
    """The file's end, cut at its newlines: at least a whole line and what follows it, where there is one.

    A line can be long: an evaluation has the accuracy of each class.
    """
    size, window = file.stat().st_size, 1 << 16
    with file.open("rb") as opened:
        while True:
            opened.seek(max(0, size - window))
            lines = opened.read().split(b"\n")
            if len(lines) > 2 or window >= size:
                return lines
            window *= 4


def _end(folder: Path, number: str, job: Answer | None) -> int:
    """Exit status of a job that has ended, having said why it failed."""
    status = int(not finished(folder)) if job is None else job.status
    if status:
        print(f"error: run {folder}: {_cause(folder, number, job)}", flush=True)
    return status


def _cause(folder: Path, number: str, job: Answer | None) -> str:
    """Why a job came to a bad end, as far as it is to be seen."""
    logs = Path(slurm_job.recorded(folder)["logs"])
    if failures := read_failures(folder):
        first = failures[0]
        log = logs / f"{number}_{first.rank}_log.out"
        return f"rank {first.rank} on {first.host} failed: {first.message}; its output is in {log}"
    if job is not None and job.reason == "JobLaunchFailure":
        return f"Slurm could not begin the job on {job.first}; does that node see {folder.absolute()}?"
    log = logs / f"{number}_0_log.out"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
    return said or f"job {number} ended as {job.state if job else 'unknown'}; see {logs}"

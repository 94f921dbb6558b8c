"""Whether a run that ended is started again, and for a Slurm job, having that done.

Slurm requeues a job whose node died, and none that failed. So the batch script sets an EXIT trap (`trap_line`), which
runs `python -m launcher.restart WHAT STATUS [KEY=VALUE]…` once srun and all ranks are gone, where WHAT is submitit's
folder with the job in it, or the yaml file of a run that no submitit started:

    finished                          nothing is done
    asked to stop, saved              scontrol requeue
    Slurm has decided (scancel, …)    nothing is done: the job counts as running no more, or is requeued already
    a rank died, hung or failed       scontrol requeue, within what verdict.py allows
    a user's error                    nothing is done: it is to be mended first

The queue waits for all ranks to have gone, so none sees its peers vanish, and submitit finds no result of theirs.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from autodo_dist import ledger
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config, load_config
from launcher import slurm_job
from launcher.failures import clear_failures
from launcher.job import Job
from launcher.verdict import first_cause, note_failure, refusal


def trap_line(logs: Path, python: str) -> str:
    """The last line of a batch script's set-up: has submitit's job requeued after its end where that is right.

    `python`: the shell command that runs the job's code.
    """
    command = f"{python} -u -m launcher.restart {shlex.quote(str(logs))} $?"
    return f"trap {shlex.quote(command)} EXIT"


def settings(what: Path, job: str, words: Sequence[str]) -> Config:
    """The settings of the run that this Slurm job is."""
    if not what.is_dir():
        return load_config(what, list(words))
    submission = DelayedSubmission.load(what / f"{job}_submitted.pkl")
    assert isinstance(submission.function, Job)
    return check_config(submission.function.settings, "of the job")


def after_job(folder: Path, most: int, status: int, decided: str) -> str:
    """Note how this Slurm job's attempt ended; why it is to be requeued, empty: it is not.

    decided: what Slurm has done with the job by itself. AutodoError says why it failed and is not to be requeued.
    """
    which = ledger.attempt()
    end = ledger.ended(ledger.read(folder), which)
    if end is not None:
        return str(end["why"]) if end["cause"] == "stopped" and not decided else ""
    if decided:
        note_failure(folder, which, decided, "slurm", "")
        return ""
    if status == 0:
        return ""
    why, kind, at = first_cause(folder, which)
    why = why or f"srun exited with status {status}, and no rank left a word"
    failed = note_failure(folder, which, why, kind, at)
    if reason := refusal(failed, most):
        raise AutodoError(f"{why}; not started again: {reason}")
    return f"{why} (restart {len(failed)} of at most {most})"


def decision(job: slurm_job.Answer | None) -> str:
    """What Slurm has done with a job whose batch script ends; empty: nothing yet, it is ours to requeue."""
    if job is None:
        return "Slurm knows nothing of the job any more"
    if job.restarts > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return "Slurm requeues the job by itself: preempted, or a node died"
    return "" if job.state == "RUNNING" else f"Slurm ends the job: {job.state}"


def main() -> None:
    """`python -m launcher.restart WHAT STATUS [KEY=VALUE]…`, in the batch script of a Slurm job."""
    what, status, *words = sys.argv[1:]
    environment = os.environ
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        config = settings(Path(what), job, words)
        decided = decision(slurm_job.ask(job))
        why = after_job(config.folder, config.launch.max_restarts, int(status), decided)
    except AutodoError as error:
        sys.exit(f"error: {error}")
    if decided:
        print(decided, flush=True)
    sys.exit(requeue(job, Path(what), config.folder, why) if why else int(status))


def requeue(job: str, logs: Path, folder: Path, why: str) -> int:
    """Have Slurm start a job again; the exit status."""
    clear_failures(folder)
    for result in logs.glob(f"{job}_*_result.pkl"):  # of this attempt, not of the run
        result.unlink(missing_ok=True)
    print(f"requeued: {why}", flush=True)
    return subprocess.run(["scontrol", "requeue", job], check=False).returncode


if __name__ == "__main__":
    main()

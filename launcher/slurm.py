"""Hands a run to Slurm through submitit and says how to follow and cancel it."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from autodo_dist.errors import AutodoError
from launcher.job import Job, clear_failures

DEFAULT_MINUTES = 24 * 60  # where launch.slurm has no `time`; submitit's own default is 5 minutes
_OURS = {
    "nodes": "launch.nodes",
    "ntasks": "launch.nodes and launch.ranks_per_node",
    "ntasks_per_node": "launch.ranks_per_node",
    "job_name": "run.name",
}


def submit(job: Job, folder: Path, parameters: Mapping[str, Any]) -> None:
    """Submit the job with `parameters` (see there); prints its number and the places to look at.

    AutodoError if this machine has no Slurm or sbatch refuses the job.
    """
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise AutodoError(
            "executor slurm: no sbatch and srun on PATH; run on a login node, or on this machine with --executor local"
        )
    clear_failures(folder)
    executor = submitit.SlurmExecutor(folder=folder / "submitit")
    executor.update_parameters(**parameters)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            number = executor.submit(job).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise AutodoError(f"sbatch refused the job: {reason}; see launch.slurm and the launch options") from error
    except OSError as error:
        raise AutodoError(f"run folder {folder}: cannot be written ({error.strerror}); set run.root") from error
    logs = executor.folder
    print(f"submitted Slurm job {number}, at most {parameters['time'] / 60:.1f} h (launch.slurm.time)")
    print(f"  run     {folder}")
    print(f"  logs    {logs}, one per rank; why a rank failed: {folder / 'errors'}")
    print(f"  follow  tail -F {logs}/{number}_0_log.out")
    print(f"  cancel  scancel {number}")


def parameters(name: str, nodes: int, ranks_per_node: int, options: Mapping[str, bool | int | str]) -> dict[str, Any]:
    """What submitit's update_parameters gets: the shape of the run, and the user's sbatch options over our defaults.

    AutodoError for an option that the launcher sets itself, or a time that Slurm would not read.
    """
    rest = {key.replace("-", "_"): value for key, value in options.items()}
    for key in rest.keys() & _OURS.keys():
        raise AutodoError(f"launch.slurm.{key}: not set here; set {_OURS[key]} instead")
    time = minutes(rest.pop("time", DEFAULT_MINUTES))
    # One log for a rank's stdout and stderr. A dead rank ends its peers, which would wait for it until a time-out. srun
    # does not take cpus_per_task over from sbatch since Slurm 22.05.
    srun = ["--kill-on-bad-exit=1"]
    if "cpus_per_task" in rest:
        srun.append(f"--cpus-per-task={rest['cpus_per_task']}")
    return {
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": ranks_per_node,
        "time": time,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "setup": ["unset MASTER_ADDR MASTER_PORT"],  # of the submitting shell; ranks derive them from the job
        "additional_parameters": rest,
    }


def minutes(time: str | int) -> int:
    """Slurm's forms of a time limit as whole minutes, rounded up: 90, 90:00, 1:30:00, 1-12, 1-12:30, 1-12:30:00."""
    days, dash, clock = str(time).rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        day = int(days) if dash else 0
        if min(day, *parts) < 0 or max(day, *parts) == 0 or len(parts) > 3:
            raise ValueError
    except ValueError:
        raise AutodoError(
            f"launch.slurm.time = {time!r}: not a time limit; give minutes, 'hours:minutes:seconds' or 'days-hours'"
        ) from None
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # without days the first number is minutes
    hour, minute, second = (*parts, 0, 0)[:3]
    return (day * 24 + hour) * 60 + minute + math.ceil(second / 60)

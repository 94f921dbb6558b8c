"""Hands runs to Slurm through submitit and says how to follow and cancel them."""

from __future__ import annotations

import contextlib
import io
import math
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from launcher import restart, slurm_job, snapshot
from launcher.failures import clear_failures
from launcher.job import Job

_OURS = {
    "nodes": "launch.nodes",
    "ntasks": "launch.nodes and launch.ranks_per_node",
    "ntasks_per_node": "launch.ranks_per_node",
    "cpus_per_task": "launch.cpus_per_rank",
    "job_name": "run.name",
    "array": "--runs",
    "output": "run.root",
    "error": "run.root",
} | {
    name: f"launch.{name}"
    for name in ("partition", "account", "qos", "time", "mem", "gpus_per_node", "constraint", "exclude")
}

_CURES = {  # words of sbatch -> what to change
    "generic resource": "no such GPUs there; set --gpus-per-node, --partition, or train.device=cpu (asks for none)",
    "node configuration": "too much for a node; lower --cpus-per-rank, --mem, --gpus-per-node, or set --partition",
    "feature": "set --constraint to what a node has (sinfo -o '%N %f' lists it)",
    "node name": "set --exclude to nodes that there are (sinfo -N lists them)",
    "account": "set --account, and --partition, to what you may use (sacctmgr show assoc user=$USER lists it)",
    "qos": "set --qos to what you may use (sacctmgr show assoc user=$USER lists it)",
}


def submit(configs: Sequence[Config], parameters: dict[str, Any], logs: Path) -> dict[str, Path]:
    """Submit one job, or an array with a job a config; the run folder of each job's number.

    AutodoError if Slurm refuses the job or would let it wait for ever; its copy of the code is gone then.
    """
    code = snapshot.take(logs.parent)
    try:
        numbers = _hand_over(configs, parameters, logs, code)
        slurm_job.refuse_if_hopeless(numbers[0])
    except AutodoError:
        if code is not None:
            shutil.rmtree(code, ignore_errors=True)
        raise
    jobs = dict(zip(numbers, (config.folder for config in configs), strict=True))
    for number, folder in jobs.items():
        slurm_job.record(folder, number, parameters["job_name"], logs)
    _tell(jobs, parameters["time"], logs, code)
    return jobs


def check_slurm() -> None:
    """AutodoError if this machine cannot submit jobs."""
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise AutodoError(
            "executor slurm: no sbatch and srun on PATH; run on a login node, or on this machine with --executor local"
        )


def _hand_over(configs: Sequence[Config], parameters: dict[str, Any], logs: Path, code: Path | None) -> list[str]:
    """The numbers that Slurm gives the jobs."""
    for config in configs:
        clear_failures(config.folder)
    executor = submitit.SlurmExecutor(folder=logs, python=snapshot.python(code))
    executor.update_parameters(**_with_trap(parameters, logs, code))
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # submitit prints what it also raises
            jobs = [executor.submit(Job(config.model_dump(mode="json"))) for config in configs]
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise AutodoError(f"sbatch refused the job: {reason}; {_cure(reason)}") from error
    except OSError as error:
        raise AutodoError(f"folder {logs}: cannot be written ({error.strerror}); set run.root") from error
    return [job.job_id for job in jobs]


def _cure(reason: str) -> str:
    """What to change so that sbatch takes the job, by what it said."""
    if "invalid partition" in reason.lower():
        found = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=False).stdout.split()
        return f"set --partition to one of {', '.join(sorted(set(found)))}"
    return next(
        (cure for words, cure in _CURES.items() if words in reason), "see the launch settings (autodo settings)"
    )


def _tell(jobs: dict[str, Path], minutes: int, logs: Path, code: Path | None) -> None:
    """Say what was submitted, where to look, and how to follow and cancel it."""
    first, number = next(iter(jobs)), next(iter(jobs)).split("_")[0]
    print(f"submitted Slurm job {number}, at most {minutes / 60:.1f} h (launch.time)")
    for run, folder in jobs.items():
        print(f"  run     {folder}" + (f"  (job {run})" if len(jobs) > 1 else ""))
    print(f"  code    {code or 'the installed package'}")
    print(f"  logs    {logs}, one per rank")
    print(f"  follow  tail -F {logs}/{first}_0_log.out  (or submit with --follow)")
    print(f"  cancel  scancel {number}", flush=True)


def script(parameters: dict[str, Any], logs: Path, runs: int) -> str:
    """The file that sbatch would get, for people to read; needs no Slurm."""
    parameters = _with_trap(parameters, logs, None)
    count = runs if runs > 1 else None
    command = f"{snapshot.python(None)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    return _make_sbatch_string(command=command, folder=logs, map_count=count, **parameters)


def _with_trap(parameters: dict[str, Any], logs: Path, code: Path | None) -> dict[str, Any]:
    """The parameters with the trap that has the job requeued, by the same code as its ranks'."""
    return parameters | {"setup": [*parameters["setup"], restart.trap_line(logs, snapshot.python(code))]}


def parameters(config: Config, name: str, logs: Path) -> dict[str, Any]:
    """What submitit's update_parameters gets: the shape of the run, and the user's sbatch options over our defaults.

    AutodoError for an option that has a setting of its own, or a time that Slurm would not read.
    """
    launch = config.launch
    rest = {key.replace("-", "_"): value for key, value in launch.slurm.items()}
    for key in rest.keys() & _OURS.keys():
        raise AutodoError(f"launch.slurm.{key}: not set here; set {_OURS[key]} instead")
    cpus, gpus = launch.cpus_per_rank, launch.gpus_per_node
    cpus = config.data.threads + config.train.threads if cpus is None else cpus
    gpus = launch.ranks_per_node * (config.train.device != "cpu") if gpus is None else gpus
    given = {key: getattr(launch, key) for key in ("partition", "account", "qos", "mem", "constraint", "exclude")}
    # requeue: a cluster may have it off by default, and scontrol then does not do it either.
    given |= {"cpus_per_task": cpus, "gpus_per_node": gpus or None, "requeue": True}
    return {
        "job_name": name,
        "nodes": launch.nodes,
        "ntasks_per_node": launch.ranks_per_node,
        "time": minutes(launch.time),
        # One log for a rank's stdout and stderr. A dead rank ends its peers, which would wait for it until a time-out.
        # srun does not take cpus_per_task over from sbatch since Slurm 22.05.
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
        # MASTER_…: of the submitting shell; ranks derive them from the job.
        "setup": ["unset MASTER_ADDR MASTER_PORT", *launch.setup, _see(logs)],
        "additional_parameters": {key: value for key, value in given.items() if value is not None} | rest,
    }


def _see(logs: Path) -> str:
    """A shell line that ends the job, with a line for each such node, where a node does not see the logs' folder."""
    folder = shlex.quote(str(logs))
    test = (
        f'[ -d {folder} ] || {{ echo "error: node $SLURMD_NODENAME does not see {folder}; set run.root to a folder '
        'that every node sees"; exit 1; }'
    )
    once = "--nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1"
    return f"srun {once} sh -c {shlex.quote(test)} || exit 1"


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
            f"launch.time = {time!r}: not a time limit; give minutes, 'hours:minutes:seconds' or 'days-hours'"
        ) from None
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # without days the first number is minutes
    hour, minute, second = (*parts, 0, 0)[:3]
    return (day * 24 + hour) * 60 + minute + math.ceil(second / 60)

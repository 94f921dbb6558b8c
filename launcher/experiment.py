"""An experiment over a Slurm array: each task makes its share of the trials and writes a results file of its own.

`autodo experiment FILE --executor slurm` calls `python -m launcher.experiment`. A task that is preempted, or whose time
is up, is queued again and goes on: what it has finished is found in its file.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import submitit
import typer
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.experiment.plan import read_experiment
from autodo_dist.experiment.runner import Request, run, task_file
from autodo_dist.load_config import load_config
from launcher import slurm, slurm_job, snapshot

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Share:
    """What a task of the array calls; submitit pickles it."""

    request: Request

    def __call__(self) -> int:
        """Make the share; how many trials it had to make. AutodoError, which fails the task, if any failed."""
        tally = run(self.request)
        if tally.failed:
            raise AutodoError(f"{tally.failed} of {tally.total} trials failed; they are named above, with their logs")
        return tally.total

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again when Slurm takes the node away: the same, which finds what is done."""
        return DelayedSubmission(self)


def shares(request: Request, tasks: int) -> list[Share]:
    """The shares of an array of so many tasks, with absolute places."""
    return [
        Share(
            Request(
                experiment=request.experiment.model_copy(update={"config": request.experiment.config.absolute()}),
                extra=request.extra,
                seeds=request.seeds,
                results=request.results.absolute(),
                root=request.root.absolute() / str(task),
                processes=request.processes,
                keep=request.keep,
                share=(task, tasks),
            )
        )
        for task in range(tasks)
    ]


def hand_over(executor: submitit.Executor, todo: Sequence[Share]) -> list[submitit.Job[int]]:
    """Submit the shares as one array. AutodoError if they are refused."""
    try:
        with executor.batch():
            return [executor.submit(share) for share in todo]
    except (FailedJobError, FailedSubmissionError) as error:
        raise AutodoError(f"sbatch refused the array: {' '.join(str(error).split())}; see --set launch.…") from error
    except OSError as error:
        raise AutodoError(f"folder {executor.folder}: cannot be written ({error.strerror}); set --root") from error


def submit(request: Request, tasks: int) -> None:
    """Submit an experiment, and say how to follow and cancel it. AutodoError if that cannot be done."""
    slurm.check_slurm()
    name, logs = f"experiment-{request.experiment.name}", request.root.absolute() / "submitit"
    code = snapshot.take(request.root)
    try:
        executor = submitit.SlurmExecutor(folder=logs, python=snapshot.python(code))
        executor.update_parameters(**parameters(request, name, logs))
        number = hand_over(executor, shares(request, tasks))[0].job_id.split("_")[0]
        slurm_job.refuse_if_hopeless(number)
    except AutodoError:
        if code is not None:
            shutil.rmtree(code, ignore_errors=True)
        raise
    print(f"submitted Slurm array {number}: {tasks} tasks of experiment {request.experiment.name}")
    print(f"  code    {code or 'the installed package'}")
    print(f"  logs    {logs}")
    print(f"  results {task_file(request.results, 0)} to .{tasks - 1}; the table: the same command with --table")
    print(f"  cancel  scancel {number}", flush=True)


def parameters(request: Request, name: str, logs: Path) -> dict[str, Any]:
    """What submitit gets: a job of one process, with a CPU for each trial that it makes at a time unless set."""
    config = load_config(request.experiment.config, [*request.experiment.settings, *request.extra])
    launch = config.launch
    update = {"nodes": 1, "ranks_per_node": 1, "cpus_per_rank": launch.cpus_per_rank or request.processes}
    one: Config = config.model_copy(update={"launch": launch.model_copy(update=update)})
    return slurm.parameters(one, name, logs)


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="an experiment's yaml")],
    results: Annotated[Path, typer.Option()],
    root: Annotated[Path, typer.Option()],
    tasks: Annotated[int, typer.Option(min=1)],
    jobs: Annotated[int, typer.Option(min=1)],
    words: Annotated[list[str] | None, typer.Option("--set")] = None,
    seeds: Annotated[int | None, typer.Option(min=1)] = None,
    keep: Annotated[bool, typer.Option("--keep")] = False,
) -> None:
    """Submit an experiment as an array; the options are those of `autodo experiment`."""
    try:
        submit(Request(read_experiment(file), tuple(words or ()), seeds, results, root, jobs, keep), tasks)
    except AutodoError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()

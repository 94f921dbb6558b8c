"""The one command that starts a run: settings and launch options -> ranks on this machine, or a Slurm job."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from autodo_dist import engine_settings
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.files import write_text
from autodo_dist.load_config import load_config
from autodo_dist.run_folder import finished
from autodo_dist.run_lock import refuse_if_held
from launcher import local, seeds, slurm, slurm_job
from launcher.follow import follow as follow_jobs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="yaml file with what differs from the defaults", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over the file's, e.g. train.epochs=3")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="machines; this and the next set launch.…")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="processes per machine, one per GPU")] = None,
    executor: Annotated[str | None, typer.Option(help="local or slurm")] = None,
    partition: Annotated[str | None, typer.Option(help="where the job queues")] = None,
    account: Annotated[str | None, typer.Option(help="who pays")] = None,
    qos: Annotated[str | None, typer.Option(help="quality of service")] = None,
    time: Annotated[str | None, typer.Option(help="limit: minutes, hours:minutes:seconds, days-hours")] = None,
    mem: Annotated[str | None, typer.Option(help="main memory of a node, e.g. 200G")] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(help="CPUs of a rank")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of a machine")] = None,
    constraint: Annotated[str | None, typer.Option(help="features that machines must have")] = None,
    exclude: Annotated[str | None, typer.Option(help="machines that the job must not get")] = None,
    setup: Annotated[
        list[str] | None, typer.Option(metavar="LINE", help="shell line before the ranks start; repeatable")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option("--slurm", metavar="KEY=VALUE", help="any other option of sbatch; repeatable")
    ] = None,
    fork: Annotated[
        str | None, typer.Option(metavar="RUN@STEP", help="start from that checkpoint of another run; sets run.fork")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="that many runs, of seeds 0, 1, …: NAME-seed0, NAME-seed1, …")] = 1,
    follow: Annotated[
        bool, typer.Option("--follow", help="show a Slurm job's state and metrics until its end")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be started, and start nothing")] = False,
) -> None:
    """Start a training run, or go on with it from its last checkpoint."""
    launch: dict[str, object] = {
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        "executor": executor,
        "partition": partition,
        "account": account,
        "qos": qos,
        "time": time,
        "mem": mem,
        "cpus_per_rank": cpus_per_rank,
        "gpus_per_node": gpus_per_node,
        "constraint": constraint,
        "exclude": exclude,
        "setup": setup or None,
    }
    words = [_word(f"launch.{name}", value) for name, value in launch.items() if value is not None]
    words += [_word("run.fork", fork)] if fork is not None else []
    try:
        words += [_word(f"launch.slurm.{key}", value) for key, value in map(_option, sbatch or ())]
        status = start(load_config(config, [*(overrides or []), *words]), runs, follow, dry_run)
    except AutodoError as error:
        typer.echo(f"error: {error}", err=True)
        status = 1
    raise typer.Exit(status)


def _word(name: str, value: object) -> str:
    """An override with that very value: $ and what looks like a number or a list stay as they are."""
    return f"{name}={json.dumps(value)}".replace("${", "\\${")


def _option(word: str) -> tuple[str, str | bool]:
    """An option of sbatch and its value; True for one that stands alone."""
    key, equals, value = word.removeprefix("--").partition("=")
    if not key:
        raise AutodoError(f"--slurm {word!r}: not of the form key=value, e.g. --slurm mail-type=END")
    return key, value if equals else True


def start(config: Config, runs: int = 1, follow: bool = False, dry_run: bool = False) -> int:
    """Start the runs, or print what would be started; the exit status. AutodoError if they cannot be started."""
    launch = config.launch
    ranks = launch.nodes * launch.ranks_per_node
    if config.train.batch_size < ranks:
        raise AutodoError(
            f"train.batch_size = {config.train.batch_size}: smaller than the {ranks} ranks, some would get no picture; "
            "raise it or start fewer ranks"
        )
    engine_settings.check(config, ranks)
    shape = f"{ranks} ranks ({launch.nodes} x {launch.ranks_per_node} per node), executor {launch.executor}"
    configs = seeds.seeded(config, runs) if runs > 1 else [config]
    if launch.executor == "slurm":
        status = _on_slurm(config, configs, shape, follow, dry_run)
    else:
        status = _here(configs, shape, dry_run)
    if runs > 1 and not dry_run and (follow or launch.executor == "local"):
        print(seeds.table([each.folder for each in configs]))
    return status


def _on_slurm(config: Config, configs: Sequence[Config], shape: str, follow: bool, dry_run: bool) -> int:
    """Submit a job, or an array of those that are not finished."""
    name = config.run.name
    folder = config.folder if len(configs) == 1 else config.run.root / f"{name}-seeds"
    logs = folder.absolute() / "submitit"
    sbatch = slurm.parameters(config, name, logs)
    if dry_run:
        print(slurm.script(sbatch, logs, len(configs)))
        _print_settings(config, configs, shape)
        return 0
    slurm.check_slurm()
    todo = [each for each in configs if not finished(each.folder)]
    for each in configs:
        if each not in todo:
            print(f"run {each.folder} is finished, see its summary.json; another run.name starts another run")
    for each in todo:
        slurm_job.refuse_if_queued(each.folder)
        refuse_if_held(each.folder)
    jobs = slurm.submit(todo, sbatch, logs) if todo else {}
    return follow_jobs(jobs) if follow else 0


def _here(configs: Sequence[Config], shape: str, dry_run: bool) -> int:
    """Run one after the other as processes of this machine, up to the first that fails."""
    for each in configs:
        file = each.folder / "launch.yaml"
        command = [sys.executable, "-u", "-m", "launcher.job", str(file)]
        if dry_run:
            print(each.to_yaml())
            print(f"# not started: {shape}; run folder {each.folder}\n#   {shlex.join(command)}")
            continue
        slurm_job.refuse_if_queued(each.folder)
        refuse_if_held(each.folder)
        _write(each, file)
        print(f"{shape}; run folder {each.folder}, other ranks' output in {each.folder / 'logs'}", flush=True)
        launch = each.launch
        status = local.launch(command, each.folder, launch.nodes, launch.ranks_per_node, launch.max_restarts)
        if status:
            return status
    return 0


def _print_settings(config: Config, configs: Sequence[Config], shape: str) -> None:
    """What a dry run says beside the file for sbatch, as comments."""
    print(f"# not submitted: {shape}; run folder {', '.join(str(each.folder) for each in configs)}")
    print("\n".join(f"#   {line}" for line in config.to_yaml().splitlines()))


def _write(config: Config, file: Path) -> None:
    """Write every setting where the ranks read it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, config.to_yaml())
    except OSError as error:
        raise AutodoError(f"run folder {file.parent}: cannot be written ({error.strerror}); set run.root") from error


if __name__ == "__main__":
    app()

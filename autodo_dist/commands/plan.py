"""`autodo plan`: what a run will need, without a GPU and before anything starts."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autodo_dist import engine_settings
from autodo_dist import plan as planning
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.files import write_json
from autodo_dist.load_config import load_config
from autodo_dist.plan import GIB, Cluster, Plan, Step, StepPlan, Workload

GIGA, TERA = 1e9, 1e12
WIDTH = 100  # characters, where the output goes to a file
MEMORY = 80.0  # GiB of a rank, where this machine has no GPU


@dataclass(frozen=True)
class Sizes:
    """Of the data set under the run's split: train and validation pictures, classes."""

    train: int
    validation: int
    classes: int


def plan(
    config: Annotated[Path, typer.Argument(help="yaml file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="laid over the file")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="machines; by default launch.nodes")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="by default launch.ranks_per_node")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="pictures packed as train, where data.root is not packed yet")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="classes, where data.root is not packed yet")] = None,
    memory: Annotated[
        float | None, typer.Option(help=f"GiB of a rank; by default this machine's GPU's, or else {MEMORY:g}")
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option(help="GiB of main memory of a node; by default this machine's")
    ] = None,
    link: Annotated[float, typer.Option(help="GB/s of a node to the others, one way")] = 50.0,
    local_link: Annotated[float, typer.Option(help="GB/s of a rank to the others of its node, one way")] = 200.0,
    tflops: Annotated[float, typer.Option(help="10¹² operations/s that a rank sustains on this network")] = 20.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all of it there")] = None,
) -> None:
    """Say what a run will need: memory, traffic, steps, times, and what to change where it does not fit.

    Needs no GPU. Times follow from the rates that you give; the defaults are round figures, not measurements. ImageNet:
    --samples 1281167 --classes 1000. Exits 1 where something does not fit.
    """
    settings = load_config(config, overrides or [])
    group = ranks_per_node or settings.launch.ranks_per_node
    host = host_memory if host_memory is not None else psutil.virtual_memory().total / GIB
    on_cpu = settings.train.device == "cpu"
    cluster = Cluster(
        nodes=nodes or settings.launch.nodes,
        ranks_per_node=group,
        memory=GIB * (memory if memory is not None else host / group if on_cpu else gpu_memory()),
        host_memory=GIB * host / group,
        link=GIGA * link,
        local_link=GIGA * local_link,
        flops=TERA * tflops,
    )
    sizes = sizes_of(settings, samples, classes)
    work = workload(settings, sizes, cluster)
    found = planning.plan(work, cluster)
    show(found, work, cluster, Console(width=None if sys.stdout.isatty() else WIDTH))
    if json_file is not None:
        write_json(json_file, {"workload": asdict(work), "cluster": asdict(cluster), "plan": asdict(found)})
    raise typer.Exit(int(bool(found.problems)))


def gpu_memory() -> float:
    """GiB of this machine's first GPU, or MEMORY."""
    import torch

    if not torch.cuda.is_available():
        return MEMORY
    total: int = torch.cuda.get_device_properties(0).total_memory
    return total / GIB


def sizes_of(config: Config, samples: int | None, classes: int | None) -> Sizes:
    """Of --samples and --classes where both are given, else of the packed data set.

    Without it, half of the classes are taken to hold half of the pictures. AutodoError where there is neither.
    """
    from autodo_dist.build_data import build_split, read_data
    from autodo_dist.urls import is_remote

    data = config.data
    if samples is not None and classes is not None:
        if data.split is not None:
            raise AutodoError("--samples: data.split says how many there are; leave out --samples and --classes")
        validation = round(samples * (data.validation_fraction or 0))
        kept = (classes // 2 + (classes - classes // 2) / data.imbalance_ratio) / classes
        return Sizes(round((samples - validation) * kept), validation or config.train.batch_size, classes)
    if not is_remote(data.root) and not (Path(data.root) / "manifest.json").is_file():
        raise AutodoError(
            f"data {data.root}: not packed yet; set data.root, or give --samples and --classes (ImageNet: "
            "1281167 and 1000)"
        )
    manifest = read_data(config)
    split = build_split(config, manifest)
    return Sizes(len(split.train), len(split.validation), len(manifest.classes))


def workload(config: Config, sizes: Sizes, cluster: Cluster) -> Workload:
    """The values that the plan takes. AutodoError where settings contradict each other."""
    import torch

    from autodo_dist import build, build_data
    from autodo_dist.footprint import measure
    from autodo_dist.optimizers import numbers_per_parameter

    learn, hyper, batch = config.learn, config.hyper, config.train.batch_size
    operations, dtype = build_data.operations(config), build.DTYPES[config.train.precision]
    foot = measure(
        config.model.name,
        sizes.classes,
        config.data.image_size,
        -(-batch // (cluster.ranks * config.train.accumulate)),
        dtype,
        build.build_pictures(config) if operations else None,
        factors=config.solver == "fisher",
    )
    with torch.device("meta"):
        head = torch.nn.Linear(foot.features, sizes.classes)
    solve = build.build_solve(config, head, cluster.ranks)
    folds = max(1, learn.clean_folds)  # of sizes that differ by at most one
    return Workload(
        train_samples=sizes.train,
        clean_samples=sizes.validation - -(-sizes.validation // folds),
        validation_batch=max(1, min(batch, sizes.validation // folds)),
        classes=sizes.classes,
        picture_bytes=3 * config.data.image_size**2 * 4,
        footprint=foot,
        batch_size=batch,
        accumulate=config.train.accumulate,
        epochs=config.train.epochs,
        steps_per_pass=config.train.steps_per_pass,
        bytes_per_number=dtype.itemsize,
        on_cpu=config.train.device == "cpu",
        averages=config.train.average is not None,
        optimizer_numbers=numbers_per_parameter(config.optim),
        **of_engine(config, cluster.ranks),
        learns=learn.anything,
        row_width=build.build_layout(config, sizes.classes).width,
        ensembles=learn.ensembling > 0,
        shared_width=2 * len(operations) if learn.augment == "shared" else 0,
        augment=learn.augment != "none",
        soft_label=learn.soft_label,
        normalize_weights=learn.normalize_weights,
        bytes_per_value=build.table_dtype(config).itemsize,
        table_on_host=hyper.table_device == "host",
        way=hyper.way,
        start_epoch=hyper.start_epoch,
        validation_every=hyper.validation_every,
        solver=solve.solver,
        space=solve.space,
        products=solve.cg_iterations if solve.solver == "cg" else solve.terms + solve.power_iterations,
        per_rank=hyper.curvature == "per_rank",
    )


def of_engine(config: Config, ranks: int) -> dict[str, int]:
    """Stage and sizes of DeepSpeed's, where it is the engine. AutodoError if its file contradicts settings."""
    if config.engine.name == "ddp":
        return {}
    zero = engine_settings.of_deepspeed(config, ranks)["zero_optimization"]
    keys = {"reduce_bucket": "reduce_bucket_size", "most_live": "stage3_max_live_parameters"}
    return {"stage": zero["stage"]} | {name: int(zero[key]) for name, key in keys.items() if key in zero}


def show(found: Plan, work: Workload, cluster: Cluster, console: Console) -> None:
    """Print the plan: memory, each kind of step, the epochs, and what does not fit."""
    local = -(-work.batch_size // cluster.ranks)
    console.print(
        f"{cluster.nodes} node(s) of {cluster.ranks_per_node} rank(s), {local} picture(s) a rank of a batch of "
        f"{work.batch_size}; {work.train_samples} train pictures, {work.classes} classes, "
        f"{work.footprint.parameters} parameters, rows of {work.row_width} values"
    )
    console.print(memory_table(found, cluster))
    for step in found.steps:
        console.print(step_table(step))
    console.print(epochs_line(found, work), soft_wrap=True)
    console.print(
        f"at {cluster.flops / TERA:g} TFLOPS a rank, {cluster.link / GIGA:g} GB/s a node, "
        f"{cluster.local_link / GIGA:g} GB/s a rank within it, {1e6 * cluster.latency:g} µs a message; "
        "without decoding and waiting for the slowest rank",
        soft_wrap=True,
    )
    for problem in found.problems:
        console.print(Text(f"does not fit: {problem}", "bold red"), soft_wrap=True)
    if not found.problems:
        console.print(Text("everything fits", "green"))


def memory_table(found: Plan, cluster: Cluster) -> Table:
    """Memory of the fullest rank by part."""
    rows = Table("part", "where", "needed", "MiB", title="memory of a rank", box=box.SIMPLE)
    for part in found.memory:
        if part.bytes:
            rows.add_row(part.part, part.place, part.needed, mib(part.bytes))
    rows.add_section()
    rows.add_row("most at once", "device", f"of {mib(cluster.memory)}", mib(found.device_bytes))
    if found.host_bytes:
        rows.add_row("most at once", "host", f"of {mib(cluster.host_memory)}", mib(found.host_bytes))
    return rows


def step_table(step: StepPlan) -> Table:
    """Compute and collectives of a step."""
    title = f"{step.step} step: {1e3 * step.seconds:.3f} ms"
    rows = Table("part", "collective", "calls", "sent a rank, bytes", "ms", "behind", title=title, box=box.SIMPLE)
    rows.add_row(
        f"compute, {step.flops / TERA:.3f}·10¹² operations", "", "", "", f"{1e3 * step.compute_seconds:.3f}", ""
    )
    for each in step.traffic:
        size, time = f"{each.sent:,.0f}", f"{1e3 * each.seconds:.3f}"
        rows.add_row(each.part, each.kind, f"{each.calls:g}", size, time, each.behind)
    sent = sum(each.sent for each in step.traffic)
    rows.add_section()
    rows.add_row("all collectives", "", "", f"{sent:,.0f}", f"{1e3 * sum(t.seconds for t in step.traffic):.3f}", "")
    return rows


def epochs_line(found: Plan, work: Workload) -> str:
    """Passes, steps and times of the epochs."""

    def epochs(passes: tuple[Step, ...], seconds: float) -> str:
        steps = " + ".join(str(planning.pass_steps(work, step)) for step in passes)
        return f"{' + '.join(passes)}: {steps} steps, {seconds / 60:.2f} min an epoch"

    if work.learns and work.start_epoch:
        text = f"up to epoch {work.start_epoch} {epochs(found.passes_before, found.epoch_seconds_before)}; then "
    else:
        text = "every epoch "
    text += epochs(found.passes_after, found.epoch_seconds_after)
    return f"{text}; all {work.epochs} epochs {found.run_seconds / 3600:.2f} h"


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.1f}"

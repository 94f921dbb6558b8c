"""What a run will need, said before it starts: memory of a rank, traffic and time of a step, passes of an epoch.

Arithmetic on plain values; what a network needs for a picture comes from `footprint.py`. B is the global batch, b =
⌈B/R⌉ the largest part of it that one of R ranks has, P the values of a row, C classes, D features; θ, the last layer
with its bias, is C × (D + 1). Bytes, seconds and floating-point operations (a product and a sum are two) unless a name
says otherwise. Not counted: decoding, libraries' workspaces, gaps between blocks of memory, and waiting for the slowest
rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autodo_dist.errors import AutodoError

GIB = 2**30
RESERVE = 0.05  # share of a rank's memory left for the CUDA context, communicators, workspaces and gaps
ID, COUNT, TOUCHED = (
    8,
    8,
    8,
)  # bytes of an int64: an id on its way, a length on its way, the step of a row's last update
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # of DistributedDataParallel
BATCHES_HELD = 3  # of a stream: the one in use, the next, whose ids it tells, and loader.DECODED_AHEAD = 1
BACKWARD = 2 / 3  # of a task step's operations, behind which gradients can be reduced

Kind = Literal["all_reduce", "all_gather", "all_to_all", "broadcast"]
Step = Literal["task", "hyper", "shared"]
Place = Literal["device", "host"]


@dataclass(frozen=True)
class Line:
    """What grows with the pictures of a rank: fixed + each · pictures."""

    fixed: float
    each: float

    def at(self, pictures: int) -> float:
        """Its value at that many pictures."""
        return self.fixed + self.each * pictures


@dataclass(frozen=True)
class Footprint:
    """What a network needs (footprint.measure). flops: of encoder and head for a picture, in one step; alive: the most
    bytes that are alive at once in such a step beside weights, gradients and pictures.
    """

    parameters: int
    buffers: tuple[int, ...]  # bytes of each
    features: int
    flops: dict[str, float]  # task, hyper, shared, validation
    alive: dict[str, Line]


@dataclass(frozen=True)
class Workload:
    """What is to be done, whatever the machine. The fields named as settings of `config.py` are those.

    clean_samples: pictures of the clean part that every epoch trains on, too (learn.clean_folds). accumulate: pieces
    of a rank's part of a batch. picture_bytes: one picture as the model takes it. bytes_per_number: of weights, 4 or 8.
    averages: whether a moving average of them is kept. optimizer_numbers: kept for each of them.
    stage: of ZeRO, None with DDP; reduce_bucket, most_live: DeepSpeed's elements of a bucket of gradients, and of
    parameters that stage 3 keeps gathered. row_width: P, 0 where no sample has a row. ensembles: whether a mean
    prediction of each sample is kept, too. shared_width: values of the row that all samples share. bytes_per_value: of
    the table, 2, 4 or 8. space, products: see solvers.Space; products with the curvature in a hyper step.
    """

    train_samples: int
    validation_batch: int
    classes: int
    picture_bytes: int
    footprint: Footprint
    batch_size: int
    epochs: int
    clean_samples: int = 0
    accumulate: int = 1
    steps_per_pass: int | None = None
    bytes_per_number: int = 4
    on_cpu: bool = False
    averages: bool = False
    optimizer_numbers: int = 1
    stage: int | None = None
    reduce_bucket: int = 500_000_000
    most_live: int = 1_000_000_000
    learns: bool = False
    row_width: int = 0
    ensembles: bool = False
    shared_width: int = 0
    augment: bool = False
    soft_label: bool = False
    normalize_weights: bool = False
    bytes_per_value: int = 4
    table_on_host: bool = False
    way: Literal["separate", "shared"] = "separate"
    start_epoch: int = 0
    validation_every: int = 1
    solver: Literal["identity", "neumann", "cg", "fisher"] = "identity"
    space: Literal["parameter", "sample"] = "parameter"
    products: int = 0
    per_rank: bool = False

    @property
    def theta_bytes(self) -> int:
        """Bytes of one direction in θ."""
        return self.classes * (self.footprint.features + 1) * self.bytes_per_number

    @property
    def kept_width(self) -> int:
        """Values of a sample that a rank keeps: of its row, second moments of these, its mean prediction."""
        return kept_width(self.row_width, self.classes * self.ensembles)

    @property
    def transition_bytes(self) -> int:
        """Bytes of the label transition matrix (ensembling.py), where the rows lie; 0 without mean predictions."""
        return self.classes**2 * max(4, self.bytes_per_value) * self.ensembles

    @property
    def average_bytes(self) -> int:
        """Bytes of the moving average of weights and buffers; 0 where there is none."""
        foot = self.footprint
        return (foot.parameters * self.bytes_per_number + sum(foot.buffers)) if self.averages else 0

    @property
    def gathered_width(self) -> int:
        """Values of a sample that sample space and `fisher` gather on every rank (direction.HeadBatch.join)."""
        features, classes = self.footprint.features + 1, self.classes
        if self.solver == "fisher":
            return features + classes
        return features + 1 + classes * (2 if self.soft_label else 1)

    @property
    def gathers(self) -> bool:
        """Whether a hyper step needs more of the samples than products in θ."""
        return self.learns and (
            self.solver == "fisher" or (self.solver in ("neumann", "cg") and self.space == "sample")
        )


@dataclass(frozen=True)
class Cluster:
    """The machine, as it is said to be. memory, host_memory: of one rank. link: of a node to the others, one way;
    local_link: of a rank to its node, one way; both bytes/s. latency: of a message that the next one waits for;
    overhead: of each further one that does not wait; both seconds. flops: that a rank sustains, 1/s. tree: whether
    short messages are summed along trees (NCCL) or round the ring (gloo). overlap: whether a rank computes while it
    sends.
    """

    nodes: int
    ranks_per_node: int
    memory: float
    host_memory: float
    link: float
    local_link: float
    flops: float
    latency: float = 10e-6
    overhead: float = 1e-6
    tree: bool = True
    overlap: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and not (math.isfinite(value) and value > 0):
                raise AutodoError(
                    f"plan: {name.replace('_', ' ')} = {value:g} is not above 0; give what the machine has"
                )

    @property
    def ranks(self) -> int:
        """R."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Collective:
    """One kind of call in a step: `calls` of them, each with a buffer of `bytes` on every rank (all_gather: a rank's
    own part). behind: what of the step it can hide behind.
    """

    part: str
    kind: Kind
    bytes: float
    calls: float = 1.0
    behind: Literal["", "backward", "step"] = ""


@dataclass(frozen=True)
class Traffic:
    """A collective with the bytes that leave a rank in a step, mean over ranks, and its time in a step."""

    part: str
    kind: Kind
    calls: float
    sent: float
    seconds: float
    behind: str


@dataclass(frozen=True)
class Memory:
    """One part of a rank's memory; needed: in every step, or in that one alone."""

    part: str
    bytes: float
    needed: str = "always"
    place: Place = "device"


@dataclass(frozen=True)
class StepPlan:
    """One step: operations of a rank, their time, every collective, and the whole time."""

    step: Step
    flops: float
    compute_seconds: float
    traffic: tuple[Traffic, ...]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """All that `autodo plan` says. passes: by name those of an epoch before and from start_epoch on."""

    memory: tuple[Memory, ...]
    device_bytes: float
    host_bytes: float
    steps: tuple[StepPlan, ...]
    steps_per_pass: int
    passes_before: tuple[Step, ...]
    passes_after: tuple[Step, ...]
    epoch_seconds_before: float
    epoch_seconds_after: float
    run_seconds: float
    problems: tuple[str, ...]


def plan(work: Workload, cluster: Cluster) -> Plan:
    """The whole plan. AutodoError where there is less than a picture for a rank, or a batch."""
    if work.batch_size < cluster.ranks:
        raise AutodoError(
            f"train.batch_size = {work.batch_size}: less than one picture for each of {cluster.ranks} ranks; raise it, "
            "or use fewer nodes"
        )
    if work.train_samples < work.batch_size:
        raise AutodoError(
            f"train.batch_size = {work.batch_size}: more than {work.train_samples} train pictures; lower it"
        )
    before: tuple[Step, ...] = ("task",)
    after: tuple[Step, ...] = before if not work.learns else ("shared",) if work.way == "shared" else ("hyper", "task")
    steps = {step: step_plan(work, cluster, step) for step in dict.fromkeys([*before, *after])}
    seconds = [sum(pass_steps(work, step) * steps[step].seconds for step in passes) for passes in (before, after)]
    first = min(work.start_epoch, work.epochs) if work.learns else work.epochs
    parts = memory(work, cluster.ranks)
    return Plan(
        memory=parts,
        device_bytes=peak(parts, "device"),
        host_bytes=peak(parts, "host"),
        steps=tuple(steps.values()),
        steps_per_pass=pass_steps(work, "task"),
        passes_before=before,
        passes_after=after,
        epoch_seconds_before=seconds[0],
        epoch_seconds_after=seconds[1],
        run_seconds=first * seconds[0] + (work.epochs - first) * seconds[1],
        problems=problems(work, cluster),
    )


def pass_steps(work: Workload, step: Step) -> int:
    """The steps of a pass; one of task steps has clean pictures, too."""
    samples = work.train_samples + (0 if step == "hyper" else work.clean_samples)
    steps = samples // work.batch_size
    return steps if work.steps_per_pass is None else min(steps, work.steps_per_pass)


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(work: Workload, ranks: int) -> tuple[Memory, ...]:
    """Every part of the fullest rank's memory. A batch's rows are held about eight times over: as sent, as received and
    in order, as gradients, and in what RMSprop computes of them.
    """
    local, foot = -(-work.batch_size // ranks), work.footprint
    piece = -(-local // work.accumulate)
    parts = [
        *model_memory(work, ranks),
        *save_memory(work, ranks),
        Memory(f"pictures of {BATCHES_HELD} batches", BATCHES_HELD * local * work.picture_bytes),
        Memory("activations of the task step", foot.alive["task"].at(piece), "task"),
    ]
    if not work.learns:
        return tuple(parts)
    place: Place = "host" if work.table_on_host else "device"
    judging = -(-work.validation_batch // ranks)
    validation = -(-judging // work.accumulate)
    step: Step = "shared" if work.way == "shared" else "hyper"
    rows = -(-work.train_samples // ranks)
    return (
        *parts,
        Memory(f"pictures of {BATCHES_HELD} validation batches", BATCHES_HELD * judging * work.picture_bytes),
        Memory("rows: values", rows * work.row_width * work.bytes_per_value, place=place),
        Memory("rows: second moments", rows * work.row_width * work.bytes_per_value, place=place),
        Memory("rows: mean predictions", rows * work.classes * work.ensembles * work.bytes_per_value, place=place),
        Memory("label transition matrix", work.transition_bytes, place=place),
        Memory("rows: last updates", rows * TOUCHED, place=place),
        Memory("rows of a batch", 8 * local * work.row_width * max(4, work.bytes_per_value)),
        Memory("validation gradient", work.theta_bytes),
        Memory(f"activations of the {step} step", foot.alive[step].at(piece), step),
        Memory("last layer and solver", solver_bytes(work, ranks), step),
        Memory("forward of the validation batch", foot.alive["validation"].at(validation), "validation"),
    )


def model_memory(work: Workload, ranks: int) -> list[Memory]:
    """Weights, gradients and optimizer state, by engine and ZeRO stage.

    DDP keeps gradients twice: in .grad and in its buckets. Stages 1 to 3 keep a flat copy of a rank's part, which the
    optimizer changes, in float32 as well; stage 3 its bucket and part of the gradients from one step to the next, and
    parameters once gathered up to the backward, as far as most_live goes.
    """
    count, size, stage = work.footprint.parameters, work.bytes_per_number, work.stage or 0
    whole, part = count * size, -(-count // ranks) * size
    bucket = min(work.reduce_bucket, count) * size
    buckets = ("gradient buckets of DDP", whole) if work.stage is None else ("gradient bucket of DeepSpeed", bucket)
    return [
        Memory("weights and buffers", (part if stage == 3 else whole) + sum(work.footprint.buffers)),
        Memory("flat copy of a part of the weights", part if stage else 0),
        Memory("gathered weights", min(work.most_live, count) * size if stage == 3 else 0),
        Memory("gradients", part if stage >= 2 else whole),
        Memory(*buckets),
        Memory("optimizer state", (part if stage else whole) * work.optimizer_numbers),
        Memory("average of the weights", work.average_bytes),
    ]


def save_memory(work: Workload, ranks: int) -> list[Memory]:
    """What a save needs beside training: a copy of a rank's state in main memory, from the first save on.

    Stages 1 to 3 put weights and optimizer state together first, on the device.
    """
    whole = work.footprint.parameters * work.bytes_per_number * (1 + work.optimizer_numbers)
    staged = whole + sum(work.footprint.buffers) + work.average_bytes
    if work.learns:
        staged += table_bytes(work.train_samples, work.kept_width, ranks, work.bytes_per_value)
        staged += work.transition_bytes + work.theta_bytes
    return [
        Memory("staging buffer of saves", staged, place="device" if work.on_cpu else "host"),
        Memory("whole copies for a save", whole if work.stage else 0, "save"),
    ]


def solver_bytes(work: Workload, ranks: int) -> float:
    """About: five B × C arrays and four vectors of the solver's space; gathered samples and Gram matrices beside."""
    if not work.gathers:
        local = -(-work.batch_size // ranks)
        return 5 * local * work.classes * work.bytes_per_number + 4 * work.theta_bytes
    size = -(-work.batch_size // ranks) if work.per_rank else work.batch_size
    gathered = 2 * size * work.gathered_width * work.bytes_per_number  # joined, and the parts that it is joined from
    gram = size**2 * (3 * 8 if work.solver == "fisher" else work.bytes_per_number)  # fisher: float64, and its factor
    vectors = (1 if work.solver == "fisher" else 4 * 2) * size * work.classes * work.bytes_per_number
    return gathered + gram + vectors + 4 * work.theta_bytes


def peak(parts: Sequence[Memory], place: Place) -> float:
    """The most that is needed at once: what always is, and the fullest step."""
    here = [part for part in parts if part.place == place]
    times = {part.needed for part in here} | {"always"}
    return max(sum(part.bytes for part in here if part.needed in ("always", time)) for time in times)


def kept_width(row_width: int, ensembled: int) -> int:
    """Values kept of a sample: its row and their second moments, and a mean prediction of `ensembled` classes."""
    return 2 * row_width + ensembled


def table_bytes(train_samples: int, kept: int, ranks: int, bytes_per_value: int) -> int:
    """Bytes of the fullest rank's part of the table: so many values for each of ⌈N/R⌉ rows, and the last updates."""
    return -(-train_samples // ranks) * (kept * bytes_per_value + TOUCHED)


def check_memory(
    *,
    train_samples: int,
    width: int,
    ranks: int,
    bytes_per_value: int,
    memory: float,
    table_on_host: bool = False,
    ensembled: int = 0,
) -> None:
    """Refuse a table that certainly does not fit into `memory`, the bytes of one rank where the table lies: the GPU's,
    or main memory divided by the ranks of a node. width: P. ensembled: classes of the mean predictions, 0 without them.

    AutodoError with the setting to change. Cheap, and silent where only estimates say that it will not fit.
    """
    kept = kept_width(width, ensembled)
    table = table_bytes(train_samples, kept, ranks, bytes_per_value)
    if table <= memory:
        return
    cures = [f"more ranks ({math.ceil(ranks * table / max(memory, 1))} or more)"]
    cures += ["hyper.table_dtype=bfloat16"] if bytes_per_value > 2 else []
    cures += [] if table_on_host else ["hyper.table_device=host"]
    cures += ["learn.ensembling=0"] if ensembled else []
    cures += ["learn.soft_label=false" + " learn.ensembling=0" * bool(ensembled)]
    raise AutodoError(
        f"row table: {table / GIB:.2f} GiB a rank ({train_samples} samples over {ranks} ranks, {kept} values "
        f"of each) does not fit into {memory / GIB:.2f} GiB; try " + ", or ".join(cures)
    )


def problems(work: Workload, cluster: Cluster) -> tuple[str, ...]:
    """What does not fit, its largest part, and the single settings with which it would by this same count."""
    parts, found = memory(work, cluster.ranks), []
    places: tuple[tuple[Place, float], ...] = (("device", cluster.memory), ("host", cluster.host_memory))
    for place, have in places:
        need = peak(parts, place)
        if need > have * (1 - RESERVE):
            largest = max((part for part in parts if part.place == place), key=lambda part: part.bytes)
            enough = cures(work, cluster)
            found.append(
                f"{place} memory: {need / GIB:.2f} GiB a rank of {have / GIB:.2f} GiB, of which {100 * RESERVE:.0f} % "
                f"stay free; largest part: {largest.part}, {largest.bytes / GIB:.2f} GiB; "
                + (f"fits with {' or '.join(enough)}" if enough else NO_SINGLE)
            )
    return tuple(found)


NO_SINGLE = "no single setting makes it fit: combine more nodes, more train.accumulate and hyper.table_dtype=bfloat16"


def cures(work: Workload, cluster: Cluster) -> list[str]:
    """The single changes after which everything fits."""
    halves = [work.batch_size >> k for k in range(1, 20)]
    pieces = [k for k in (work.accumulate << k for k in range(1, 20)) if work.batch_size % (k * cluster.ranks) == 0]
    groups: list[list[tuple[str, Workload, Cluster]]] = [
        [(f"train.accumulate={k}", replace(work, accumulate=k), cluster) for k in pieces],
        [(f"train.batch_size={size}", replace(work, batch_size=size), cluster) for size in halves],
        [(f"--nodes {cluster.nodes << k}", work, replace(cluster, nodes=cluster.nodes << k)) for k in range(1, 9)],
    ]
    if work.row_width:
        groups.append([("hyper.table_dtype=bfloat16", replace(work, bytes_per_value=2), cluster)])
        groups.append([("hyper.table_device=host", replace(work, table_on_host=True), cluster)])
    if work.ensembles:
        groups.append([("learn.ensembling=0", replace(work, ensembles=False), cluster)])
    if work.soft_label:
        narrow = replace(work, row_width=work.row_width - work.classes, soft_label=False, ensembles=False)
        groups.append([("learn.soft_label=false" + " learn.ensembling=0" * work.ensembles, narrow, cluster)])
    if work.gathers and not work.per_rank:
        spread = replace(work, solver="cg" if work.solver == "fisher" else work.solver, space="parameter")
        groups.append([("hyper.most_gathered=1", spread, cluster)])
    enough = [[label for label, *_ in filter(lambda case: fits(case[1], case[2]), group)] for group in groups]
    return [labels[0] for labels in enough if labels]


def fits(work: Workload, cluster: Cluster) -> bool:
    """Whether every rank has a picture and the memory it needs."""
    parts, share = memory(work, cluster.ranks), 1 - RESERVE
    enough = peak(parts, "device") <= share * cluster.memory and peak(parts, "host") <= share * cluster.host_memory
    return enough and work.batch_size >= cluster.ranks


# Traffic --------------------------------------------------------------------------------------------------------------


def collectives(work: Workload, ranks: int, step: Step) -> list[Collective]:
    """Every collective of a step; renewals of the validation gradient spread over the steps that share one."""
    local = work.batch_size / ranks
    found = fetch_rows(work, local, ranks, step) if work.learns else []
    if step != "hyper":
        found += gradients(work)
    if step != "task":
        found += [*curvature(work, local), *validation(work, step), *apply_rows(work, local, ranks, step)]
    if work.ensembles and step != "hyper":
        found += travel(work, "predictions", work.classes, max(4, work.bytes_per_value), local, ranks, step)
    if work.learns and work.normalize_weights:
        size = work.bytes_per_number
        found += [Collective("mean weight", "all_reduce", size, 2.0 if step == "shared" else 1.0)]
        found += [Collective("derivative of the mean weight", "all_reduce", 2 * size)] if step != "task" else []
    return found


def gradients(work: Workload) -> list[Collective]:
    """DDP's all-reduce of all gradients, in buckets behind the backward; BatchNorm's buffers before the forward."""
    size = work.footprint.parameters * work.bytes_per_number
    buckets = 1 + max(0, math.ceil((size - FIRST_BUCKET) / BUCKET))
    found = [Collective("gradients", "all_reduce", size / buckets, buckets, "backward")]
    if work.footprint.buffers:  # DDP sends them together
        found.append(Collective("BatchNorm buffers", "broadcast", sum(work.footprint.buffers)))
    return found


def fetch_rows(work: Workload, local: float, ranks: int, step: Step) -> list[Collective]:
    """8·R + b·(8 + P·bytes_per_value) bytes on every rank, of which (R − 1)/R leave it: ids there, values back."""
    if not work.row_width:
        return []
    return travel(work, "rows fetched", work.row_width, work.bytes_per_value, local, ranks, step)


def apply_rows(work: Workload, local: float, ranks: int, step: Step) -> list[Collective]:
    """Ids and gradients to their owners. A bfloat16 table is computed in float32, and its gradients travel so."""
    found = [Collective("count of bad rows", "all_reduce", COUNT, behind="step")]
    if work.row_width:
        found += travel(work, "row gradients", work.row_width, max(4, work.bytes_per_value), local, ranks, step)
    if work.shared_width:
        size, share = work.shared_width * work.bytes_per_number, 1 / work.validation_every
        found.append(Collective("shared row", "all_reduce", size, share))
    return found


def travel(
    work: Workload, part: str, width: int, bytes_per_value: int, local: float, ranks: int, step: Step
) -> list[Collective]:
    """One way of so many values for each sample of a batch: lengths, ids, values. They go on a thread beside the step
    (parallel/row_queue.py), for which the next step has to wait where it stepped a row shared by all samples.
    """
    waiting = 1 / work.validation_every if work.shared_width and step != "task" else 0.0
    shares: tuple[tuple[float, Literal["", "step"]], ...] = ((waiting, ""), (1 - waiting, "step"))
    return [
        Collective(name, "all_to_all", size, share, behind)
        for share, behind in shares
        for name, size in (
            (f"{part}: lengths", COUNT * ranks),
            (f"{part}: ids", ID * local),
            (part, width * bytes_per_value * local),
        )
        if share
    ]


def curvature(work: Workload, local: float) -> list[Collective]:
    """What H of the global batch takes: a sum of C × (D + 1) a product, or the samples gathered once."""
    if work.per_rank or work.solver == "identity":
        return []
    if work.gathers:
        return [
            Collective("gathered samples: lengths", "all_gather", COUNT),
            Collective(
                "gathered samples", "all_gather", math.ceil(local) * work.gathered_width * work.bytes_per_number
            ),
        ]
    return [Collective("curvature", "all_reduce", work.theta_bytes, work.products)]


def validation(work: Workload, step: Step) -> list[Collective]:
    """The sum of the validation gradient; in the shared way each BatchNorm buffer before it."""
    share = 1 / work.validation_every
    found = [Collective("validation gradient", "all_reduce", work.theta_bytes, share)]
    if step == "shared" and work.footprint.buffers:
        count, size = len(work.footprint.buffers), sum(work.footprint.buffers)
        found.append(Collective("BatchNorm buffers", "broadcast", size / count, count * share))
    return found


def sent_bytes(call: Collective, ranks: int) -> float:
    """Bytes that leave a rank in a step, mean over ranks.

    Ring all-reduce: 2(R−1)/R of the buffer. All-to-all: (R−1)/R. All-gather: the own part R − 1 times. Broadcast: every
    rank but one gets it from one of the others.
    """
    others = (ranks - 1) / ranks
    share = {"all_reduce": 2 * others, "all_to_all": others, "all_gather": ranks - 1.0, "broadcast": others}[call.kind]
    return share * call.bytes * call.calls


def seconds(call: Collective, cluster: Cluster) -> float:
    """Time of a collective in a step: bytes over links, and messages that wait for one another.

    Within a node of G ranks and then over N nodes, whose link all ranks of a node share: an all-reduce takes
    2(G−1)/G·bytes/local_link + 2(N−1)/N·bytes/link, an all-gather (R−1)·bytes/local_link + G(N−1)·bytes/link. An
    all-to-all uses both at once: max{(G−1)/R·bytes/local_link, G(N−1)/N·bytes/link}.
    """
    nodes, group, ranks, size = cluster.nodes, cluster.ranks_per_node, cluster.ranks, call.bytes
    if ranks == 1:
        return 0.0
    rounds = math.ceil(math.log2(group)) + math.ceil(math.log2(nodes)) if cluster.tree else ranks - 1
    waits = (
        cluster.latency
        * {"all_reduce": 2 * rounds, "all_gather": rounds, "broadcast": rounds, "all_to_all": 1}[call.kind]
    )
    if call.kind == "all_reduce":
        moving = 2 * (group - 1) / group * size / cluster.local_link + 2 * (nodes - 1) / nodes * size / cluster.link
    elif call.kind == "all_gather":
        moving = (ranks - 1) * size / cluster.local_link + group * (nodes - 1) * size / cluster.link
    elif call.kind == "broadcast":
        moving = size * max((group > 1) / cluster.local_link, (nodes > 1) / cluster.link)
    else:
        waits += (ranks - 1) * cluster.overhead
        between = group * (nodes - 1) / nodes * size / cluster.link
        moving = max((group - 1) / ranks * size / cluster.local_link, between)
    return call.calls * (waits + moving)


# Time -----------------------------------------------------------------------------------------------------------------


def step_plan(work: Workload, cluster: Cluster, step: Step) -> StepPlan:
    """One step: compute, then what of the traffic does not hide behind it.

    Gradients hide behind the backward and rows behind the whole step, as far as these last; the rest adds up.
    """
    flops = step_flops(work, cluster.ranks, step)
    compute = flops / cluster.flops
    calls = collectives(work, cluster.ranks, step)
    traffic = tuple(
        Traffic(call.part, call.kind, call.calls, sent_bytes(call, cluster.ranks), seconds(call, cluster), call.behind)
        for call in calls
    )
    return StepPlan(step, flops, compute, traffic, step_seconds(compute, traffic, cluster.overlap))


def step_seconds(compute: float, traffic: Sequence[Traffic], overlap: bool) -> float:
    """Time of a step from the time of its compute and of each collective."""
    by = {behind: sum(each.seconds for each in traffic if each.behind == behind) for behind in ("", "backward", "step")}
    if not overlap:
        return compute + sum(by.values())
    own = compute + max(0.0, by["backward"] - BACKWARD * compute) + by[""]
    return max(own, by["step"])


def step_flops(work: Workload, ranks: int, step: Step) -> float:
    """Operations of the fullest rank in a step, those of a renewal spread over the steps that share one."""
    local, flops, renewing = -(-work.batch_size // ranks), work.footprint.flops, 1 / work.validation_every
    learning = renewing if work.shared_width else 1.0  # share of the steps that learn λ^A
    total = local * (learning * flops[step] + (1 - learning) * flops["validation" if step == "hyper" else "task"])
    if step != "task":
        validation = -(-work.validation_batch // ranks)
        total += renewing * validation * flops["validation"] + solver_flops(work, ranks)
        if work.accumulate > 1 and work.augment and (step == "hyper" or work.solver != "fisher"):
            total += learning * local * flops["validation"]  # H is the whole batch's: its features come first
    return total


def solver_flops(work: Workload, ranks: int) -> float:
    """Products of the solver (see solvers.cheaper_space), and about six products with C × D for the row gradients."""
    local, classes, features = -(-work.batch_size // ranks), work.classes, work.footprint.features + 1
    size = local if work.per_rank else work.batch_size
    total = 6.0 * 2 * local * classes * features
    if work.solver == "fisher":
        return total + 2.0 * size**2 * (classes + features) + size**3 / 3 + 4.0 * size * classes * features
    if work.gathers:
        return (
            total + work.products * 2.0 * size**2 * classes + 2.0 * size**2 * features + 4.0 * size * classes * features
        )
    return total + work.products * 4.0 * local * classes * features

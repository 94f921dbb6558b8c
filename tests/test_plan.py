"""The plan against what is real: bytes that collectives send, sizes of tensors, a real model, memory that is alive."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from test_engines import fresh, needs_deepspeed, small, with_stage
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from typer.testing import CliRunner

from autodo_dist import plan as planning
from autodo_dist.build import build, build_pictures, build_solve
from autodo_dist.build_data import build_loaders, build_split
from autodo_dist.cli import app
from autodo_dist.commands.plan import Sizes, workload
from autodo_dist.config import Config
from autodo_dist.data.manifest import read_manifest
from autodo_dist.data.split import Split
from autodo_dist.errors import AutodoError
from autodo_dist.footprint import Alive, measure
from autodo_dist.load_config import check_config
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.models import Classifier, build_model
from autodo_dist.parallel import checkpoint, comm
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.row_table import RowTable
from autodo_dist.plan import GIB, Cluster, Collective, Footprint, Line, Workload, check_memory, plan
from autodo_dist.progress import tensors
from autodo_dist.steps import hyper_step, renew_validation, shared_step, task_step
from benchmarks.hyper_step import EVERYTHING, LR, Case, make_batch, make_parts
from benchmarks.scaling import part_of

CPU = torch.device("cpu")
STEPS = ("task", "hyper", "shared", "validation")
FOOT = Footprint(1000, (8, 4), 7, dict.fromkeys(STEPS, 1e6), dict.fromkeys(STEPS, Line(100.0, 10.0)))
CLASSES = 10
WORK = Workload(900, 30, CLASSES, 300, FOOT, batch_size=60, epochs=10, learns=True, row_width=25, soft_label=True)
CLUSTER = Cluster(2, 4, GIB, GIB, link=1e9, local_link=1e10, flops=1e12)


# Traffic --------------------------------------------------------------------------------------------------------------


class Counting:
    """Puts itself in the place of torch.distributed's calls, and adds up the bytes of each kind: those of the buffer,
    and those that leave this rank in an all-to-all.
    """

    def __init__(self) -> None:
        self.calls, self.bytes, self.left = Counter[str](), Counter[str](), 0
        self._real = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather")}

    def __enter__(self) -> Counting:
        dist.all_reduce = self._all_reduce
        dist.all_to_all_single = self._all_to_all
        dist.all_gather = self._all_gather
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self._real.items():
            setattr(dist, name, function)

    def _count(self, name: str, tensor: torch.Tensor) -> None:
        self.calls[name] += 1
        self.bytes[name] += tensor.nbytes

    def _all_reduce(self, tensor: torch.Tensor, **words: Any) -> Any:
        self._count("all_reduce", tensor)
        return self._real["all_reduce"](tensor, **words)

    def _all_gather(self, parts: list[torch.Tensor], tensor: torch.Tensor, **words: Any) -> Any:
        self._count("all_gather", tensor)
        return self._real["all_gather"](parts, tensor, **words)

    def _all_to_all(
        self, output: torch.Tensor, tensor: torch.Tensor, received: list[int], sent: list[int], **words: Any
    ) -> Any:
        self._count("all_to_all", tensor)
        self.left += tensor.nbytes - sent[dist.get_rank()] * (tensor.nbytes // max(1, len(tensor)))
        return self._real["all_to_all_single"](output, tensor, received, sent, **words)


def count_rows(rows: int, width: int, local: int, table_dtype: torch.dtype) -> tuple[int, int, int]:
    """A fetch and an update of `local` ids on each rank, as many from every owner."""
    with comm.process_group(comm.place(), CPU) as ranks, Counting() as counted:
        table = RowTable(
            np.arange(rows, dtype=np.int64),
            lambda ids: torch.zeros(len(ids), width, dtype=table_dtype),
            ranks,
            Rmsprop(),
        )
        each = local // ranks.ranks
        ids = torch.cat([torch.arange(each) + owner * table.block + ranks.rank * each for owner in range(ranks.ranks)])
        values = table.fetch(ids)
        table.apply_grads(ids, torch.ones_like(values), lr=0.1, step=1)
        table.deliver(ids, torch.ones(len(ids), CLASSES))
        held = table.value_nP.nbytes + table.second_nP.nbytes + table.touched_n.nbytes
        return counted.bytes["all_to_all"], counted.left, held


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (4, torch.float32), (2, torch.bfloat16)])
def test_rows_send_and_hold_what_the_plan_says(pool: RankPool, ranks: int, dtype: torch.dtype) -> None:
    rows, width, local = 101, 13, 12
    work = replace(
        WORK,
        train_samples=rows,
        row_width=width,
        ensembles=True,
        batch_size=local * ranks,
        bytes_per_value=dtype.itemsize,
    )
    calls = [call for call in planning.collectives(work, ranks, "shared") if call.kind == "all_to_all"]
    found = pool.run(ranks, count_rows, rows, width, local, dtype)
    for sent, left, _ in found:
        assert sent == sum(call.bytes for call in calls)
        assert left == pytest.approx(sum(planning.sent_bytes(call, ranks) for call in calls))
    assert max(held for *_, held in found) == planning.table_bytes(rows, 2 * width, ranks, dtype.itemsize)
    parts = {part.part: part.bytes for part in planning.memory(work, ranks)}
    assert parts["rows: mean predictions"] == -(-rows // ranks) * CLASSES * dtype.itemsize
    table = sum(size for part, size in parts.items() if part.startswith("rows: "))
    assert table == planning.table_bytes(rows, work.kept_width, ranks, dtype.itemsize)


def test_rows_are_within_the_promise() -> None:
    """2·b·P·4 bytes and 16 an id; lengths beside them, 16·R bytes, are less than one row up to 256 ranks."""
    local, width, ranks = 32, 1015, 256
    calls = travelling(replace(WORK, row_width=width), local, ranks)
    lengths = [call for call in calls if call.part.endswith("lengths")]
    assert sum(call.bytes for call in lengths) == 16 * ranks
    sent = sum(planning.sent_bytes(call, ranks) for call in calls)
    assert sent <= 2 * local * width * 4 + 16 * local + 16 * ranks
    assert sum(planning.sent_bytes(call, ranks) for call in calls if call not in lengths) <= local * (8 * width + 16)


def travelling(work: Workload, local: float, ranks: int) -> list[Collective]:
    """The all-to-alls of one fetch and one update."""
    both = [*planning.fetch_rows(work, local, ranks, "hyper"), *planning.apply_rows(work, local, ranks, "hyper")]
    return [call for call in both if call.kind == "all_to_all"]


def settings(batch: int, learn: dict[str, Any], hyper: dict[str, Any], model: str = "convnet", **train: Any) -> Config:
    tree = {
        "data": {"root": ".", "image_size": 16},
        "model": {"name": model},
        "train": {"batch_size": batch} | train,
        "learn": learn,
        "hyper": hyper,
    }
    return check_config(tree, "of the test")


def count_step(learn: dict[str, Any], hyper: dict[str, Any], way: str) -> tuple[Counter[str], Counter[str], int]:
    """The calls and bytes of one hyper and one task step, or one shared step, and bytes of DDP's buckets."""
    with comm.process_group(comm.place(), CPU) as ranks:
        batch, classes = 6 * ranks.ranks, 4
        label_N = np.zeros(4096, np.int32)
        ids = np.arange(4096, dtype=np.int64)
        config = settings(batch, learn, hyper)
        parts = make_parts(config, Split(ids, ids[:0], ids[:0], label_N), classes, ranks)
        normal = replace(parts.objective, normalise=config.learn.normalize_weights)
        parts = replace(parts, objective=normal)
        train, validation = (part_of(make_batch(Case("", classes, 16, batch), label_N, seed), ranks) for seed in (1, 2))
        buckets = []

        def hook(_: None, bucket: Any) -> Any:
            buckets.append(bucket.buffer().nbytes)
            done: Any = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        # DDP reads the annotations, which are strings in this file.
        hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}
        parts.engine._parallel.register_comm_hook(None, hook)
        assert parts.hyper is not None
        with Counting() as counted:
            parts.model.train(way == "shared")
            renew_validation(parts, parts.hyper, validation, ranks)
            if way == "shared":
                shared_step(parts, parts.hyper, train, 0, LR, 1, ranks)
            else:
                hyper_step(parts, parts.hyper, train, LR, 1, ranks)
                parts.model.train()
                task_step(parts, train, 0, ranks)
            parts.hyper.parameters.facts()  # waits until the rows are where they belong; one all-reduce of two float64
        return counted.calls, counted.bytes, sum(buckets)


STEPS_COUNTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (EVERYTHING, {"way": "separate", "most_gathered": 1, "terms": 3, "power_iterations": 2}),
    (EVERYTHING, {"way": "shared", "solver": "fisher"}),
    ({"augment": "shared", "weight": True, "normalize_weights": True}, {"way": "separate", "solver": "identity"}),
    ({"augment": "shared", "weight": True, "normalize_weights": True}, {"way": "shared", "curvature": "per_rank"}),
    ({"weight": True, "soft_label": True}, {"way": "shared", "neumann_step": 0.01, "terms": 30}),
]


@pytest.mark.parametrize(("learn", "hyper"), STEPS_COUNTED)
def test_steps_send_what_the_plan_says(pool: RankPool, learn: dict[str, Any], hyper: dict[str, Any]) -> None:
    """Every call of a hyper and a task step, and every byte in its buffer."""
    work = workload(settings(12, learn, hyper), Sizes(4096, 100, 4), replace(CLUSTER, nodes=1, ranks_per_node=2))
    steps = ("shared",) if work.way == "shared" else ("hyper", "task")
    calls = [call for step in steps for call in planning.collectives(work, 2, step)]
    gradients = [call for call in calls if call.part == "gradients"]
    found = pool.run(2, count_step, learn, hyper, work.way)
    assert all(buckets == sum(call.bytes * call.calls for call in gradients) for *_, buckets in found)
    for kind in ("all_reduce", "all_to_all", "all_gather"):
        of_kind = [call for call in calls if call.kind == kind and call.part != "gradients"]
        of_facts = (1, 16) if kind == "all_reduce" else (0, 0)
        for count, *_ in found:
            assert count[kind] - of_facts[0] == sum(call.calls for call in of_kind), kind
        # What an owner answers depends on the ids; over all ranks it is what was asked.
        mean = sum(size[kind] for _, size, _ in found) / len(found)
        assert mean - of_facts[1] == pytest.approx(sum(call.bytes * call.calls for call in of_kind)), kind


def test_what_leaves_a_rank() -> None:
    """A ring of 4 passes 3 quarters of the buffer twice; 3 of 4 pieces of an all-to-all are for others."""
    expected = {"all_reduce": 2 * 3 * 25, "all_to_all": 75, "all_gather": 300, "broadcast": 75}
    for kind, size in expected.items():
        assert planning.sent_bytes(Collective("", kind, 100, 2), 4) == 2 * size  # type: ignore[arg-type]
        assert planning.sent_bytes(Collective("", kind, 100), 1) == 0  # type: ignore[arg-type]


def test_times_of_collectives() -> None:
    """On one node those of a ring; over nodes the link of a node is shared by its ranks."""
    one = Cluster(1, 4, 1, 1, link=1.0, local_link=50.0, flops=1, latency=1e-3, overhead=1e-4, tree=False)
    assert planning.seconds(Collective("", "all_reduce", 100), one) == pytest.approx(2 * 3 / 4 * 100 / 50 + 6e-3)
    assert planning.seconds(Collective("", "all_to_all", 100), one) == pytest.approx(3 / 4 * 100 / 50 + 1e-3 + 3e-4)
    assert planning.seconds(Collective("", "all_gather", 100), one) == pytest.approx(3 * 100 / 50 + 3e-3)
    two = replace(one, nodes=2, tree=True)
    assert planning.seconds(Collective("", "all_reduce", 100), two) == pytest.approx(3 + 100 + 2 * 3e-3)
    assert planning.seconds(Collective("", "all_to_all", 100), two) == pytest.approx(4 / 2 * 100 + 1e-3 + 7e-4)
    assert planning.seconds(Collective("", "broadcast", 100), two) == pytest.approx(100 + 3e-3)
    assert planning.seconds(Collective("", "all_reduce", 100), replace(one, ranks_per_node=1)) == 0


def test_what_hides_behind_the_step() -> None:
    def each(seconds: float, behind: str) -> planning.Traffic:
        return planning.Traffic("", "all_reduce", 1, 0, seconds, behind)

    traffic = [each(1.0, ""), each(3.0, "backward"), each(2.0, "step")]
    assert planning.step_seconds(3.0, traffic, overlap=False) == 9
    assert planning.step_seconds(3.0, traffic, overlap=True) == pytest.approx(3 + 1 + 1)
    assert planning.step_seconds(3.0, [each(7.0, "step")], overlap=True) == 7


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes", "side"), [("convnet", 7, 32), ("resnet18", 10, 64)])
def test_the_footprint_is_the_real_models(name: str, classes: int, side: int) -> None:
    real = build_model(name, classes, 0)
    found = measure(name, classes, side, 4, torch.float32, None, False)
    assert found.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert found.buffers == tuple(buffer.nbytes for buffer in real.buffers())
    assert found.features == real.head.in_features
    # The backends keep a few statistics more or less.
    assert found.alive["task"].at(4) == pytest.approx(peak(real, 4, side), rel=0.01)
    assert found.flops["validation"] < found.flops["task"] < 3 * found.flops["validation"]


def peak(model: Classifier, pictures: int, side: int) -> int:
    """The most that is alive in forward and backward on real tensors."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images = torch.randn(pictures, 3, side, side)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with Alive([images, *model.parameters(), *model.buffers(), *grads]) as alive:
        model(images)[1].sum().backward()
    return alive.peak


def test_activations_are_what_autograd_keeps() -> None:
    """Counted by its hooks, each storage once; at many pictures little else is alive at the peak."""
    model, images, saved = build_model("convnet", 7, 0), torch.randn(64, 3, 32, 32), {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (images, *model.parameters())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)  # the graph must live, or storages share addresses
    found = measure("convnet", 7, 32, 64, torch.float32, None, False).alive["task"].at(64)
    assert len(output) == 2
    assert sum(saved.values()) <= found <= 1.25 * sum(saved.values())


def test_alive_counts_each_storage_while_it_lives() -> None:
    known = torch.zeros(1000)
    with Alive([known]) as alive:
        one = torch.ones(100) + 1  # the ones live until the sum is there
        assert (alive.now, alive.peak) == (400, 800)
        view = one[:50]
        known.add_(1)
        del one
        assert alive.now == 400
        del view
        assert (alive.now, alive.peak) == (0, 800)


def test_activations_grow_with_pictures() -> None:
    """The line through two batches meets a third."""
    few, many = (measure("convnet", 5, 32, count, torch.float32, None, False) for count in (4, 16))
    for step in STEPS:
        assert few.alive[step].at(16) == pytest.approx(many.alive[step].at(16), rel=0.02)
        assert few.flops[step] == many.flops[step]


def test_learnt_augmentation_costs_a_backward() -> None:
    config = settings(8, dict(EVERYTHING), {})
    plain = measure("convnet", 5, 32, 8, torch.float32, None, False)
    learnt = measure("convnet", 5, 32, 8, torch.float32, build_pictures(config), False)
    factors = measure("convnet", 5, 32, 8, torch.float32, build_pictures(config), True)
    assert learnt.flops["hyper"] / plain.flops["hyper"] == pytest.approx(2, rel=0.1)  # activations alone, no weights
    assert plain.flops["task"] < factors.flops["shared"] < 1.2 * plain.flops["task"]
    assert factors.flops["shared"] < learnt.flops["shared"]
    assert learnt.alive["hyper"].at(8) > plain.alive["hyper"].at(8)


def test_memory_by_part() -> None:
    """Of 7 or 8 pictures a rank; numbers by hand."""
    parts = {part.part: part for part in planning.memory(WORK, 8)}
    sizes = {name: part.bytes for name, part in parts.items()}
    assert sizes["weights and buffers"] == 4012
    assert sizes["gradients"] == sizes["gradient buckets of DDP"] == sizes["optimizer state"] == 4000
    assert sizes["activations of the task step"] == sizes["activations of the hyper step"] == 180
    assert sizes["pictures of 3 batches"] == 3 * 8 * 300
    assert sizes["rows: values"] == sizes["rows: second moments"] == 113 * 25 * 4
    assert sizes["validation gradient"] == 10 * 8 * 4
    assert sizes["forward of the validation batch"] == 140
    assert sizes["staging buffer of saves"] == 4012 + 4000 + planning.table_bytes(900, 50, 8, 4) + 10 * 8 * 4
    together = sum(part.bytes for part in parts.values() if part.place == "device")
    together -= sizes["forward of the validation batch"]
    assert planning.peak(list(parts.values()), "device") == together - sizes["activations of the task step"]
    host = planning.memory(replace(WORK, table_on_host=True, bytes_per_value=2), 8)
    table = planning.table_bytes(900, 50, 8, 2)
    assert planning.peak(host, "host") == table + (8012 + table + 320)


def staged(tree: dict[str, Any]) -> int:
    """Bytes of the copy that a save makes of this rank's state."""
    with comm.process_group(comm.place(), CPU) as ranks:
        parts = build(check_config(tree, "of the test"), read_manifest(tree["data"]["root"]), ranks)
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        copy = DefaultStager(options).stage(tensors(parts))
        assert isinstance(copy, dict)
        parts.engine.close()
        local = [getattr(leaf, "_local_tensor", leaf) for _, leaf in checkpoint.leaves(copy)]
        return sum({leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in local}.values())


@pytest.mark.parametrize("stage", [None, pytest.param(1, marks=needs_deepspeed)])
def test_the_buffer_of_saves_is_counted(pool: RankPool, digits: Path, tmp_path: Path, stage: int | None) -> None:
    """Model, momentum, average, this rank's rows with mean predictions and the validation gradient, but for their
    counters.
    """
    tree = with_stage(small(digits, tmp_path, train__average=0.9, learn__ensembling=0.7), stage)
    config, manifest = check_config(tree, "of the test"), read_manifest(digits)
    split = build_split(config, manifest)
    work = workload(
        config, Sizes(len(split.train), len(split.validation), 10), replace(CLUSTER, nodes=1, ranks_per_node=2)
    )
    parts = {part.part: part for part in planning.memory(work, 2)}
    assert max(pool.run(2, fresh, staged, tree)) == pytest.approx(parts["staging buffer of saves"].bytes, abs=500)
    assert (parts["whole copies for a save"].bytes > 0) == (stage is not None)
    assert parts["staging buffer of saves"].place == "host"


@pytest.mark.parametrize("folds", [0, 3])
@pytest.mark.parametrize("most", [None, 4])
def test_passes_and_batches_are_those_of_the_loaders(
    digits: Path, tmp_path: Path, folds: int, most: int | None
) -> None:
    """Also where epochs train on the clean part but for a fold."""
    tree = small(digits, tmp_path, learn__clean_folds=folds, train__batch_size=50, train__steps_per_pass=most)
    config, manifest = check_config(tree, "of the test"), read_manifest(digits)
    split = build_split(config, manifest)
    work = workload(config, Sizes(len(split.train), len(split.validation), 10), CLUSTER)
    loaders = build_loaders(config, manifest, split, Ranks(0, 1, torch.device("cpu")))
    assert planning.pass_steps(work, "task") == planning.pass_steps(work, "shared") == loaders.task.steps
    assert planning.pass_steps(work, "hyper") == loaders.hyper.steps
    assert work.validation_batch == loaders.hyper_validation.batch_size


def test_gathered_samples_are_counted() -> None:
    """Sample space joins features with ones, weights, logits and soft logits; fisher features and scores."""
    work = replace(WORK, solver="neumann", space="sample", products=6)
    assert work.gathered_width == 8 + 1 + 10 + 10
    assert replace(work, solver="fisher").gathered_width == 8 + 10
    gathered = 2 * 60 * 29 * 4
    assert gathered + 60**2 * 4 < planning.solver_bytes(work, 8) < gathered + 60**2 * 4 + 10 * 60 * 10 * 4 + 5 * 320


# The plan as a whole --------------------------------------------------------------------------------------------------


def test_passes_and_steps() -> None:
    """The last, incomplete batch of a pass is left out; a separate hyper pass comes on top from start_epoch on."""
    separate = plan(replace(WORK, start_epoch=4), CLUSTER)
    assert (separate.steps_per_pass, separate.passes_before, separate.passes_after) == (
        15,
        ("task",),
        ("hyper", "task"),
    )
    seconds = {step.step: step.seconds for step in separate.steps}
    assert separate.run_seconds == pytest.approx(15 * (10 * seconds["task"] + 6 * seconds["hyper"]))
    shared = plan(replace(WORK, way="shared"), CLUSTER)
    assert shared.passes_after == ("shared",)
    nothing = plan(replace(WORK, learns=False, row_width=0), CLUSTER)
    assert nothing.passes_after == ("task",)
    assert nothing.run_seconds == pytest.approx(10 * nothing.epoch_seconds_before)
    assert not separate.problems


def test_what_does_not_fit_is_said_with_settings_that_do() -> None:
    """Each named setting, put in, makes the plan fit."""
    work = replace(WORK, train_samples=900_000, row_width=1000, classes=900, solver="identity")
    cluster = replace(CLUSTER, memory=GIB * 0.8, host_memory=2 * GIB)
    (problem,) = plan(work, cluster).problems
    assert "largest part: rows: values, 0.42 GiB" in problem
    assert "device memory: 0.8" in problem
    cures = planning.cures(work, cluster)
    assert cures == ["--nodes 4", "hyper.table_dtype=bfloat16", "hyper.table_device=host", "learn.soft_label=false"]
    assert not plan(work, replace(cluster, nodes=4)).problems
    assert not plan(replace(work, bytes_per_value=2), cluster).problems
    assert not plan(replace(work, table_on_host=True), cluster).problems
    tiny = plan(work, replace(cluster, memory=1000.0, host_memory=1000.0)).problems
    assert tiny[0].endswith(planning.NO_SINGLE)


def test_activations_that_do_not_fit_want_a_smaller_batch() -> None:
    foot = replace(FOOT, alive=dict.fromkeys(STEPS, Line(0.0, GIB / 2)))
    work = replace(WORK, footprint=foot, batch_size=64)
    (problem,) = plan(work, replace(CLUSTER, memory=3 * GIB)).problems
    assert "fits with train.accumulate=2 or train.batch_size=32 or --nodes 4" in problem


def test_a_table_that_cannot_fit_is_refused() -> None:
    facts = {"train_samples": 1_281_167, "width": 1015, "ranks": 2, "bytes_per_value": 4}
    need = planning.table_bytes(1_281_167, 2030, 2, 4)
    check_memory(**facts, memory=need)
    with pytest.raises(
        AutodoError, match=r"4\.85 GiB a rank .* more ranks \(3 or more\), or hyper.table_dtype=bfloat16"
    ):
        check_memory(**facts, memory=need - 1)
    with pytest.raises(AutodoError) as caught:
        check_memory(**(facts | {"bytes_per_value": 2}), memory=2**29, table_on_host=True)
    assert "more ranks (10 or more), or learn.soft_label=false" in str(caught.value)
    assert "\n" not in str(caught.value)
    check_memory(**(facts | {"bytes_per_value": 2, "ranks": 10}), memory=2**29, table_on_host=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"batch_size": 7}, "less than one picture for each of 8 ranks"), ({"batch_size": 901}, "more than 900 train")],
)
def test_batches_that_cannot_be(change: dict[str, int], said: str) -> None:
    with pytest.raises(AutodoError, match=said):
        plan(replace(WORK, **change), CLUSTER)


@pytest.mark.parametrize(("field", "value"), [("memory", 0.0), ("link", -1.0), ("flops", float("nan"))])
def test_rates_are_above_zero(field: str, value: float) -> None:
    with pytest.raises(AutodoError, match=f"plan: {field} = .* is not above 0"):
        replace(CLUSTER, **{field: value})


# The command ----------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


LEARNT = "{root: nowhere, image_size: 32}\nmodel: {name: convnet}\nlearn: {weight: true, soft_label: true}\n"


def test_the_command(tmp_path: Path) -> None:
    """Without data, as JSON; the overrides count."""
    file = write(tmp_path, f"data: {LEARNT}")
    words = ["plan", file, "train.batch_size=32", "--nodes", "2", "--ranks-per-node", "4"]
    sizes = ["--samples", "1000", "--classes", "20", "--json", str(tmp_path / "plan.json"), "--memory", "1"]
    result = CliRunner().invoke(app, [*words, *sizes])
    assert result.exit_code == 0, result.output
    assert "everything fits" in result.output
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["workload"]["row_width"] == 21
    assert found["plan"]["steps_per_pass"] == 31
    small = CliRunner().invoke(app, [*words, *sizes, "--memory", "0.001"])
    assert small.exit_code == 1
    assert "does not fit: device memory" in small.output


def test_a_shortened_pass() -> None:
    """Fewer steps than the data gives, or all of those."""
    assert plan(replace(WORK, steps_per_pass=4), CLUSTER).steps_per_pass == 4
    assert plan(replace(WORK, steps_per_pass=99), CLUSTER).steps_per_pass == 15
    assert workload(settings(64, {}, {}, steps_per_pass=4), Sizes(500, 40, 10), CLUSTER).steps_per_pass == 4


def test_the_command_reads_a_packed_data_set(tmp_path: Path, digits: Path) -> None:
    file = write(tmp_path, f"data: {{root: {digits}, image_size: 32, imbalance_ratio: 10}}\nmodel: {{name: convnet}}\n")
    result = CliRunner().invoke(app, ["plan", file, "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "plan.json").read_text())["workload"]
    assert found["classes"] == 10
    assert 500 < found["train_samples"] < 1000
    assert not found["learns"]


def test_the_command_wants_sizes_or_data(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", write(tmp_path, f"data: {LEARNT}"), "--samples", "10"])
    assert isinstance(result.exception, AutodoError)
    assert "not packed yet; set data.root, or give --samples and --classes" in str(result.exception)


def test_the_workload_takes_the_runs_own_choices() -> None:
    """Row width, space and products are those of the build step."""
    config = settings(64, dict(EVERYTHING), {"terms": 7, "power_iterations": 2, "table_dtype": "bfloat16"})
    work = workload(config, Sizes(500, 40, 10), replace(CLUSTER, nodes=1, ranks_per_node=2))
    solve = build_solve(config, nn.Linear(128, 10), 2)
    assert (work.row_width, work.products, work.space) == (25, 9, solve.space)
    assert (work.bytes_per_value, work.validation_batch) == (2, 40)

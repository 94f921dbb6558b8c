"""What a CPU cannot run: NCCL, DALI's GPU decoder, loss scaling, statistics over ranks, real kernels. See README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from test_engines import SHARED, assert_same, first, small
from test_train import assert_equal_states, cut_back, run_train, weights

from autodo_dist.build import build, choose_device
from autodo_dist.data.manifest import read_manifest
from autodo_dist.load_config import check_config
from autodo_dist.parallel import checkpoint, comm
from autodo_dist.steps import task_step

pytestmark = pytest.mark.gpu
GPU = {"train__device": "cuda"}
NOTHING = {"learn__augment": "none", "learn__weight": False, "learn__soft_label": False}


def steps(tree: dict[str, Any], count: int) -> dict[str, Any]:
    """Losses of task steps from the start, and the state after them."""
    config = check_config(tree, "test")
    place = comm.place()
    with comm.process_group(place, choose_device(config.train.device, place.local_rank)) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        parts.model.train()
        losses = []
        for step, batch in enumerate(first(parts.loaders.task, count)):
            losses.append(float(ranks.sum(task_step(parts, batch, step, ranks).figures[0])) / config.train.batch_size)
        parts.share_buffers()
        state = {name: value.cpu().clone() for name, value in checkpoint.leaves(parts.engine.state())}
        return {"losses": torch.tensor(losses), "rows": torch.zeros(0), "state": state}


def test_steps_are_the_cpus(digits: Path, tmp_path: Path) -> None:
    tree = small(digits, tmp_path, **NOTHING, train__precision="fp64")
    on_gpu = tree | {"train": tree["train"] | {"device": "cuda"}}
    found, expected = steps(on_gpu, 6), steps(tree | {"train": tree["train"] | {"device": "cpu"}}, 6)
    # Pictures are resized by another filter on a GPU, so the losses are near and not equal.
    assert (found["losses"] - expected["losses"]).abs().max() < 0.05


@pytest.mark.parametrize("way", ["separate", "shared"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"train__precision": "bf16"}, {"train__channels_last": True}, {"train__compile": True}],
    ids=["fp32", "bf16", "channels_last", "compile"],
)
def test_a_resume_is_bit_exact(digits: Path, tmp_path: Path, way: str, changes: dict[str, Any]) -> None:
    """With the operators that have a deterministic algorithm: no warp, whose sampler has none."""
    learn = {"learn__augment": "none", "train__deterministic": True}
    tree = small(digits, tmp_path, **GPU, **learn, **(SHARED if way == "shared" else {}), **changes)
    folder = run_train(tree)
    last = checkpoint.step_of(checkpoint.complete(folder / "checkpoints")[-1])
    final = weights(folder, last)
    cut_back(folder, 5)
    run_train(tree)
    assert_equal_states(weights(folder, last), final)


@pytest.mark.parametrize("changes", [{}, SHARED, {"hyper__solver": "neumann"}], ids=["separate", "shared", "neumann"])
def test_everything_is_learnt(digits: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """All groups of rows, the warp among them; with tables on the GPU and in main memory the same rows."""
    tree = small(digits, tmp_path, **GPU, learn__augment="per_sample", **changes)
    folder = run_train(tree)
    assert (folder / "labels.csv").is_file()
    there = tree | {"run": tree["run"] | {"name": "host"}, "hyper": tree["hyper"] | {"table_device": "host"}}
    one, two = (weights(path, 10) for path in (folder, run_train(there)))
    torch.testing.assert_close(two[".hyper.rows.value"], one[".hyper.rows.value"], rtol=1e-3, atol=1e-3)


def test_float16_scales_the_loss(digits: Path, tmp_path: Path) -> None:
    """A run comes to its end, with a scale that a resume takes up."""
    tree = small(digits, tmp_path, **GPU, **NOTHING, train__precision="fp16", train__deterministic=True)
    folder = run_train(tree)
    last = checkpoint.step_of(checkpoint.complete(folder / "checkpoints")[-1])
    final = weights(folder, last)
    assert final[".scaler.scale"] > 1
    cut_back(folder, 5)
    run_train(tree)
    assert_equal_states(weights(folder, last), final)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
def test_batchnorm_over_ranks_is_that_of_one(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """SyncBatchNorm on two GPUs, beside BatchNorm on one: losses, weights and running statistics in float64."""
    tree = small(digits, tmp_path, **GPU, **NOTHING, model__name="resnet18", train__precision="fp64")
    expected = steps(tree, 6)
    found = pool.run(2, steps, tree | {"model": tree["model"] | {"sync_batch_norm": True}}, 6)[0]
    assert_same(found, expected, 1e-8)
    own = pool.run(2, steps, tree, 6)[0]
    assert (own["losses"] - expected["losses"]).abs().max() > 1e-6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
def test_two_gpus_are_one(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    tree = small(digits, tmp_path, **GPU, **NOTHING, train__precision="fp64")
    assert_same(pool.run(2, steps, tree, 6)[0], steps(tree, 6), 1e-8)

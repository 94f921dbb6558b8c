"""Each optimizer on DDP and on DeepSpeed's ZeRO stages: the same numbers, and state that goes from one to the other."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from test_engines import CUT_ALL, engine_config, fresh, needs_deepspeed
from test_plan import FOOT, WORK

from autodo_dist.build_engine import build_engine
from autodo_dist.commands.plan import of_engine
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.models import build_model
from autodo_dist.parallel import checkpoint, comm
from autodo_dist.parallel.engine import Engine
from autodo_dist.plan import model_memory

CPU = torch.device("cpu")
BATCH, STEPS, RATE = 4, 20, {"sgd": 0.02, "adamw": 1e-3, "lars": 0.3, "lamb": 5e-3}
Flat = dict[str, torch.Tensor]


def config_of(optim: dict[str, Any], stage: int | None, file: Path) -> Config:
    """On a ZeRO stage, every parameter cut at stage 3; None: on DDP."""
    engine = {} if stage is None else {"name": "deepspeed", "stage": stage, "deepspeed_config": str(file)}
    tree = {"data": {"root": "nowhere", "image_size": 16}, "model": {"name": "convnet"}, "train": {"device": "cpu"}}
    return check_config({**tree, "optim": optim, "engine": engine}, "test")


def made(optim: dict[str, Any], stage: int | None, ranks: comm.Ranks, file: Path) -> Engine:
    return build_engine(config_of(optim, stage, file), build_model("convnet", 4, 0), ranks)


def train(engine: Engine, name: str, steps: range) -> torch.Tensor:
    """Losses of steps on pictures that depend on step and rank, over all ranks."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + engine.ranks.rank)
        images_BCHW = torch.randn(BATCH, 3, 16, 16, generator=generator)
        labels_B = torch.randint(4, (BATCH,), generator=generator)
        loss = torch.nn.functional.cross_entropy(engine.forward(images_BCHW)[1], labels_B)
        engine.backward(loss)
        engine.step(RATE[name] * (step + 1) / STEPS)
        losses.append(engine.ranks.sum(loss.detach()) / engine.ranks.ranks)
    return torch.stack(losses)


def flat(state: dict[str, Any]) -> Flat:
    return {name: leaf.clone() for name, leaf in checkpoint.leaves(state)}


def farthest(one: Flat, other: Flat) -> float:
    """The largest difference between two states, whose names, shapes and types are the same."""
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in one.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in other.items()
    }
    return max(float((one[name].double() - leaf.double()).abs().max()) for name, leaf in other.items())


def moved(engine: Engine, state: dict[str, Any]) -> dict[str, Any]:
    """What an engine gives right after it has taken a state."""
    engine.restore(state)
    return engine.state()


def compare(optim: dict[str, Any], stages: tuple[int, ...], file: Path) -> list[dict[str, float]]:
    """How far each stage is from DDP in losses and state, and from itself after a move. Every rank calls this."""
    torch.set_num_threads(1)
    name, found = optim["name"], []
    with comm.process_group(comm.place(), CPU) as ranks:
        ddp = made(optim, None, ranks, file)
        start, losses = flat(ddp.state()), train(ddp, name, range(STEPS))
        expected = ddp.state()
        for stage in stages:
            engine = made(optim, stage, ranks, file)
            far = {"start": farthest(flat(engine.state()), start)}
            early = train(engine, name, range(12))
            middle = checkpoint_of(engine.state())
            late = train(engine, name, range(12, STEPS))
            end = flat(engine.state())
            assert farthest(end, flat(middle)) > 1e-4
            far["losses"] = float((torch.cat([early, late]) - losses).abs().max())
            far["state"] = farthest(end, flat(expected))
            engine.close()
            resumed = made(optim, stage, ranks, file)
            far["resumed"] = farthest(flat(moved(resumed, middle)), flat(middle))
            train(resumed, name, range(12, STEPS))
            far["unbroken"] = farthest(flat(resumed.state()), end)
            there = moved(resumed, checkpoint_of(expected))
            far["from ddp"] = farthest(flat(there), flat(expected))
            far["and back"] = farthest(
                flat(moved(made(optim, None, ranks, file), checkpoint_of(there))), flat(expected)
            )
            resumed.close()
            found.append(far)
    return found


def checkpoint_of(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that nothing else holds, as a checkpoint is."""
    return {name: checkpoint_of(it) if isinstance(it, dict) else it.clone() for name, it in state.items()}


@needs_deepspeed
@pytest.mark.parametrize(
    ("optim", "stages"),
    [
        ({"name": "adamw"}, (0, 1, 2, 3)),
        ({"name": "adamw", "decay_norms": False}, (0, 1, 2, 3)),
        ({"name": "sgd", "decay_norms": False}, (0, 1, 2, 3)),
        ({"name": "adamw", "implementation": "torch_fused", "decay_norms": False}, (0, 1, 2, 3)),
        ({"name": "sgd", "implementation": "torch_fused"}, (0, 1, 2, 3)),
        ({"name": "lars"}, (0,)),
        ({"name": "lamb"}, (0,)),
    ],
    ids=lambda value: "-".join(str(each) for each in value.values()) if isinstance(value, dict) else "",
)
def test_numbers_are_ddps_and_state_moves(
    pool: RankPool, tmp_path: Path, optim: dict[str, Any], stages: tuple[int, ...]
) -> None:
    """Losses of 20 steps to 1e-6, state to 1e-5; what is saved and taken up again bit for bit."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(CUT_ALL))
    for stage, far in zip(stages, pool.run(2, fresh, compare, optim, stages, file)[0], strict=True):
        assert far.pop("losses") <= 1e-6, stage
        assert far.pop("state") <= 1e-5, stage
        assert set(far.values()) == {0.0}, (stage, far)


def held(before: dict[int, torch.UntypedStorage]) -> int:
    """Bytes of tensors that are not of `before`, those of one storage once."""
    return sum(storage.nbytes() for place, storage in storages().items() if place not in before)


def storages() -> dict[int, torch.UntypedStorage]:
    """Storages by place; held, none is freed and its place used anew. Python does not see DDP's buckets.

    Gloo's thread lets go of what it summed a moment after the sum is there: that is waited for.
    """
    time.sleep(0.05)
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (each, each.grad) if each.is_leaf else (each,):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return found


def census(stage: int | None, file: Path) -> dict[str, int]:
    """Bytes that a rank holds in and after the second step of AdamW, on pictures of 4 x 3 x 16 x 16."""
    with comm.process_group(comm.place(), CPU) as ranks:
        gc.collect()
        before, back, step = storages(), {}, []
        engine = made({"name": "adamw"}, stage, ranks, file)
        train(engine, "adamw", range(1))
        gc.collect()
        engine.optimizer.register_step_pre_hook(lambda *_: step.append(held(before)))
        parameters = list(engine.module.parameters())
        for name, parameter in {"last": parameters[0], "head": parameters[-2]}.items():
            parameter.register_hook(lambda _, name=name: back.update({name: held(before)}))
        train(engine, "adamw", range(1, 2))
        after = held(before)
        engine.close()
        return back | {"step": step[0], "after": after}


@needs_deepspeed
def test_memory_is_what_the_plan_says(pool: RankPool, tmp_path: Path) -> None:
    """Each line of the plan at a moment when it is there, to 2 % of the weights; two ranks."""
    file, count = tmp_path / "deepspeed.json", sum(each.numel() for each in build_model("convnet", 4, 0).parameters())
    file.write_text(json.dumps(CUT_ALL))
    activations = 0
    for stage in (None, 0, 1, 2, 3):
        work = replace(WORK, footprint=replace(FOOT, parameters=count, buffers=()), optimizer_numbers=2, stage=stage)
        lines = {part.part: part.bytes for part in model_memory(work, 2)}
        bucket = lines.get("gradient bucket of DeepSpeed", 0)
        always = lines["weights and buffers"] + lines["flat copy of a part of the weights"] + lines["optimizer state"]
        always += lines["gradients"] + bucket if stage == 3 else 0
        for found in pool.run(2, fresh, census, stage, file):
            expected = {"after": always}
            if stage in (None, 0, 1):
                expected["last"] = always + lines["gradients"] + (bucket if stage else 0)
            if stage in (None, 0, 2):
                expected["step"] = always + lines["gradients"]
            if stage == 2:
                expected["last"] = always + bucket
            if stage is None:
                activations = found["head"] - always
            if stage == 3:
                expected["head"] = always + lines["gathered weights"] + activations
            for moment, size in expected.items():
                assert found[moment] == pytest.approx(size, abs=0.02 * 4 * count), (stage, moment)


def test_the_plan_reads_deepspeeds_file(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 100, "stage3_max_live_parameters": 50}}))
    found = of_engine(config_of({"name": "adamw"}, 3, file), 2)
    assert found == {"stage": 3, "reduce_bucket": 100, "most_live": 50}
    work = replace(WORK, footprint=FOOT, **found)
    assert {part.part: part.bytes for part in model_memory(work, 3)} == {
        "weights and buffers": 334 * 4 + 12,
        "flat copy of a part of the weights": 334 * 4,
        "gathered weights": 200,
        "gradients": 334 * 4,
        "gradient bucket of DeepSpeed": 400,
        "optimizer state": 334 * 4,
        "average of the weights": 0,
    }
    assert of_engine(config_of({}, None, file), 2) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optim__name": "lamb", "engine__stage": 1},
            "lamb: a step needs the norm .* engine.stage = 1 .* engine.stage=0",
        ),
        ({"optim__name": "lars", "engine__stage": 3}, "lars: a step needs the norm .* or engine.name=ddp"),
        ({"optim__implementation": "apex"}, "optim.implementation = apex: never tried with .* or engine.name=ddp"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AutodoError, match=words) as caught:
        engine_config(**changes)
    assert "\n" not in str(caught.value)

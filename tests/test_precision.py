"""In which types a run computes, how its pictures lie in memory, and the scale of float16's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from test_autodo import learning
from test_train import assert_equal_states, cut_back, lines, run_train, settings, weights
from torch import nn

from autodo_dist.build import build_classifier, check_device
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.models import Classifier
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.parallel.engine import DdpEngine

CPU = torch.device("cpu")
WAYS = {"bf16": {"precision": "bf16"}, "channels_last": {"channels_last": True}}


def seen(model: Classifier) -> dict[str, torch.Tensor]:
    """What the first convolution gives, the features and the logits of a batch."""
    found: dict[str, torch.Tensor] = {}
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv.register_forward_hook(lambda module, inputs, output: found.update(conv=output))
    found["features"], found["logits"] = model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return found


def test_the_encoder_computes_in_bfloat16_and_the_head_does_not(digits: Path, tmp_path: Path) -> None:
    models = [
        build_classifier(check_config(settings(digits, tmp_path, train__precision=precision), "test"), 10, CPU)
        for precision in ("fp32", "bf16")
    ]
    plain, narrow = map(seen, models)
    assert {value.dtype for value in plain.values()} == {torch.float32}
    assert [narrow[name].dtype for name in ("conv", "features", "logits")] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    assert {parameter.dtype for parameter in models[1].parameters()} == {torch.float32}
    assert torch.equal(narrow["logits"], models[1].head(narrow["features"]))  # what the hypergradient takes for granted
    # bfloat16 has eight bits: 2^-8 an operation
    torch.testing.assert_close(narrow["features"], plain["features"], rtol=0.05, atol=0.02)


def test_channels_last_is_how_pictures_lie(digits: Path, tmp_path: Path) -> None:
    config = check_config(settings(digits, tmp_path, train__channels_last=True), "test")
    model = build_classifier(config, 10, CPU)
    found, plain = seen(model), seen(build_classifier(check_config(settings(digits, tmp_path), "test"), 10, CPU))
    assert found["conv"].is_contiguous(memory_format=torch.channels_last)
    assert not found["conv"].is_contiguous()
    torch.testing.assert_close(found["logits"], plain["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resume_is_bit_exact(pool: RankPool, digits: Path, tmp_path: Path, way: str, ranks: int) -> None:
    """With everything learnt, and evaluated from the checkpoint."""
    trees = [learning(digits, tmp_path / name) for name in ("unbroken", "broken")]
    for tree in trees:
        tree["train"] |= WAYS[way]
        tree["data"]["image_size"] = 16
    unbroken, broken = (pool.run(ranks, run_train, tree)[0] for tree in trees)
    last = checkpoint.step_of(checkpoint.complete(unbroken / "checkpoints")[-1])
    cut_back(broken, 10)
    pool.run(ranks, run_train, trees[1])
    assert_equal_states(weights(broken, last), weights(unbroken, last))
    assert lines(broken) == lines(unbroken)
    assert {value.dtype for name, value in weights(broken, last).items() if name.startswith(".model.encoder")} == {
        torch.float32
    }


def engine(ranks: comm.Ranks, scaler: torch.amp.GradScaler | None, clip_norm: float | None = None) -> DdpEngine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.CELU(), nn.Linear(4, 2))
    return DdpEngine(module, torch.optim.SGD(module.parameters(), 0.1, 0.9), ranks, clip_norm, scaler)


def step(engine: DdpEngine, number: int, factor: float = 1.0) -> torch.Tensor:
    """A step whose loss is multiplied by `factor`; the gradient of a leaf beside the weights."""
    images = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
    leaf = torch.ones(5, 1, requires_grad=True)
    loss = (engine.module(images * leaf) ** 2).mean() * factor
    engine.backward(loss, [leaf])
    engine.step(0.1)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_a_scaled_loss_changes_nothing(clip_norm: float | None) -> None:
    """A scale that is a power of two is exact: weights, momentum and a leaf's gradient to the bit."""
    with comm.process_group(comm.Place(), CPU) as ranks:
        plain = engine(ranks, None, clip_norm)
        scaled = engine(ranks, torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3), clip_norm)
        for number in range(5):
            assert torch.equal(step(scaled, number), step(plain, number))
        assert scaled.scaler.get_scale() == 2.0**13
        states = [dict(checkpoint.leaves(each.state())) for each in (plain, scaled)]
        assert states[1].keys() - states[0].keys() == {"scaler.scale", "scaler._growth_tracker"}
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_step_that_overflows_is_left_out_and_the_scale_survives_a_resume(tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)

    with comm.process_group(comm.Place(), CPU) as ranks:
        unbroken, broken, resumed = (engine(ranks, scaler()) for _ in range(3))
        for each in (unbroken, broken):
            step(each, 0)
            before = {name: value.clone() for name, value in each.module.state_dict().items()}
            step(each, 1, factor=3e38)  # infinite once it is scaled
            assert all(torch.equal(value, before[name]) for name, value in each.module.state_dict().items())
            step(each, 2)
            step(each, 3)
        checkpoint_save.save(tmp_path / "run", 4, broken.state(), {}, ranks)
        state: dict[str, Any] = resumed.state()
        checkpoint.restore(checkpoint.folder(tmp_path / "run", 4), state, ranks)
        resumed.restore(state)
        assert resumed.scaler.get_scale() == 2.0**11
        for each in (unbroken, resumed):
            step(each, 4)
            step(each, 5)
        assert resumed.scaler.get_scale() == unbroken.scaler.get_scale() == 2.0**12  # grown three good steps later
    for one, other in zip(unbroken.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__precision": "fp16"}, r"train\.precision = fp16: needs a GPU.*set train\.precision=bf16"),
        ({"model__sync_batch_norm": True}, r"model\.sync_batch_norm = true: needs a GPU.*sync_batch_norm=false"),
    ],
)
def test_what_needs_a_gpu_is_refused_before_data_is_touched(
    digits: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tree = settings(digits, tmp_path, **changes, data__root="/nowhere")
    with pytest.raises(AutodoError, match=message):
        run_train(tree)
    check_device(check_config(tree, "test"), torch.device("cuda"))
    assert not (tmp_path / "run").exists()


def test_float16_with_learnt_augmentation_is_refused(digits: Path, tmp_path: Path) -> None:
    tree = learning(digits, tmp_path)
    tree["train"]["precision"] = "fp16"
    with pytest.raises(AutodoError, match=r"too small for float16; set train\.precision=bf16, or learn\.augment=none"):
        check_config(tree, "test")

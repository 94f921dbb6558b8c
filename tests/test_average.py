"""The average of the weights: its numbers, what is evaluated and exported, and that it survives a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from test_autodo import learning
from test_checkpoint_command import said
from test_train import assert_equal_states, cut_back, lines, run_train, settings, weights

from autodo_dist.average import Average
from autodo_dist.commands.evaluate import evaluate_checkpoint
from autodo_dist.models import build_model


def test_it_is_the_average_over_the_steps() -> None:
    """Against the sum written out; statistics are averaged as well."""
    model, decay, seen = build_model("resnet18", 3, 0).double(), 0.75, []
    average = Average(model, decay)
    for _ in range(4):
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
    shares = [decay**3] + [(1 - decay) * decay ** (3 - k) for k in (1, 2, 3)]
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            expected = sum(share * state[name] for share, state in zip(shares, seen, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def averaging(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return settings(digits, folder, train__average=0.9, **changes)


@pytest.mark.parametrize(("ranks", "model"), [(1, "convnet"), (2, "resnet18")])
def test_a_resume_is_bit_exact(pool: RankPool, digits: Path, tmp_path: Path, ranks: int, model: str) -> None:
    changes = {"model__name": model, "train__batch_size": 20, "train__steps_per_pass": 6}
    tree = averaging(digits, tmp_path / "broken", **changes)
    unbroken = pool.run(ranks, run_train, averaging(digits, tmp_path / "unbroken", **changes))[0]
    broken = pool.run(ranks, run_train, tree)[0]
    cut_back(broken, 5)
    pool.run(ranks, run_train, tree)
    assert_equal_states(weights(broken, 12), weights(unbroken, 12))
    assert lines(broken) == lines(unbroken)
    assert any(name.startswith(".average.module.encoder.") for name in weights(broken, 12))


def test_what_is_evaluated_and_exported_is_the_average(digits: Path, tmp_path: Path) -> None:
    run = run_train(averaging(digits, tmp_path))
    plain = run_train(settings(digits, tmp_path / "plain"))
    saved, without = weights(run, 12), weights(plain, 12)
    assert all(torch.equal(saved[name], value) for name, value in without.items())  # training is not touched
    said("export", run, tmp_path / "average.safetensors")
    exported = load_file(tmp_path / "average.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, saved[f".average.module.{name}"])
        assert not torch.equal(value, saved[f".model.{name}"])
    found = evaluate_checkpoint(run, None, None)
    last = [row for row in lines(run) if row["kind"] == "evaluation"][-1]
    assert found["loss"] == pytest.approx(last["test_loss"], rel=1e-12)
    assert last["test_loss"] != [row for row in lines(plain) if row["kind"] == "evaluation"][-1]["test_loss"]


@pytest.mark.parametrize("way", ["separate", "shared"])
def test_hyper_steps_leave_the_average_alone_and_task_steps_do_not(digits: Path, tmp_path: Path, way: str) -> None:
    tree = learning(digits, tmp_path)
    tree["train"] |= {"average": 0.9}
    tree["hyper"] |= {"way": way}
    run = run_train(tree)
    step = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    assert int(weights(run, step)[".average.n_averaged"]) == 12

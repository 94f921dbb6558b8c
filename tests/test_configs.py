"""What configs/ holds: each differs from the defaults in all it says, has the paper's settings, and can be planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from autodo_dist.cli import app
from autodo_dist.config import settings
from autodo_dist.load_config import load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# Train + validation pictures as packed, and classes.
SIZES = {
    "imagenet": (1281167, 1000),
    "cifar10": (50000, 10),
    "cifar100": (50000, 100),
    "svhn": (73257, 10),
    "digits": (1500, 10),
    "housenumbers": (30000, 10),
}
# Gudovskiy et al., CVPR 2021: model, rate, IR, share of validation, first hyper epoch, its rate.
PAPER = {
    "imagenet": ("resnet18", 0.1, 10, 0.2, 100, 0.01),
    "cifar10": ("wrn_28_10", 0.1, 10, 0.2, 50, 0.05),
    "cifar100": ("wrn_28_10", 0.1, 10, 0.2, 50, 0.05),
    "svhn": ("wrn_28_10", 0.005, 100, 0.32, 50, 0.05),
}


def dataset(path: Path) -> str:
    return path.stem.partition("_")[0]


OF_THE_PAPER = [path for path in CONFIGS if dataset(path) in PAPER]


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_each_says_only_what_differs_from_the_defaults(path: Path) -> None:
    assert load_config(path).run.name == path.stem
    defaults, text = settings(), path.read_text()
    assert [name for name, value in leaves(yaml.safe_load(text)).items() if value == defaults[name].default] == []
    assert 15 < len(text.splitlines()) <= 40


@pytest.mark.parametrize("path", OF_THE_PAPER, ids=lambda path: path.name)
def test_settings_are_the_papers(path: Path) -> None:
    """All of them, but for what the recipe of autodo is for."""
    config, large = load_config(path), path.stem == "imagenet_r50_deepspeed"
    model, lr, ratio, validation, start_epoch, hyper_lr = PAPER[dataset(path)]
    data, optim, learn, hyper = config.data, config.optim, config.learn, config.hyper
    assert config.model.name == ("resnet50" if large else model)
    assert (data.imbalance_ratio, data.label_noise, data.validation_fraction) == (ratio, 0.1, validation)
    assert (config.train.epochs, optim.warmup_epochs, optim.weight_decay) == (200, 5, 1e-4)
    assert (optim.name, optim.momentum, optim.nesterov) == ("sgd", 0.9, True)
    assert config.train.batch_size == (1024 if large else 256)
    assert config.lr == pytest.approx(lr * config.train.batch_size / 256)
    if path.stem.endswith("_baseline"):
        assert not learn.anything
        return
    if config.recipe == "autodo":
        assert path.stem in ("imagenet_r18", "imagenet_r50_deepspeed")
        assert (learn.augment, learn.weight, learn.soft_label, learn.loss) == ("shared", True, True, "symmetric_kl")
        assert (hyper.start_epoch, hyper.lr, hyper.solver, hyper.way) == (5, hyper_lr, "identity", "shared")
        return
    assert (learn.augment, learn.weight, learn.soft_label, learn.loss) == ("per_sample", True, True, "symmetric_kl")
    assert (hyper.start_epoch, hyper.lr, hyper.solver, hyper.terms) == (start_epoch, hyper_lr, "neumann", 5)
    assert hyper.way == "separate"


@pytest.mark.parametrize("name", ["imagenet_r18", "cifar10", "cifar100", "svhn"])
def test_a_baseline_differs_in_what_is_learnt_alone(name: str) -> None:
    folder = CONFIGS[0].parent
    learnt, says = (f"{name}_paper", "recipe") if name.startswith("imagenet") else (f"{name}_autodo", "learn")
    plain = yaml.safe_load((folder / f"{name}_baseline.yaml").read_text())
    autodo = yaml.safe_load((folder / f"{learnt}.yaml").read_text())
    assert autodo.keys() - plain.keys() == {says, "hyper"}
    assert {part: autodo[part] for part in plain} == plain


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_plan_takes_it(path: Path) -> None:
    samples, classes = SIZES[dataset(path)]
    words = ["--samples", str(samples), "--classes", str(classes), "--nodes", "4", "--ranks-per-node", "2"]
    result = CliRunner().invoke(app, ["plan", str(path), *words, "--host-memory", "512", "--memory", "80"])
    assert result.exit_code == 0, result.output
    assert "everything fits" in result.output

"""Operations of trainings against those of real ones, and by the layers' formulas; epochs of equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autodo_dist import plan as planning
from autodo_dist import train as trainer
from autodo_dist.build import build_classifier
from autodo_dist.commands.plan import Sizes, workload
from autodo_dist.config import Config
from autodo_dist.experiment import flops, rivals
from autodo_dist.experiment.measure import measure
from autodo_dist.experiment.plan import Trial
from autodo_dist.load_config import check_config
from autodo_dist.plan import Cluster
from autodo_dist.run import Run

PLAIN: dict[str, Any] = {}
SHARED = {"augment": "shared", "weight": True, "soft_label": True}
AUTODO = {"augment": "per_sample", "weight": True, "soft_label": True}


def settings(digits: Path, folder: Path, learn: dict[str, Any], **hyper: Any) -> Config:
    """Three epochs of six steps on 16 px, hyper steps from the second on."""
    tree: dict[str, Any] = {
        "run": {"root": str(folder), "name": "run"},
        "data": {"root": str(digits), "image_size": 16, "flip": False, "threads": 1, "imbalance_ratio": 10},
        "model": {"name": "convnet"},
        "optim": {"warmup_epochs": 1},
        "train": {"epochs": 3, "batch_size": 100, "evaluate_every": 9},
        "learn": learn,
        "hyper": {"start_epoch": 1, "terms": 3, **hyper},
        "history": {"samples": 0},
    }
    return check_config(tree, "test")


def of_a_real_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> float:
    """Operations of the trainer's loop, less evaluations and the summary."""
    found, loop = [], trainer.loop

    def counted(run: Run) -> None:
        with FlopCounterMode(display=False) as counter:
            loop(run)
        found.append(float(counter.get_total_flops()))

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "loop", counted)
        for name in ("evaluate_parts", "summarise"):
            patch.setattr(trainer, name, lambda run: None)
        assert trainer.train(config)
    return found[0]


@pytest.mark.parametrize(
    ("learn", "hyper"),
    [
        (PLAIN, {}),
        (AUTODO, {}),
        (AUTODO, {"validation_every": 4}),
        (AUTODO, {"way": "separate", "validation_every": 4}),
        (SHARED, {"validation_every": 4}),
        (SHARED, {"way": "separate", "validation_every": 4}),
        (AUTODO, {"solver": "fisher"}),
        ({"weight": True, "clean_folds": 5}, {}),
    ],
    ids=[
        "plain",
        "shared",
        "shared, rare renewals",
        "separate",
        "one augmentation, rare renewals",
        "one augmentation, separate",
        "fisher",
        "clean folds",
    ],
)
def test_the_count_is_that_of_a_real_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learn: dict[str, Any], hyper: dict[str, Any]
) -> None:
    config = settings(digits, tmp_path, learn, **hyper)
    counted = flops.trainer_flops(config, 0, 3)
    assert counted == of_a_real_run(config, monkeypatch)
    assert counted == flops.trainer_flops(config, 0, 2) + flops.trainer_flops(config, 2, 3)
    assert flops.trainer_flops(config, 1, 3) == 2 * flops.trainer_flops(config, 2, 3)


def test_conjugate_gradients_may_stop_elsewhere_than_at_the_first_step(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products at the last layer are few beside the network's."""
    config = settings(digits, tmp_path, {"weight": True, "soft_label": True}, solver="cg")
    assert flops.trainer_flops(config, 0, 3) == pytest.approx(of_a_real_run(config, monkeypatch), rel=0.01)


@pytest.mark.parametrize("way", ["shared", "separate"])
def test_the_plan_counts_what_rare_renewals_save(digits: Path, tmp_path: Path, way: str) -> None:
    """Of six steps two renew the validation gradient, and learn the augmentation that all share."""
    config = settings(digits, tmp_path, SHARED, way=way, validation_every=3, solver="identity")
    cluster = Cluster(1, 1, 1e9, 1e9, link=1e9, local_link=1e9, flops=1e9)
    work = workload(config, Sizes(600, 600, 10), cluster)
    steps: tuple[planning.Step, ...] = ("shared",) if way == "shared" else ("hyper", "task")
    planned = 6 * sum(planning.step_flops(work, 1, step) for step in steps)
    assert flops.trainer_flops(config, 1, 2) == pytest.approx(planned, rel=0.01)


def test_a_plain_step_is_what_the_layers_formulas_say(digits: Path, tmp_path: Path) -> None:
    """2·B·k²·C_in·C_out·H·W of a convolution, forward and for either gradient; the pictures get none."""
    config = settings(digits, tmp_path, PLAIN)
    model, layers = build_classifier(config, 10, torch.device("cpu")).eval(), list[float]()

    def note(layer: Any, _: Any, output: torch.Tensor) -> None:
        per_output = layer.weight[0].numel()  # k²·C_in, or the features of the linear layer
        layers.append(2 * per_output * output.numel())

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(note)
    model(torch.zeros(100, 3, 16, 16))
    assert len(layers) >= 4
    steps = 3 * (flops_steps := epoch_steps(config))
    assert flops_steps > 1
    assert flops.trainer_flops(config, 0, 3) == steps * (3 * sum(layers) - layers[0])


def epoch_steps(config: Config) -> int:
    """Whole batches of the train part as the split's rule leaves it: half of the classes keep a tenth."""
    from autodo_dist.build_data import build_split, read_data

    return len(build_split(config, read_data(config)).train) // 100


@dataclass(frozen=True)
class Outcome:
    """As a rival's run gives it."""

    test_accuracy: float
    test_accuracy_best_epoch: float
    flops: float
    seconds: float


def stand_in(monkeypatch: pytest.MonkeyPatch, seen: list[Config], each: float) -> None:
    """Have each epoch of a rival take so many operations."""

    def run(config: Config, rival: str, options: dict[str, float]) -> Outcome:
        assert (rival, options) == ("elr", {"momentum": 0.9})
        seen.append(config)
        return Outcome(0.75, 0.8, config.train.epochs * each, 1.5)

    def count(config: Config, rival: str, options: dict[str, float]) -> float:
        return config.train.epochs * each

    monkeypatch.setattr(rivals, "run", run)
    monkeypatch.setattr(rivals, "flops", count)


@pytest.fixture
def trial(digits: Path, tmp_path: Path) -> Callable[..., Trial]:
    """A trial of a rival, against an AutoDO run."""

    def make(**changes: Any) -> Trial:
        ours = settings(digits, tmp_path, AUTODO)
        about = {"experiment": "x", "method": "ELR", "cell": "c", "seed": 3, "budget": "flops", "words": ("a=b",)}
        same = {"config": settings(digits, tmp_path, PLAIN), "ours": ours, "rival": "elr", "options": {"momentum": 0.9}}
        return Trial(**(about | same | changes))

    return make


@pytest.mark.parametrize("factor", [0.01, 0.4, 1.0, 2.2])
def test_a_rivals_epochs_are_scaled_to_our_flops(
    trial: Callable[..., Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    one, seen = trial(), list[Config]()
    flops._rival_flops.cache_clear()
    ours = flops.trainer_flops(one.ours, 0, 3)
    stand_in(monkeypatch, seen, ours / (3 * factor))
    epochs = max(1, round(3 * factor))
    line = measure(one, False, tmp_path, "d" * 16, "commit")
    assert [config.train.epochs for config in seen] == [epochs]
    assert seen[0].optim.warmup_epochs == pytest.approx(1 * epochs / 3)
    assert (line.epochs, line.flops) == (epochs, pytest.approx(epochs * ours / (3 * factor)))
    assert (line.test_error, line.best_test_error, line.seconds) == (25.0, pytest.approx(20.0), 1.5)
    assert (line.key, line.digest, line.data, line.commit) == (one.key, one.digest, "d" * 16, "commit")
    assert (line.rival, line.options, line.settings) == ("elr", {"momentum": 0.9}, ("a=b",))
    flops._rival_flops.cache_clear()


def test_under_the_epochs_as_set_nothing_is_scaled(trial: Callable[..., Trial]) -> None:
    one = trial(budget="epochs")
    assert flops.budgeted(one) is one.config


def test_a_learning_rival_of_the_trainer_begins_at_the_same_share(trial: Callable[..., Trial]) -> None:
    config = flops.scaled(trial().ours, 2.0)
    assert (config.train.epochs, config.optim.warmup_epochs, config.hyper.start_epoch) == (6, 2.0, 2)
    shortest = flops.scaled(trial().ours, 0.1)
    assert (shortest.train.epochs, shortest.hyper.start_epoch) == (1, 0)
    assert shortest.optim.warmup_epochs < 1


def test_a_fork_costs_what_both_runs_do(trial: Callable[..., Trial], digits: Path, tmp_path: Path) -> None:
    """The plain epochs of the run that it starts from, and its own from there on."""
    source = trial(budget="epochs", rival="", options={})
    fork = trial(budget="epochs", rival="", options={}, config=source.ours, source=source, epoch=2)
    plain, learning = (flops.trainer_flops(config, 2, 3) for config in (source.config, fork.config))
    assert learning > plain
    assert flops.trial_flops(fork, fork.config) == 2 * plain + learning

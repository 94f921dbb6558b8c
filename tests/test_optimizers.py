"""Optimizers: their numbers against the papers' formulas, exact resume of each, and what is refused at start."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import RankPool
from test_engines import fresh, needs_deepspeed
from test_train import assert_equal_states, cut_back, run_train, settings, weights
from torch import nn
from typer.testing import CliRunner

from autodo_dist import nvidia_apex, optimizers
from autodo_dist.build import build_engine
from autodo_dist.config import READ_BY, Config, Optim, differences
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.models import build_model
from autodo_dist.optimizers import build_optimizer, numbers_per_parameter
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.parallel.engine import DdpEngine
from autodo_dist.train import train
from launcher.submit import app as submit

NAMES = ("sgd", "adamw", "lars", "lamb")
CPU = torch.device("cpu")


def config_of(optim: dict[str, Any], **sections: Any) -> Config:
    small = {"data": {"root": "nowhere", "image_size": 16}, "model": {"name": "convnet"}}
    return check_config({**small, "optim": optim, **sections}, "test")


def small(seed: int = 0) -> nn.Module:
    """Weights, biases and norms, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.CELU(), nn.Linear(7, 3, bias=False)).double()


def gradients(model: nn.Module, steps: int) -> Iterator[None]:
    """Set gradients that are the same for every model of one shape, from 1 to 1000 times as large."""
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 4)
            parameter.grad = draw.to(parameter)
        yield


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float]) -> list[torch.Tensor]:
    """Parameters after a step at each of these learning rates."""
    for rate, _ in zip(rates, gradients(model, len(rates)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


# Numbers --------------------------------------------------------------------------------------------------------------

RATES = [0.1, 0.4, 0.3, 0.2, 0.05, 0.01]


def test_sgd_is_bit_for_bit_what_it_was() -> None:
    """The engine, whose optimizer state is there from the start, against PyTorch's SGD with empty state."""
    model = build_model("convnet", 4, 0)
    reference = copy.deepcopy(model)
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    with comm.process_group(comm.Place(), CPU) as ranks:
        engine = build_engine(config_of({}), model, ranks)
        generator = torch.Generator().manual_seed(0)
        for rate in RATES:
            images_BCHW = torch.randn(4, 3, 16, 16, generator=generator)
            engine.backward(engine.forward(images_BCHW)[1].square().mean())
            engine.step(rate / 10)
            reference(images_BCHW)[1].square().mean().backward()
            sgd.param_groups[0]["lr"] = rate / 10
            sgd.step()
            sgd.zero_grad()
    assert_equal_states(model.state_dict(), reference.state_dict())
    assert not torch.equal(model.head.weight, build_model("convnet", 4, 0).head.weight)


def test_adamw_is_torchs() -> None:
    model, reference = small(), small()
    found = run_steps(model, build_optimizer(model, Optim(name="adamw"), 1.0), RATES)
    expected = run_steps(reference, torch.optim.AdamW(reference.parameters()), RATES)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def lars_of_the_paper(model: nn.Module, optim: Optim, rates: list[float], rate_inside: bool) -> list[torch.Tensor]:
    """You et al. 2017, algorithm 1, v ← μ v + γ λ (g + β w), w ← w − v; or with γ outside of v, as timm has it."""
    velocity = [torch.zeros_like(each) for each in model.parameters()]
    with torch.no_grad():
        for rate, _ in zip(rates, gradients(model, len(rates)), strict=True):
            for w, v in zip(model.parameters(), velocity, strict=True):
                g, decay, local = w.grad, optim.weight_decay, 1.0
                assert g is not None
                if w.ndim == 1 and not optim.decay_norms:
                    decay = 0.0
                elif w.norm() > 0:
                    local = float(optim.trust_coefficient * w.norm() / (g.norm() + decay * w.norm() + 1e-8))
                v.mul_(optim.momentum).add_((rate if rate_inside else 1.0) * local * (g + decay * w))
                w -= v if rate_inside else rate * v
    return [each.detach() for each in model.parameters()]


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_lars_against_the_paper(decay_norms: bool, weight_decay: float) -> None:
    optim = Optim(name="lars", decay_norms=decay_norms, weight_decay=weight_decay, trust_coefficient=0.02)
    for rates, rate_inside in ((RATES, False), ([0.3] * 6, True)):
        model = small()
        found = run_steps(model, build_optimizer(model, optim, 1.0), rates)
        expected = lars_of_the_paper(small(), optim, rates, rate_inside)
        for pair in zip(found, expected, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def lamb_of_the_paper(model: nn.Module, optim: Optim, rates: list[float]) -> list[torch.Tensor]:
    """You et al. 2020, algorithm 2, φ(x) = x."""
    (beta1, beta2), moments = optim.betas, [(torch.zeros_like(w), torch.zeros_like(w)) for w in model.parameters()]
    with torch.no_grad():
        for step, (rate, _) in enumerate(zip(rates, gradients(model, len(rates)), strict=True), start=1):
            for w, (m, v) in zip(model.parameters(), moments, strict=True):
                assert w.grad is not None
                m.mul_(beta1).add_((1 - beta1) * w.grad)
                v.mul_(beta2).add_((1 - beta2) * w.grad**2)
                r = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + optim.eps)
                if w.ndim == 1 and not optim.decay_norms:
                    w -= rate * r
                    continue
                update = r + optim.weight_decay * w
                ratio = float(w.norm() / update.norm()) if w.norm() > 0 else 1.0
                w -= rate * ratio * update
    return [each.detach() for each in model.parameters()]


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_lamb_against_the_paper(decay_norms: bool, weight_decay: float) -> None:
    """Gradients of norms up to thousands: none is clipped."""
    optim = Optim(name="lamb", decay_norms=decay_norms, weight_decay=weight_decay, betas=(0.8, 0.95))
    model = small()
    found = run_steps(model, build_optimizer(model, optim, 1.0), RATES)
    for pair in zip(found, lamb_of_the_paper(small(), optim, RATES), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_biases_without_weight_decay(name: str) -> None:
    """Gradients of zero: weights shrink and the others stay, or all shrink."""
    for decay_norms, shrunk in ((True, [0, 1, 2, 4]), (False, [0, 4])):
        model = small()
        nn.init.constant_(model[1].bias, 0.5)
        before = [each.detach().clone() for each in model.parameters()]
        optimizer = build_optimizer(model, Optim(name=name, weight_decay=0.1, decay_norms=decay_norms), 0.1)
        for each in model.parameters():
            each.grad = torch.zeros_like(each)
        optimizer.step()
        changed = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
        norm_bias = 3
        assert [index for index, it in enumerate(changed) if it and index != norm_bias] == shrunk
        assert changed[norm_bias] == decay_norms


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_equals_torch_to_rounding(name: str, dtype: torch.dtype) -> None:
    check_same(name, "torch_fused", CPU, dtype)


def check_same(name: str, implementation: str, device: torch.device, dtype: torch.dtype) -> None:
    """Twenty steps at changing rates, to 20 roundings of the largest parameter; and they do change it."""
    found = []
    for chosen in ("torch", implementation):
        model = small().to(device, dtype)
        optim = Optim(name=name, implementation=chosen, decay_norms=False)
        before = torch.cat([each.detach().flatten().clone() for each in model.parameters()])
        run_steps(model, build_optimizer(model, optim, 1.0), [0.01 * (1 + step % 5) for step in range(20)])
        found.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    assert (found[0] - before).abs().mean() > 0.01
    tolerance = 20 * torch.finfo(dtype).eps * float(found[0].abs().max())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("optim", "numbers"),
    [({"momentum": 0.9}, 1), ({"momentum": 0.0}, 0), *(({"name": name}, 1 + (name != "lars")) for name in NAMES[1:])],
)
def test_numbers_that_an_optimizer_keeps(optim: dict[str, Any], numbers: int) -> None:
    """As the plan counts them, against the real state."""
    model = small()
    optimizer = build_optimizer(model, Optim(**optim), 0.1)
    run_steps(model, optimizer, [0.1])
    kept = sum(it.numel() for state in optimizer.state.values() for it in state.values() if it.ndim)
    assert kept == numbers * sum(each.numel() for each in model.parameters())
    assert numbers_per_parameter(Optim(**optim)) == numbers


# Resume ---------------------------------------------------------------------------------------------------------------


def engine_of(optim: dict[str, Any], ranks: comm.Ranks) -> DdpEngine:
    return build_engine(config_of(optim), build_model("convnet", 4, 0), ranks)


def engine_steps(engine: DdpEngine, first: int, last: int) -> None:
    """Steps on pictures that depend on step and rank."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(10 * step + engine.ranks.rank)
        images_BCHW = torch.randn(4, 3, 16, 16, generator=generator)
        engine.backward(engine.forward(images_BCHW)[1].square().mean())
        engine.step(0.002 * (step + 1))


def flat(engine: DdpEngine) -> dict[str, torch.Tensor]:
    return {name: leaf.clone() for name, leaf in checkpoint.leaves(engine.state())}


def resumed_and_unbroken(root: Path, first: dict[str, Any], then: dict[str, Any], ranks: comm.Ranks) -> tuple[Any, Any]:
    """States after 3 steps, a checkpoint and 3 more in a new engine, and after 6 steps. Every rank calls this."""
    unbroken, broken = engine_of(first, ranks), engine_of(first, ranks)
    engine_steps(unbroken, 0, 6)
    engine_steps(broken, 0, 3)
    checkpoint_save.save(root, 3, broken.state(), {}, ranks)
    resumed = engine_of(then, ranks)
    state = resumed.state()
    checkpoint.restore(checkpoint.folder(root, 3), state, ranks)
    resumed.restore(state)
    engine_steps(resumed, 3, 6)
    return flat(resumed), flat(unbroken)


def farthest(resumed: dict[str, torch.Tensor], unbroken: dict[str, torch.Tensor]) -> float:
    """The largest difference between two states of the same names."""
    assert resumed.keys() == unbroken.keys()
    return max(float((resumed[name] - value).abs().max()) for name, value in unbroken.items())


def resume_each(root: Path, names: tuple[str, ...]) -> dict[str, float]:
    """How far each optimizer is off after a resume. Every rank calls this."""
    with comm.process_group(comm.place(), CPU) as ranks:
        settings_of = {name: {"name": name} for name in names}
        return {name: farthest(*resumed_and_unbroken(root / name, it, it, ranks)) for name, it in settings_of.items()}


def resume_without_the_step(root: Path) -> dict[str, float]:
    with patch.object(optimizers, "step_by_parameter"):
        return resume_each(root, ("lamb",))


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_optimizer_resumes_bit_for_bit(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    assert pool.run(ranks, resume_each, tmp_path, NAMES) == [dict.fromkeys(NAMES, 0.0)] * ranks


def test_a_count_of_steps_that_is_lost_is_noticed(pool: RankPool, tmp_path: Path) -> None:
    """The negative control of the test above."""
    assert pool.run(1, resume_without_the_step, tmp_path)[0]["lamb"] > 1e-3


@pytest.mark.parametrize("engine", [{}, pytest.param({"name": "deepspeed", "stage": 0}, marks=needs_deepspeed)])
def test_a_whole_run_with_lamb_resumes_bit_for_bit(
    pool: RankPool, digits: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """Two parameter groups, two ranks, from the middle of the second epoch on."""
    optim = {"name": "lamb", "warmup_epochs": 1, "lr_batch_size": 400}
    tree = settings(digits, tmp_path, data__image_size=16) | {"optim": optim, "engine": engine}
    folder = pool.run(2, fresh, run_train, tree)[0]
    final = weights(folder, 12)
    assert final[".optimizer.state.head.weight.step"] == 12
    cut_back(folder, 10)
    pool.run(2, fresh, run_train, tree)
    assert_equal_states(weights(folder, 12), final)
    log = (folder / "logs" / "rank-00000.log").read_text()
    assert "optimizer lamb (torch): peak learning rate 0.00125 (optim.lr = 0.005 for a batch of 400)" in log
    assert "weight decay 0.02 on 5 of 14 parameter tensors" in log


@pytest.mark.parametrize("name", NAMES)
def test_a_save_before_the_first_step_changes_nothing(name: str) -> None:
    with comm.process_group(comm.Place(), CPU) as ranks:
        plain, saved = engine_of({"name": name}, ranks), engine_of({"name": name}, ranks)
        assert all(not leaf.any() for key, leaf in checkpoint.leaves(saved.state()) if key.startswith("optimizer"))
        engine_steps(plain, 0, 2)
        engine_steps(saved, 0, 2)
        assert farthest(flat(saved), flat(plain)) == 0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_may_change_its_implementation_at_a_resume(tmp_path: Path, name: str) -> None:
    first, then = {"name": name}, {"name": name, "implementation": "torch_fused"}
    assert differences(config_of(first), config_of(then)) == []
    with comm.process_group(comm.Place(), CPU) as ranks:
        assert farthest(*resumed_and_unbroken(tmp_path, first, then, ranks)) < 1e-6


# Settings -------------------------------------------------------------------------------------------------------------


def test_what_is_usual_lies_below_what_is_given() -> None:
    plain, lamb = config_of({}).optim, config_of({"name": "lamb", "lr": 0.01}).optim
    assert (plain.name, plain.implementation, plain.lr, plain.momentum, plain.weight_decay) == (
        *("sgd", "torch", 0.1, 0.9),
        1e-4,
    )
    assert plain.nesterov
    assert plain.decay_norms
    assert (lamb.lr, lamb.eps, lamb.weight_decay, lamb.decay_norms) == (0.01, 1e-6, 0.02, False)
    again = check_config(config_of({"name": "lars"}).model_dump(mode="json"), "dumped")
    assert again.optim == Optim(name="lars")


def test_the_rate_is_scaled_to_the_batch() -> None:
    assert config_of({"lr": 0.2}, train={"batch_size": 1024}).lr == 0.2
    assert config_of({"lr": 0.2, "lr_batch_size": 256}, train={"batch_size": 1024}).lr == 0.8
    assert config_of({"lr": 0.2, "lr_batch_size": 256}, train={"batch_size": 64}).lr == 0.05


OTHER = {"momentum": 0.5, "nesterov": False, "betas": [0.5, 0.5], "eps": 0.1, "trust_coefficient": 0.1}


@pytest.mark.parametrize("setting", READ_BY)
@pytest.mark.parametrize("name", NAMES)
def test_a_setting_that_is_not_read_is_refused(name: str, setting: str) -> None:
    optim = {"name": name, setting: OTHER[setting]}
    if name in READ_BY[setting]:
        config_of(optim)
        return
    with pytest.raises(AutodoError, match=rf"optim\.{setting} = .*: {name} does not read it, .* leave it out"):
        config_of(optim)


@pytest.mark.parametrize(
    ("optim", "train_section", "message"),
    [
        ({"name": "lars", "implementation": "torch_fused"}, {}, "PyTorch has no fused lars; set optim.implementation="),
        ({"name": "lamb", "implementation": "torch_fused"}, {}, "PyTorch has no fused lamb"),
        ({"name": "lars", "implementation": "apex"}, {}, "apex has no LARS"),
        ({"implementation": "apex"}, {"device": "cpu"}, "train.device = cpu"),
        ({"implementation": "apex"}, {"precision": "fp64"}, "no float64"),
        ({"name": "lamb", "implementation": "apex", "weight_decay": 0}, {}, "optim.weight_decay = 0; set it"),
        ({"name": "adam"}, {}, "optim.name = 'adam'"),
        ({"lr_batch_size": 0}, {}, "optim.lr_batch_size = 0"),
        ({"name": "adamw", "betas": [0.9, 1.0]}, {}, "optim.betas"),
        ({"nam": "adamw"}, {}, "unknown key optim.nam"),
    ],
)
def test_what_contradicts_itself_is_refused(optim: dict[str, Any], train_section: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodoError, match=message) as caught:
        config_of(optim, train=train_section)
    assert "\n" not in str(caught.value)


def test_a_dry_run_says_it_too(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("data: {root: nowhere}\n")
    words = ["--config", str(file), "--dry-run", "optim.name=lamb", "optim.implementation=torch_fused"]
    result = CliRunner().invoke(submit, words)
    assert result.exit_code == 1
    assert "PyTorch has no fused lamb" in result.output


# apex -----------------------------------------------------------------------------------------------------------------

# Signatures and counting as in NVIDIA's apex/optimizers/fused_*.py; Adam's arithmetic is PyTorch's.
FAKE = """
import torch

class FusedSGD(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
                 wd_after_momentum=False, materialize_master_grads=True, set_grad_none=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        assert adam_w_mode
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if self.state[parameter]:
                    self.state[parameter]["step"] = torch.tensor(group["step"] - 1.0)
        super().step()
        for state in self.state.values():
            del state["step"]

class FusedLAMB(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_nvlamb=False):
        assert max_grad_norm == float("inf")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, nv=use_nvlamb))
"""


@pytest.fixture
def first_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Writes such files and puts their folder first on sys.path; what was imported is forgotten after the test."""

    def lay(files: dict[str, str]) -> None:
        for name, text in files.items():
            file = tmp_path / "packages" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "packages")

    yield lay
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


Lay = Callable[[dict[str, str]], None]
NVIDIA = {"apex/__init__.py": "", "apex/optimizers/__init__.py": FAKE, "amp_C.py": ""}


def refused(tmp_path: Path, name: str = "sgd") -> str:
    """Why a run is refused; its data set is not even there, and no folder is made."""
    config = config_of({"name": name, "implementation": "apex"}, run={"root": str(tmp_path / "runs"), "name": "run"})
    with pytest.raises(AutodoError, match=r"^optim\.implementation = apex: ") as caught:
        train(config)
    assert not (tmp_path / "runs").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pypis_apex_is_told(tmp_path: Path, first_on_path: Lay) -> None:
    first_on_path({"apex/__init__.py": "raise SystemExit", "apex/lib/libapex.py": ""})
    said = refused(tmp_path)
    assert "is another project (" in said
    assert f"pip uninstall apex; NVIDIA's: {nvidia_apex.BUILD}; or set optim.implementation=torch" in said


def test_nvidias_apex_without_its_kernels_is_told(tmp_path: Path, first_on_path: Lay) -> None:
    first_on_path({"apex/__init__.py": "raise SystemExit", "apex/optimizers/__init__.py": ""})
    assert f"built without its CUDA kernels (no module amp_C); {nvidia_apex.BUILD}" in refused(tmp_path)


def test_no_apex_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_apex, "find_spec", lambda name: None)
    assert f"apex is not installed; {nvidia_apex.BUILD}; or set" in refused(tmp_path)
    assert nvidia_apex.COMMIT in nvidia_apex.BUILD


def test_no_gpu_for_apex_is_told(tmp_path: Path, first_on_path: Lay) -> None:
    first_on_path(NVIDIA)
    with patch.object(torch.cuda, "is_available", return_value=False):
        assert "torch finds no GPU" in refused(tmp_path)


@pytest.mark.parametrize(
    ("kernels", "package", "why"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", FAKE, "undefined symbol: _ZN3c10"),
        ("", "", "has no attribute 'FusedSGD'"),
    ],
)
def test_an_apex_for_another_torch_is_told(
    tmp_path: Path, first_on_path: Lay, kernels: str, package: str, why: str
) -> None:
    first_on_path(NVIDIA | {"apex/optimizers/__init__.py": package, "amp_C.py": kernels})
    with patch.object(torch.cuda, "is_available", return_value=True):
        assert f"{why}); build it for this torch: {nvidia_apex.BUILD}" in refused(tmp_path)


def test_a_torch_run_resumes_with_apex(tmp_path: Path, first_on_path: Lay) -> None:
    """A stand-in for apex that counts steps by group: the checkpoint is the same, and so are the numbers."""
    first_on_path(NVIDIA)
    torch_, apex = ({"name": "adamw", "implementation": it, "decay_norms": False} for it in ("torch", "apex"))
    fused = patch.object(nvidia_apex, "optimizer", lambda name: import_module("apex.optimizers").FusedAdam)
    with fused, comm.process_group(comm.Place(), CPU) as ranks:
        for number, (first, then) in enumerate([(torch_, apex), (apex, torch_), (apex, apex)]):
            assert farthest(*resumed_and_unbroken(tmp_path / str(number), first, then, ranks)) == 0


def test_what_apex_is_given(first_on_path: Lay) -> None:
    first_on_path(NVIDIA)
    with patch.object(torch.cuda, "is_available", return_value=True):
        sgd = build_optimizer(small(), Optim(implementation="apex"), 0.1)
        lamb = build_optimizer(small(), Optim(name="lamb", implementation="apex"), 0.1)
        no_decay = Optim(name="lamb", implementation="apex", weight_decay=0, decay_norms=True)
        assert build_optimizer(small(), no_decay, 0.1).defaults["nv"]
    assert type(sgd).__module__ == "apex.optimizers"
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, True)
    assert [(group["weight_decay"], group["nv"]) for group in lamb.param_groups] == [(0.02, False), (0.0, False)]
    assert lamb.state_dict()["param_groups"][0].keys().isdisjoint({"always_adapt", "step"})


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_equals_torch_on_a_gpu(name: str) -> None:
    check_same(name, "torch_fused", torch.device("cuda"), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(nvidia_apex.find().kind != "nvidia", reason="NVIDIA's apex is not installed")
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_apex_equals_torch_on_a_gpu(name: str) -> None:
    check_same(name, "apex", torch.device("cuda"), torch.float32)


# Images ---------------------------------------------------------------------------------------------------------------


def test_the_images_build_the_apex_that_the_errors_name() -> None:
    assert nvidia_apex.BUILD in (Path(__file__).parent.parent / "images" / "install.sh").read_text()

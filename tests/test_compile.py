"""torch.compile of the encoder: the same numbers, and no more graphs than a run has kinds of forwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from functorch.compile import make_boxed_func
from ranks import RankPool
from test_engines import NOTHING, SHARED, assert_same, fresh, go, needs_deepspeed, small, with_stage
from test_train import assert_equal_states, cut_back, lines, run_train, weights
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.flop_counter import flop_registry

from autodo_dist.compiling import compile_encoder
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.method.hypergrad import frozen
from autodo_dist.models import build_model
from autodo_dist.train import train

CPU = torch.device("cpu")
LEARN = {"learn__augment": "per_sample"}


def compiled(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"train": tree["train"] | {"compile": True}}


@contextmanager
def backend(chosen: Any) -> Iterator[None]:
    """Compile by another backend than inductor, which takes half a minute; it would be given the same graphs."""
    torch._dynamo.reset()
    counters.clear()
    with patch.object(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=chosen)):
        yield


def counted(function: Callable[..., Any], *args: Any) -> tuple[Any, int, list[str]]:
    """What the function gives, the number of graphs, and the reasons for which any was cut."""
    with backend("aot_eager"):
        return function(*args), counters["stats"]["unique_graphs"], list(counters["graph_break"])


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        (NOTHING, 1),
        (LEARN, 3),  # hyper step, validation gradient, task step
        (LEARN | SHARED, 2),
        (LEARN | SHARED | {"train__accumulate": 2}, 2),  # the look ahead has the validation gradient's
        (LEARN | {"model__name": "resnet18", "data__image_size": 32}, 3),
        (LEARN | {"train__precision": "bf16"}, 3),
    ],
    ids=["nothing", "separate", "shared", "pieces", "resnet18", "bf16"],
)
def test_steps_are_those_of_a_plain_encoder(
    pool: RankPool, digits: Path, tmp_path: Path, changes: dict[str, Any], graphs: int
) -> None:
    """Three hyper and six task steps on two ranks, with as many graphs as they have kinds of forwards."""
    tree = small(digits, tmp_path, **({"train__batch_size": 20} | changes))
    expected = pool.run(2, fresh, go, tree, 6)[0]
    found, made, cuts = pool.run(2, fresh, counted, go, compiled(tree), 6)[0]
    assert_same(found, expected, 1e-5 if "precision" not in "".join(changes) else 1e-2)
    assert (made, cuts) == (graphs, [])


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_on_zero(pool: RankPool, digits: Path, tmp_path: Path, stage: int) -> None:
    tree = with_stage(small(digits, tmp_path, **LEARN, **SHARED), stage)
    expected = pool.run(2, fresh, go, tree, 6)[0]
    found, graphs, cuts = pool.run(2, fresh, counted, go, compiled(tree), 6)[0]
    assert_same(found, expected, 1e-6)
    assert (graphs, cuts) == (2, [])


@pytest.mark.parametrize("way", ["separate", "shared"])
def test_a_longer_run_has_no_more_graphs(digits: Path, tmp_path: Path, way: str) -> None:
    """Evaluations have last batches of sizes of their own, and the averaged weights are evaluated too."""

    def graphs(name: str, epochs: int) -> int:
        tree = small(digits, tmp_path / name, **LEARN, hyper__way=way, train__average=0.9, train__epochs=epochs)
        _, found, cuts = counted(run_train, compiled(tree))
        assert cuts == []
        return found

    assert graphs("short", 2) == graphs("long", 4) <= 8


@pytest.mark.slow(reason="the real compiler takes half a minute to start, and some seconds a graph")
def test_a_resume_is_the_same_run(digits: Path, tmp_path: Path) -> None:
    """With the default backend, to the bit, from the middle of an epoch; its numbers are near those of a plain run."""
    tree = small(digits, tmp_path, **LEARN, train__batch_size=100, train__steps_per_pass=2)  # full batches alone
    plain = run_train(tree | {"run": tree["run"] | {"name": "plain"}})
    torch._dynamo.reset()
    folder = run_train(compiled(tree))
    final, metrics = weights(folder, 6), lines(folder)
    for name, value in weights(plain, 6).items():
        if name.startswith(".model."):
            torch.testing.assert_close(final[name], value, rtol=0, atol=1e-3, msg=name)
    cut_back(folder, 5)
    torch._dynamo.reset()
    run_train(compiled(tree))
    assert_equal_states(weights(folder, 6), final)
    assert lines(folder) == metrics


def flops(encoder: Callable[[], Any], step: Callable[[Any], None]) -> int:
    """Operations of convolutions and matrix products in the graphs that a step runs."""
    found = 0

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal found
            with _Count() as count:
                result = graph(*args)
            found += count.flops
            return result

        return make_boxed_func(run)

    with backend(aot_autograd(fw_compiler=compiler, bw_compiler=compiler)):
        model = encoder()
        compile_encoder(model.encoder)
        step(model)
    return found


class _Count(torch.utils._python_dispatch.TorchDispatchMode):
    """FlopCounterMode without its hooks, which a compiled module does not bear."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def test_what_compiling_adds_to_the_input_gradient() -> None:
    """docs/engines.md: nothing to the separate way and the Fisher form, a forward's cost to the shared exact one.

    A compiled backward gives all gradients that the forward's inputs may want, whichever are asked for.
    """
    images_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    build = functools.partial(build_model, "resnet18", 10, 0, 32)

    def forward(model: Any) -> None:
        with torch.no_grad():
            model(images_BCHW)

    def separate(model: Any) -> None:
        leaf = images_BCHW.clone().requires_grad_()
        features_BD = frozen(model.eval())(leaf)[0]
        torch.autograd.grad(features_BD, [leaf], grad_outputs=torch.ones_like(features_BD))

    def fisher(model: Any) -> None:
        model(images_BCHW.clone().requires_grad_())[1].sum().backward()

    def exact(model: Any) -> None:
        leaf = images_BCHW.clone().requires_grad_()
        features_BD, logits_BC = model(leaf)
        torch.autograd.grad(features_BD, [leaf], grad_outputs=torch.ones_like(features_BD), retain_graph=True)
        logits_BC.sum().backward(inputs=[*model.parameters()])

    one = flops(build, forward)
    shares = {step.__name__: flops(build, step) / one for step in (separate, fisher, exact)}
    assert shares == pytest.approx({"separate": 2, "fisher": 3, "exact": 5}, rel=0.02)


def test_what_cannot_be_compiled_is_refused(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = compiled(small(digits, tmp_path, **NOTHING))
    with pytest.raises(AutodoError, match=r"train\.compile: DeepSpeed's hooks .* set engine\.stage=2"):
        check_config(with_stage(tree, 3), "test")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(AutodoError, match=r"train\.compile: no C\+\+ compiler no-such-compiler"):
        train(check_config(tree, "test"))

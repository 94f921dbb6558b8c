"""DeepSpeed's engine behind the same verbs, for ZeRO stages 0 to 3, with an optimizer, schedule and state of ours.

    stage   cut over the ranks                       class
    0       nothing                                  DeepSpeedEngine
    1, 2    optimizer state; and gradients           CutStateEngine
    3       and parameters, gathered layer by layer  CutWeightsEngine

What is cut is cut by elements, not by rows. So a checkpoint gets whole tensors by parameter name, as DDP's are.
Facts in comments were found by trying with DeepSpeed 0.19.8 on CPU ranks.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autodo_dist.errors import AutodoError
from autodo_dist.method.hypergrad import Head
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.engine import Engine, held

MOST_REDUCED = 500_000_000  # elements of a bucket: DeepSpeed's default, for which it sets memory aside


def build_deepspeed_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, stage: int, settings: dict[str, Any]
) -> DeepSpeedEngine:
    """The engine of a ZeRO stage; `settings` are those of deepspeed_settings.merged. Every rank must call this."""
    elements = sum(parameter.numel() for parameter in module.parameters())
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(MOST_REDUCED, elements))
    classes = (DeepSpeedEngine, CutStateEngine, CutStateEngine, CutWeightsEngine)
    return classes[stage](module, optimizer, ranks, settings)


class DeepSpeedEngine(Engine):
    """DeepSpeed without ZeRO: every rank holds everything. AutodoError if DeepSpeed does not take its settings."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, settings: dict[str, Any]
    ) -> None:
        super().__init__(module, optimizer, ranks)
        self._root, self._last = self._wrapped(module), True
        deepspeed = _import(ranks.device)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=self._root, optimizer=optimizer, config=settings, dist_init_required=False
            )
        except (AssertionError, ValueError) as error:  # pydantic's is a ValueError
            reason = " ".join(str(error).split())[:300]
            raise AutodoError(
                f"engine.name = deepspeed: it does not start ({reason}); mend engine.deepspeed_config, or set "
                "engine.name=ddp"
            ) from error
        self._make_optimizer_state()

    def _wrapped(self, module: nn.Module) -> nn.Module:
        return _FeaturesAside(module)

    def forward(self, images_BCHW: torch.Tensor, last: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """See Engine."""
        self._last = last
        logits_BC: torch.Tensor = self._engine(images_BCHW)
        assert isinstance(self._root, _FeaturesAside)
        return self._root.take(), logits_BC

    def backward(self, loss: torch.Tensor, leaves: Sequence[torch.Tensor] = ()) -> None:
        """See Engine. DeepSpeed's backward goes to every leaf of the graph, wanted or not."""
        self._engine.backward(loss, scale_wrt_gas=False)  # ours is a part of a sum already, not of a mean over pieces
        if not self._last:
            self._engine.step()  # counts the piece, and that is all

    def step(self, lr: float) -> None:
        """See Engine."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def norm(self) -> torch.Tensor:
        """See Engine. ZeRO leaves out a step whose gradient is not finite, without a word: that counts as NaN."""
        norm = super().norm()
        return norm if self._engine.was_step_applied() else torch.full_like(norm, torch.nan)

    def close(self) -> None:
        """See Engine. Without this, hooks hold model and optimizer for as long as the process lives."""
        self._engine.destroy()


class _FeaturesAside(nn.Module):
    """A model that gives its logits alone and keeps the features until they are taken.

    DeepSpeed hooks whatever a forward gives, to begin its bookkeeping of a backward: autograd.grad from there, then
    engine.backward, is one backward too many for it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._features_BD: torch.Tensor | None = None

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The logits."""
        self._features_BD, logits_BC = self.module(images_BCHW)
        return logits_BC  # type: ignore[no-any-return]

    def take(self) -> torch.Tensor:
        """The features of the last forward, once: they hold its graph."""
        features_BD, self._features_BD = self._features_BD, None
        assert features_BD is not None
        return features_BD


class CutStateEngine(DeepSpeedEngine):
    """ZeRO stages 1 and 2: a rank keeps its part of a flat copy of the parameters, and its optimizer state for it."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, settings: dict[str, Any]
    ) -> None:
        self._slots, self._counts = slots(optimizer), isinstance(optimizer, torch.optim.AdamW)
        super().__init__(module, optimizer, ranks, settings)

    def _make_optimizer_state(self) -> None:
        """See Engine. Else it is made in the first step, and could not be restored before it."""
        for flat in self._flat_parts():
            state = {slot: torch.zeros_like(flat) for slot in self._slots}
            if self._counts:
                state["step"] = torch.zeros((), device=flat.device if self.optimizer.defaults["fused"] else "cpu")
            self._engine.optimizer.optimizer.state[flat] = state
        self._link()

    def _steps(self) -> list[torch.Tensor]:
        """Of every flat part the count of steps, which is the same for all: none is left out of a step."""
        state = self._engine.optimizer.optimizer.state
        return [state[flat]["step"] for flat in self._flat_parts()] if self._counts else []

    def _flat_parts(self) -> list[torch.Tensor]:
        return self._engine.optimizer.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    def _link(self) -> None:
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def state(self) -> dict[str, Any]:
        """See Engine. Whole copies of what is cut, on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        model, optimizer = self.module.state_dict(), {}
        for name, parameter in self.module.named_parameters():
            model[name] = safe_get_full_fp32_param(parameter)
            optimizer[name] = {slot: safe_get_full_optimizer_state(parameter, slot) for slot in self._slots}
            if self._counts:
                optimizer[name]["step"] = self._steps()[0].clone()
        return {"model": model, "optimizer": {"state": optimizer}}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """See Engine."""
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            saved = state["optimizer"]["state"].get(name, {})
            self._put(parameter, state["model"][name], None)
            for slot in self._slots:
                self._put(parameter, saved[slot], slot)
            for step in self._steps():
                step.copy_(saved["step"])
        self._spread(parameters, state["model"])
        for name, buffer in self.module.state_dict().items():
            if name not in parameters:
                buffer.copy_(state["model"][name])

    def _put(self, parameter: nn.Parameter, value: torch.Tensor, slot: str | None) -> None:
        """Set this rank's part of a parameter's copy that the optimizer changes, or of the optimizer's state for it."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if slot is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, slot)

    def _spread(self, parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
        """Bring what was put to the parameters that the model computes with."""
        self._engine.optimizer.update_lp_params()


class CutWeightsEngine(CutStateEngine):
    """ZeRO stage 3: parameters are cut too, and gathered by hooks of DeepSpeed's on every layer for as long as it runs.

    Outside of them a parameter is an empty tensor.
    """

    def _wrapped(self, module: nn.Module) -> nn.Module:
        return module  # whose own hooks say where a forward begins, evaluation included

    def forward(self, images_BCHW: torch.Tensor, last: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """See Engine. The features are not to be differentiated here."""
        self._last = last
        features_BD, logits_BC = self._engine(images_BCHW)
        return features_BD.detach(), logits_BC

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """See Engine. Through the hooks, so that weights are gathered in the backward too."""
        with _without_gradient(self.module):
            features_BD: torch.Tensor = self.module(images_BCHW)[0]
        return features_BD

    def head(self) -> Head:
        """See Engine: a whole copy."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.get_submodule("head").parameters())):
            head = super().head()
            return Head(head.weight.clone(), None if head.bias is None else head.bias.clone())

    def held(self) -> list[torch.Tensor]:
        """See Engine."""
        buffers = [value for value in held(self.module) if not isinstance(value, nn.Parameter)]
        return [*(self._own(parameter) for parameter in self.module.parameters()), *buffers]

    def _own(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's elements. Parts are of one size; what the last ones have too much was never set to anything."""
        part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        left = int(parameter.ds_numel) - self.ranks.rank * part.ds_numel  # type: ignore[attr-defined]
        return part[: max(0, left)]  # type: ignore[no-any-return]

    def _flat_parts(self) -> list[torch.Tensor]:
        return self._engine.optimizer.fp32_partitioned_groups_flat  # type: ignore[no-any-return]

    def _link(self) -> None:
        """Nothing: stage 3 looks parts up by their place."""

    def _put(self, parameter: nn.Parameter, value: torch.Tensor, slot: str | None) -> None:
        """See CutStateEngine. safe_set_full_* fails where a parameter's elements do not divide by the ranks."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        own = value.flatten()[self.ranks.rank * size :][:size]
        part = nn.functional.pad(own, (0, size - len(own)))
        if slot is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, slot)

    def _spread(self, parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
        """See CutStateEngine."""
        import deepspeed

        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.copy_(values[name])

    def close(self) -> None:
        """See Engine."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        super().close()
        FWD_MODULE_STACK.remove(self._root)


def slots(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names under which an optimizer keeps a tensor of a parameter's shape for each."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    assert isinstance(optimizer, torch.optim.SGD)
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


@contextmanager
def _without_gradient(module: nn.Module) -> Iterator[None]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _import(device: torch.device) -> Any:
    """DeepSpeed for this rank's device, in the process group that there is, and silent but for errors."""
    os.environ["DS_ACCELERATOR"] = device.type  # before the import
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # of the GPU; it is asked for on the CPU too
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Else it looks for compilers and, on the CPU, compiles a kernel that only its inference uses, and says so.
    deepspeed.ops.__compatible_ops__ = {}
    # Its copies of a process group that has ended since: this process may have made a run before.
    groups._release_process_group_references()
    return deepspeed

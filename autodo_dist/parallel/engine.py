"""Data-parallel training of a model behind a few verbs, so that the loop does not know who averages the gradients.

A model here is an nn.Module with `encoder` and `head` that gives features and logits; its parameters are those of
`optimizer`. An engine may cut parameters and optimizer state over the ranks, so nothing else may touch them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp_state
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from autodo_dist.method.hypergrad import Head, frozen
from autodo_dist.parallel.comm import Ranks

SCALER = {"scale": float, "_growth_tracker": int}  # what changes of a GradScaler's state


class Engine(ABC):
    """What the loop asks of an engine; here, as far as it can be said where every rank holds everything.

    Every method is a collective: every rank must call it. `module` may be called for features and logits without
    gradients, which is one too. A step is {forward, backward} for each piece of a rank's part of a batch, then `step`:

        for piece in pieces:
            _, logits = engine.forward(piece.images, last=piece is pieces[-1])
            engine.backward(loss(logits))
        engine.step(lr)
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.module, self.optimizer, self.ranks = module, optimizer, ranks

    @abstractmethod
    def forward(self, images_BCHW: torch.Tensor, last: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of a piece, on the way to `backward`. The features are differentiable with autograd.grad.

        last: whether it is the last before `step`; gradients are averaged over ranks in its backward. As many on
        every rank.
        """

    @abstractmethod
    def backward(self, loss: torch.Tensor, leaves: Sequence[torch.Tensor] = ()) -> None:
        """Add the gradient of the mean over ranks of `loss`; this rank's own of it go to `leaves`."""

    @abstractmethod
    def step(self, lr: float) -> None:
        """One optimizer step along the sum of gradients, cut to the engine's largest 2-norm where it has one."""

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Features whose weights get no gradient, so that a backward to the pictures is activation-only."""
        return frozen(self.module)(images_BCHW)[0]

    def head(self) -> Head:
        """The last layer's weights as they are now, not to be changed."""
        head = self.module.get_submodule("head")
        assert isinstance(head, nn.Linear)
        return Head(head.weight.detach(), None if head.bias is None else head.bias.detach())

    def norm(self) -> torch.Tensor:
        """The 2-norm of what this rank holds of the model, NaN or infinite if one of its values is.

        Over all ranks that is every value. Not finite on some rank also where the last step's gradient was not,
        whatever the engine made of it.
        """
        return get_total_norm(self.held())

    def held(self) -> list[torch.Tensor]:
        """This rank's part of parameters and statistics."""
        return held(self.module)

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers (BatchNorm's running statistics), as DDP itself does before a forward."""
        share_buffers(self.module)

    def state(self) -> dict[str, Any]:
        """Tensors of model and optimizer by parameter name, of the same names and shapes whatever the engine.

        The optimizer's numbers (momentum, weight decay, …) are not among them: a run takes them from its settings.
        """
        model, optimizer = dcp_state.get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": {"state": optimizer["state"]}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, on any engine and any number of ranks."""
        settings = dcp_state.get_optimizer_state_dict(self.module, self.optimizer)["param_groups"]
        dcp_state.set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"] | {"param_groups": settings},
        )

    def _make_optimizer_state(self) -> None:
        """Have all of it there, as zeros, before the first step.

        DCP would make a step with gradients of zero for that, whose traces stay (weight decay in the momentum, a step
        counted): a save before the first step would change the run.
        """
        groups = [dict(group) for group in self.optimizer.param_groups]
        dcp_state.get_optimizer_state_dict(self.module, self.optimizer)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        for group, before in zip(self.optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)

    def close(self) -> None:  # noqa: B027 - nothing holds them here
        """Let go of model and optimizer. The engine is of no use any more."""


def share_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers of a module. Every rank must call this."""
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


def held(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and floating-point buffers of a module whose parameters are whole."""
    return [*module.parameters(), *(value for value in module.buffers() if value.is_floating_point())]


class DdpEngine(Engine):
    """PyTorch's DistributedDataParallel around a model and its optimizer.

    clip_norm: None cuts no gradient. scaler: scales the loss for float16, and leaves out a step whose gradient
    overflows; its state is part of the engine's.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(module, optimizer, ranks)
        self.clip_norm = clip_norm
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=False) if scaler is None else scaler
        gpus = [ranks.device.index] if ranks.device.type == "cuda" else None
        self._parallel = DistributedDataParallel(module, device_ids=gpus)
        self._last = True

    def settle(self, images_BCHW: torch.Tensor) -> None:
        """Let DDP regroup its gradient buckets now, before the first step. Leaves weights and statistics as they are.

        DDP regroups after its first backward pass, and a ring all-reduce over three or more ranks adds an element's
        summands in an order that depends on its place in a bucket. Without this, the first step after a resume would
        differ from the unbroken run's in the last bits. The optimizer's state is made too.
        """
        training = self.module.training
        self.module.eval()
        for _ in range(2):
            self._parallel(images_BCHW)[1].sum().backward()
        self.optimizer.zero_grad()
        self._make_optimizer_state()
        self.module.train(training)

    def forward(self, images_BCHW: torch.Tensor, last: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """See Engine."""
        self._last = last
        with self._averaging():
            features_BD, logits_BC = self._parallel(images_BCHW)
        return features_BD, logits_BC

    def backward(self, loss: torch.Tensor, leaves: Sequence[torch.Tensor] = ()) -> None:
        """See Engine. Other leaves of the graph than `leaves` cost nothing."""
        with self._averaging():
            self.scaler.scale(loss).backward(inputs=[*self.module.parameters(), *leaves])
        for leaf in leaves:
            if leaf.grad is not None:
                leaf.grad /= self.scaler.get_scale()  # reads from the device, so only where there is a leaf

    def _averaging(self) -> AbstractContextManager[None]:
        """What DDP wants around the forward and the backward of a piece."""
        return nullcontext() if self._last else self._parallel.no_sync()

    def step(self, lr: float) -> None:
        """See Engine."""
        self.scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            clip_grad_norm_(self.module.parameters(), self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """See Engine; with the scale of the loss, where there is one."""
        if not self.scaler.is_enabled():
            return super().state()
        saved = self.scaler.state_dict()
        scaler = {name: torch.tensor(saved[name], dtype=torch.float64) for name in SCALER}
        return super().state() | {"scaler": scaler}

    def restore(self, state: dict[str, Any]) -> None:
        """See Engine."""
        super().restore(state)
        if self.scaler.is_enabled():
            saved = {name: kind(state["scaler"][name]) for name, kind in SCALER.items()}
            self.scaler.load_state_dict(self.scaler.state_dict() | saved)

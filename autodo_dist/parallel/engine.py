"""Data-parallel training of a model behind a few verbs, so that the loop does not know who averages the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp_state
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autodo_dist.parallel.comm import Ranks


class DdpEngine:
    """PyTorch's DistributedDataParallel around a model and its optimizer. Every method is a collective but `module`."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.module, self.optimizer, self.ranks = module, optimizer, ranks
        gpus = [ranks.device.index] if ranks.device.type == "cuda" else None
        self._parallel = DistributedDataParallel(module, device_ids=gpus)

    def settle(self, images_BCHW: torch.Tensor) -> None:
        """Let DDP regroup its gradient buckets now, before the first step. Leaves weights and statistics as they are.

        DDP regroups after its first backward pass, and a ring all-reduce over three or more ranks adds an element's
        summands in an order that depends on its place in a bucket. Without this, the first step after a resume would
        differ from the unbroken run's in the last bits.
        """
        training = self.module.training
        self.module.eval()
        for _ in range(2):
            self._parallel(images_BCHW)[1].sum().backward()
        self.optimizer.zero_grad()
        self.module.train(training)

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of a batch, on the way to `step`."""
        features_BD, logits_BC = self._parallel(images_BCHW)
        return features_BD, logits_BC

    def step(self, loss: torch.Tensor, lr: float, leaves: Sequence[torch.Tensor] = ()) -> None:
        """One optimizer step along the gradient of the mean over ranks of `loss`; this rank's gradients go to `leaves`.

        Other leaves of the graph get none, so that nothing is computed for them.
        """
        loss.backward(inputs=[*self.module.parameters(), *leaves])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers (BatchNorm's running statistics), as DDP itself does before a forward."""
        for buffer in self.module.buffers():
            dist.broadcast(buffer, src=0)

    def state(self) -> dict[str, Any]:
        """Tensors of model and optimizer by parameter name, whatever the engine.

        The optimizer's numbers (momentum, weight decay, …) are not among them: a run takes them from its settings.
        """
        model, optimizer = dcp_state.get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": {"state": optimizer["state"]}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, on any number of ranks."""
        settings = dcp_state.get_optimizer_state_dict(self.module, self.optimizer)["param_groups"]
        dcp_state.set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"] | {"param_groups": settings},
        )

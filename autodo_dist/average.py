"""An exponential moving average of a model's weights and statistics, for evaluation.

w̄ ← d·w̄ + (1 − d)·w after every task step; w̄ = w after the first one (Polyak & Juditsky 1992; torch's AveragedModel)
"""

from __future__ import annotations

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autodo_dist.models import Classifier
from autodo_dist.parallel.engine import share_buffers


class Average:
    """The average of `model` with decay d; `module` is a classifier like it. Every rank keeps all of it."""

    def __init__(self, model: Classifier, decay: float) -> None:
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self._averaged.eval()

    @property
    def module(self) -> Classifier:
        """The averaged model, in eval mode."""
        found = self._averaged.module
        assert isinstance(found, Classifier)
        return found

    def update(self, model: Classifier) -> None:
        """Take in the weights after a step."""
        self._averaged.update_parameters(model)

    def share_buffers(self) -> None:
        """Give every rank rank 0's statistics, seen of its own part of the batches. Every rank must call this."""
        share_buffers(self.module)

    def state(self) -> dict[str, torch.Tensor]:
        """The averaged tensors and the number of updates; a load in place is a restore."""
        return dict(self._averaged.state_dict())

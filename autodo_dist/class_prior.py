"""Logit adjustment: the train loss of imbalanced classes, so that plain logits serve balanced ones.

The loss of a train picture sees logits z + τ·log π (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021,
eq. 10; with τ = 1 the balanced softmax of Ren et al., NeurIPS 2020). π_c is the share of class c in what is trained on,

    π_c ∝ Σ_i w_i q_ic,    q_i the one-hot given label where no soft label is learnt, w_i = 1 where no weight is

over the pictures of an epoch, by their rows when it begins. So the weights and labels that AutoDO learns need not spell
out the imbalance, which the adjustment accounts for, but what is wrong. Validation and test see z alone.
"""

from __future__ import annotations

import numpy as np
import torch

from autodo_dist.data import order
from autodo_dist.data.loader import Loader
from autodo_dist.hyperparameters import Hyperparameters, class_mass

LEAST = 1.0  # pictures that a class counts for at least, so that its logarithm is finite


def renew(adjustment_C: torch.Tensor, tau: float, task: Loader, epoch: int, rows: Hyperparameters | None) -> None:
    """Set τ·log π for an epoch of the task loader, in place. Every rank must call this."""
    ids = order.present(task.ids, task.absent, epoch)
    classes = len(adjustment_C)
    if rows is None:
        mass_C = class_mass({}, task.labels(ids), classes)
    else:
        mass_C = rows.class_mass(classes) + rows.start_mass(
            np.setdiff1d(ids, rows.table.ids, assume_unique=True), classes
        )
    share_C = mass_C.clamp(min=LEAST) / mass_C.clamp(min=LEAST).sum()
    adjustment_C.copy_(tau * share_C.log())

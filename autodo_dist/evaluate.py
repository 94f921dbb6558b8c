"""Loss and accuracy of a model over a whole part, every picture counted exactly once on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autodo_dist.data.loader import Batch, Loader
from autodo_dist.parallel.comm import Ranks


@torch.no_grad()
def outputs(
    module: nn.Module, loader: Loader, dtype: torch.dtype, before_batch: Callable[[], None] = lambda: None
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each batch of an evaluation pass that has pictures on this rank, and its logits (B × C).

    Leaves the module in eval mode. `before_batch` may break it off by an exception, on every rank alike. Every rank
    must call this, and take all of it.
    """
    module.eval()
    for batch in loader.batches(epoch=0):
        before_batch()
        images_BCHW = batch.images_BCHW.to(dtype)
        if len(batch):
            yield batch, module(images_BCHW)[1]
        else:  # a forward is a collective where weights are cut over ranks
            module(images_BCHW.new_zeros(1, *images_BCHW.shape[1:]))


@torch.no_grad()
def evaluate(
    module: nn.Module,
    loader: Loader,
    classes: tuple[str, ...],
    dtype: torch.dtype,
    ranks: Ranks,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Mean cross entropy (nats), top-1 accuracy (0 to 1), both over so many pictures, and accuracy per class.

    None where there is no picture. Leaves the module in eval mode. `before_batch` may break it off by an exception,
    on every rank alike. Every rank must call this.
    """
    counts_C2 = torch.zeros(len(classes), 2, dtype=torch.float64, device=ranks.device)  # hits, pictures
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for batch, logits_BC in outputs(module, loader, dtype, before_batch):
        loss += F.cross_entropy(logits_BC, batch.labels_B, reduction="sum")
        hits_B = (logits_BC.argmax(1) == batch.labels_B).double()
        counts_C2.index_add_(0, batch.labels_B, torch.stack([hits_B, torch.ones_like(hits_B)], 1))
    counts_C2, loss = ranks.sum(counts_C2), ranks.sum(loss)
    hits, pictures = counts_C2.sum(0).tolist()
    return {
        "loss": loss.item() / pictures if pictures else None,
        "pictures": int(pictures),
        "accuracy": hits / pictures if pictures else None,
        "accuracy_per_class": {
            name: hit / count if count else None for name, (hit, count) in zip(classes, counts_C2.tolist(), strict=True)
        },
    }

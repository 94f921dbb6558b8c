"""The two steps of the method on real batches and ranks: one trains the model, the other the rows."""

from __future__ import annotations

import numpy as np
import torch

from autodo_dist.build import Hyper, Parts
from autodo_dist.data.loader import Batch
from autodo_dist.method.hypergrad import (
    Rows,
    augmented,
    frozen,
    hypergradient,
    sample_weights,
    validation_gradient,
)
from autodo_dist.method.losses import sample_loss
from autodo_dist.parallel.comm import Ranks


def task_step(parts: Parts, batch: Batch, done: int, ranks: Ranks) -> torch.Tensor:
    """One step of SGD on Σ w_i l_i / (global batch), after `done` task steps.

    Gives this rank's summed loss, hits on the given labels, and pictures. Every rank must call this.
    """
    rows = parts.hyper.parameters.fetch(batch.ids_B) if parts.hyper is not None else Rows()
    images_BCHW = augmented(batch.images_BCHW.to(parts.dtype), rows, batch.draws_BD)
    torch.manual_seed(dropout_seed(parts.loaders.task.seed, done, ranks.rank))
    logits_BC = parts.engine.forward(images_BCHW)
    loss_B = sample_loss(parts.loss, logits_BC, batch.labels_B, rows.soft_logit)
    loss = (sample_weights(rows, loss_B) * loss_B).sum()
    # The engine takes the mean over ranks, whose parts of the batch may differ by one picture.
    parts.engine.step(loss * ranks.ranks / parts.loaders.task.batch_size, parts.lr(done))
    hits = (logits_BC.detach().argmax(1) == batch.labels_B).sum()
    return torch.stack([loss.detach().double(), hits.double(), hits.new_tensor(len(batch)).double()])


def dropout_seed(seed: int, done: int, rank: int) -> int:
    """The seed of a step's dropout masks: of the step, so that a resume repeats them, and of the rank's own samples."""
    return int(np.random.SeedSequence([seed, done, rank]).generate_state(1, np.uint64)[0] >> 1)


def hyper_step(
    parts: Parts, hyper: Hyper, batch: Batch, validation: Batch, lr: float, step: int, ranks: Ranks
) -> torch.Tensor:
    """Step number `step` (from 1) of RMSprop on the rows of `batch`, by the hypergradient of `validation`.

    The model must be in eval mode; it stays as it is. Gives the cosine of direction and validation gradient, the
    largest eigenvalue, and 1. Every rank must call this.
    """
    encoder = frozen(parts.model.encoder)
    valid_grad_CD = validation_gradient(
        encoder,
        parts.model.head,
        validation.images_BCHW.to(parts.dtype),
        validation.labels_B,
        size=parts.loaders.hyper_validation.batch_size,
        all_sum=ranks.sum,
    )
    found = hypergradient(
        encoder,
        parts.model.head,
        batch.images_BCHW.to(parts.dtype),
        batch.labels_B,
        batch.draws_BD,
        hyper.parameters.fetch(batch.ids_B),
        valid_grad_CD,
        loss=parts.loss,
        solve=hyper.solve,
        batch_size=parts.loaders.hyper.batch_size,
        all_sum=ranks.sum,
    )
    hyper.parameters.apply_grads(batch.ids_B, found.grads, lr=lr, step=step)
    return torch.stack([found.cosine.double(), found.eigenvalue.double(), torch.ones_like(found.cosine).double()])

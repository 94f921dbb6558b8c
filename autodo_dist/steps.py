"""The steps of a run on real batches and ranks: one trains the model, one the rows, one both from the same forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from autodo_dist.build import Hyper, Parts
from autodo_dist.data.loader import Batch
from autodo_dist.method.hypergrad import (
    Hypergradient,
    Rows,
    augmented,
    hypergradient,
    sample_weights,
    validation_gradient,
)
from autodo_dist.method.losses import sample_loss
from autodo_dist.parallel.comm import Ranks

# What a step adds to the running sums of a rank.
FIGURES = ("loss", "hits", "pictures", "cosine", "largest_eigenvalue", "hyper_steps")


@dataclass(frozen=True)
class Trained:
    """What a task step tells: FIGURES, and each sample's loss l_i before its weight."""

    figures: torch.Tensor
    loss_B: torch.Tensor


@dataclass(frozen=True)
class Forward:
    """A train batch on its way through the model. loss: the rank's part of the global mean, times the ranks."""

    features_BD: torch.Tensor
    loss: torch.Tensor
    trained: Trained


def task_step(parts: Parts, batch: Batch, done: int, ranks: Ranks) -> Trained:
    """One step of SGD on (1/B) Σ w_i l_i, after `done` task steps. Every rank must call this."""
    rows = parts.hyper.parameters.fetch(batch.ids_B, batch.next_ids_B) if parts.hyper is not None else Rows()
    forward = train_forward(parts, batch, rows, done, ranks)
    parts.engine.step(forward.loss, parts.lr(done))
    take_in(parts)
    return forward.trained


def hyper_step(parts: Parts, hyper: Hyper, batch: Batch, lr: float, step: int, ranks: Ranks) -> torch.Tensor:
    """Step number `step` (from 1) of RMSprop on the rows of `batch`, by the hypergradient of `hyper.valid_grad_CD`.

    The paper's way: a forward of its own through the frozen encoder. The model must be in eval mode; it stays as it is.
    Gives FIGURES. Every rank must call this.
    """
    rows, leaves = hyper.parameters.fetch(batch.ids_B, batch.next_ids_B).with_leaves(len(batch))
    with torch.set_grad_enabled(bool(leaves)):
        images_BCHW = augmented(batch.images_BCHW.to(parts.dtype), rows, batch.draws_BD, parts.pictures)
        features_BD = parts.engine.encode(images_BCHW)
    found = at_head(parts, hyper, features_BD, batch, rows, ranks)
    gates = torch.autograd.grad(features_BD, leaves, grad_outputs=found.feature_grad_BD) if leaves else ()
    hyper.parameters.apply_grads(batch.ids_B, found.rows(gates), lr=lr, step=step)
    return figures_of(found)


def shared_step(parts: Parts, hyper: Hyper, batch: Batch, done: int, lr: float, step: int, ranks: Ranks) -> Trained:
    """A task step and a hyper step from one forward, both from the state before the step.

    λ^A takes a backward through the activations more, or nothing in the Fisher form: its gradients are those of the
    task step's own backward, times a factor per sample. That is exact where a picture's loss depends on that picture
    alone; with BatchNorm's batch statistics it is an approximation. Every rank must call this.
    """
    rows, leaves = hyper.parameters.fetch(batch.ids_B, batch.next_ids_B).with_leaves(len(batch))
    forward = train_forward(parts, batch, rows, done, ranks)
    found = at_head(parts, hyper, forward.features_BD, batch, rows, ranks)
    gates: Sequence[torch.Tensor] = ()
    if leaves and found.factor_B is None:
        gates = torch.autograd.grad(forward.features_BD, leaves, grad_outputs=found.feature_grad_BD, retain_graph=True)
    parts.engine.step(forward.loss, parts.lr(done), leaves if found.factor_B is not None else ())
    if leaves and found.factor_B is not None:
        # A leaf's gradient is that of ranks/B · w_i l_i.
        factor_B1 = (found.factor_B * (parts.objective.batch_size / ranks.ranks))[:, None]
        gates = [factor_B1 * leaf.grad for leaf in leaves if leaf.grad is not None]
    take_in(parts)
    hyper.parameters.apply_grads(batch.ids_B, found.rows(gates), lr=lr, step=step)
    return replace(forward.trained, figures=forward.trained.figures + figures_of(found))


def take_in(parts: Parts) -> None:
    """Have the average, where there is one, take in the weights after a step."""
    if parts.average is not None:
        parts.average.update(parts.model)


def renew_validation(parts: Parts, hyper: Hyper, validation: Batch, ranks: Ranks) -> None:
    """Take the validation gradient anew, from this batch at the present weights. Every rank must call this.

    In eval mode, with rank 0's BatchNorm statistics, which it does not change; the mode is then as before.
    """
    training = parts.model.training
    if training:
        parts.engine.share_buffers()
        parts.model.eval()
    hyper.valid_grad_CD.copy_(
        validation_gradient(
            parts.model,
            parts.pictures.plain(validation.images_BCHW.to(parts.dtype)),
            validation.labels_B,
            size=parts.loaders.hyper_validation.batch_size,
            bias=parts.objective.bias,
            group=ranks,
        )
    )
    parts.model.train(training)


def train_forward(parts: Parts, batch: Batch, rows: Rows, done: int, ranks: Ranks) -> Forward:
    """The model's forward in train mode, and the weighted loss."""
    images_BCHW = augmented(batch.images_BCHW.to(parts.dtype), rows, batch.draws_BD, parts.pictures)
    torch.manual_seed(dropout_seed(parts.loaders.task.seed, done, ranks.rank))
    features_BD, logits_BC = parts.engine.forward(images_BCHW)
    objective = parts.objective
    loss_B = sample_loss(objective.loss, logits_BC, batch.labels_B, rows.soft_logit, objective.smoothing)
    loss = (sample_weights(rows, loss_B.detach(), parts.objective, ranks) * loss_B).sum()
    hits = (logits_BC.detach().argmax(1) == batch.labels_B).sum()
    figures = torch.zeros(len(FIGURES), dtype=torch.float64, device=loss.device)
    figures[:3] = torch.stack([loss.detach().double(), hits.double(), hits.new_tensor(len(batch)).double()])
    # The engine takes the mean over ranks, whose parts of the batch may differ by one picture.
    trained = Trained(figures, loss_B.detach())
    return Forward(features_BD, loss * ranks.ranks / parts.objective.batch_size, trained)


def dropout_seed(seed: int, done: int, rank: int) -> int:
    """The seed of a step's dropout masks: of the step, so that a resume repeats them, and of the rank's own samples."""
    return int(np.random.SeedSequence([seed, done, rank]).generate_state(1, np.uint64)[0] >> 1)


def at_head(
    parts: Parts, hyper: Hyper, features_BD: torch.Tensor, batch: Batch, rows: Rows, ranks: Ranks
) -> Hypergradient:
    """The hypergradient as far as the last layer gives it."""
    return hypergradient(
        features_BD.detach(),
        parts.engine.head(),
        batch.labels_B,
        rows,
        hyper.valid_grad_CD,
        parts.objective,
        hyper.solve,
        ranks,
    )


def figures_of(found: Hypergradient) -> torch.Tensor:
    """FIGURES of a hyper step."""
    mine = torch.stack([found.cosine, found.eigenvalue, torch.ones_like(found.cosine)]).double()
    return torch.cat([torch.zeros_like(mine), mine.nan_to_num(posinf=0.0, neginf=0.0)])

"""The steps of a run on real batches and ranks: one trains the model, one the rows, one both from the same forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from autodo_dist.build import Hyper, Parts
from autodo_dist.data.loader import Batch
from autodo_dist.errors import AutodoError
from autodo_dist.method.hypergrad import (
    Hypergradient,
    Pictures,
    Rows,
    augmented,
    hypergradient,
    sample_weights,
    validation_gradient,
)
from autodo_dist.method.losses import sample_loss
from autodo_dist.parallel.comm import Ranks

Outputs = tuple[torch.Tensor, torch.Tensor]  # features and logits
# What a step adds to the running sums of a rank.
FIGURES = ("loss", "hits", "pictures", "cosine", "largest_eigenvalue", "hyper_steps")


@dataclass(frozen=True)
class Trained:
    """What a task step tells: FIGURES, each sample's loss l_i before its weight, and the logits that the loss saw."""

    figures: torch.Tensor
    loss_B: torch.Tensor
    logits_BC: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """So much of a rank's part of a batch as goes through the model at once (train.accumulate).

    place: where it lies in the part. leaves: gates and magnitudes as leaves of a graph, where they are learnt.
    """

    place: slice
    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    draws_BD: torch.Tensor
    rows: Rows
    leaves: list[torch.Tensor]
    last: bool

    def augmented(self, pictures: Pictures) -> torch.Tensor:
        """The pictures as the model gets them."""
        return augmented(self.images_BCHW, self.rows, self.draws_BD, pictures)


@dataclass(frozen=True)
class Forward:
    """A piece on its way through the model. loss: its part of the global mean, times the ranks."""

    features_BD: torch.Tensor
    loss: torch.Tensor
    trained: Trained


def task_step(parts: Parts, batch: Batch, done: int, ranks: Ranks) -> Trained:
    """One step of SGD on (1/B) Σ w_i l_i, after `done` task steps. Every rank must call this."""
    rows = parts.hyper.parameters.fetch(batch.ids_B, batch.next_ids_B) if parts.hyper is not None else Rows()
    weight_B, trained = weights_of(parts, batch, rows, ranks), []
    seed_dropout(parts, done, ranks)
    for piece in pieces(parts.accumulate, parts.dtype, batch, rows):
        forward = train_forward(parts, piece, weight_B, ranks)
        parts.engine.backward(forward.loss)
        trained.append(forward.trained)
    finish(parts, done)
    found = together(trained)
    if parts.hyper is not None:
        parts.hyper.parameters.note_predictions(batch.ids_B, found.logits_BC, done)
    return found


def hyper_step(
    parts: Parts, hyper: Hyper, batch: Batch, lr: float, step: int, ranks: Ranks, *, renewed: bool = True
) -> torch.Tensor:
    """Step number `step` (from 1) of RMSprop on the rows of `batch`, by the hypergradient of `hyper.valid_grad_CD`.

    The paper's way: a forward of its own through the frozen encoder. The model must be in eval mode; it stays as it is.
    renewed: whether the validation gradient is new, without which λ^A that all samples share is left as it is.
    H is the whole batch's. So λ^A takes a second forward where that is in pieces, to hold the activations of one at a
    time. Gives FIGURES. Every rank must call this.
    """
    rows = hyper.parameters.fetch(batch.ids_B, batch.next_ids_B)
    cut = pieces(parts.accumulate, parts.dtype, batch, rows, learnt=renewed or not hyper.parameters.shares)
    with torch.set_grad_enabled(len(cut) == 1 and bool(cut[0].leaves)):
        features = [parts.engine.encode(piece.augmented(parts.pictures)) for piece in cut]
    found = at_head(parts, hyper, features, batch, rows, ranks)
    gates = []
    for piece, features_BD in zip(cut, features, strict=True):
        if piece.leaves:
            again = features_BD if len(cut) == 1 else parts.engine.encode(piece.augmented(parts.pictures))
            grad_BD = found.feature_grad_BD[piece.place]
            gates.append(torch.autograd.grad(again, piece.leaves, grad_outputs=grad_BD))
    hyper.parameters.apply_grads(batch.ids_B, found.rows(joined(gates)), lr=lr, step=step)
    return figures_of(found)


def shared_step(
    parts: Parts, hyper: Hyper, batch: Batch, done: int, lr: float, step: int, ranks: Ranks, *, renewed: bool = True
) -> Trained:
    """A task step and a hyper step from one forward, both from the state before the step; `renewed` as in hyper_step.

    λ^A takes a backward through the activations more, or nothing in the Fisher form: its gradients are those of the
    task step's own backward, times a factor per sample. That is exact where a picture's loss depends on that picture
    alone; with BatchNorm's batch statistics it is an approximation. Every rank must call this.
    """
    rows = hyper.parameters.fetch(batch.ids_B, batch.next_ids_B)
    cut = pieces(parts.accumulate, parts.dtype, batch, rows, learnt=renewed or not hyper.parameters.shares)
    weight_B = weights_of(parts, batch, rows, ranks)
    exact = bool(cut[0].leaves) and hyper.solve.solver != "fisher"
    found = None
    if exact and len(cut) > 1:
        found = at_head(parts, hyper, look_ahead(parts, cut, done, ranks), batch, rows, ranks)
    forwards: list[Forward] = []
    gates: list[Sequence[torch.Tensor]] = []
    seed_dropout(parts, done, ranks)
    for piece in cut:
        forward = train_forward(parts, piece, weight_B, ranks)
        if exact:
            found = found or at_head(parts, hyper, [forward.features_BD], batch, rows, ranks)
            grad_BD = found.feature_grad_BD[piece.place]
            gates.append(
                torch.autograd.grad(forward.features_BD, piece.leaves, grad_outputs=grad_BD, retain_graph=True)
            )
        parts.engine.backward(forward.loss, () if exact else piece.leaves)
        forwards.append(replace(forward, features_BD=forward.features_BD.detach(), loss=forward.loss.detach()))
    if found is None:
        found = at_head(parts, hyper, [forward.features_BD for forward in forwards], batch, rows, ranks)
        gates = [fisher_gates(parts, found, piece, ranks) for piece in cut]
    finish(parts, done)
    hyper.parameters.apply_grads(batch.ids_B, found.rows(joined(gates)), lr=lr, step=step)
    trained = together([forward.trained for forward in forwards])
    hyper.parameters.note_predictions(batch.ids_B, trained.logits_BC, done)
    return replace(trained, figures=trained.figures + figures_of(found))


def pieces(count: int, dtype: torch.dtype, batch: Batch, rows: Rows, learnt: bool = False) -> list[Piece]:
    """A rank's part of a batch, cut. AutodoError where dropped pictures left fewer than there are to be pieces."""
    images_BCHW = batch.images_BCHW.to(dtype)
    if len(batch) < count:
        raise AutodoError(
            f"train.accumulate = {count}: {len(batch)} pictures of this rank's part of a batch are left, the others "
            "did not decode; lower it, then run the same command again"
        )
    found = []
    for start, end in itertools.pairwise(len(batch) * k // count for k in range(count + 1)):
        place = slice(start, end)
        mine, leaves = rows.of(place).with_leaves(end - start) if learnt else (rows.of(place), [])
        found.append(
            Piece(
                place,
                images_BCHW[place],
                batch.labels_B[place],
                batch.draws_BD[place],
                mine,
                leaves,
                last=end == len(batch),
            )
        )
    return found


@torch.no_grad()
def look_ahead(parts: Parts, cut: Sequence[Piece], done: int, ranks: Ranks) -> list[torch.Tensor]:
    """The features that the step's forwards are going to give. BatchNorm's running statistics stay as they are."""
    kept = [buffer.clone() for buffer in parts.model.buffers()]
    seed_dropout(parts, done, ranks)
    features: list[torch.Tensor] = [parts.model(piece.augmented(parts.pictures))[0] for piece in cut]
    for buffer, value in zip(parts.model.buffers(), kept, strict=True):
        buffer.copy_(value)
    return features


def fisher_gates(parts: Parts, found: Hypergradient, piece: Piece, ranks: Ranks) -> list[torch.Tensor]:
    """The gradients of gates and magnitudes by the backward of the loss; a leaf's is that of ranks/B · w_i l_i."""
    if found.factor_B is None:
        return []
    factor_B1 = (found.factor_B[piece.place] * (parts.objective.batch_size / ranks.ranks))[:, None]
    return [factor_B1 * leaf.grad for leaf in piece.leaves if leaf.grad is not None]


def joined(gates: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Gates and magnitudes of all pieces; none where they are not learnt."""
    return [torch.cat(parts) for parts in zip(*gates, strict=True)]


def together(trained: Sequence[Trained]) -> Trained:
    """What the pieces of a step tell."""
    return Trained(
        torch.stack([piece.figures for piece in trained]).sum(0),
        torch.cat([piece.loss_B for piece in trained]),
        torch.cat([piece.logits_BC for piece in trained]),
    )


def finish(parts: Parts, done: int) -> None:
    """The optimizer's step; the average, where there is one, takes in the weights after it."""
    parts.engine.step(parts.lr(done))
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
    size = parts.loaders.hyper_validation.batch_size
    hyper.valid_grad_CD.copy_(
        validation_gradient(
            in_pieces(parts.model, parts.accumulate if size // ranks.ranks >= parts.accumulate else 1),
            parts.pictures.plain(validation.images_BCHW.to(parts.dtype)),
            validation.labels_B,
            size=size,
            bias=parts.objective.bias,
            group=ranks,
        )
    )
    parts.model.train(training)


def in_pieces(model: Callable[[torch.Tensor], Outputs], count: int) -> Callable[[torch.Tensor], Outputs]:
    """The model as a function that takes its pictures a piece at a time; every rank has one for each piece."""

    def call(images_BCHW: torch.Tensor) -> Outputs:
        features, logits = zip(*(model(piece) for piece in images_BCHW.tensor_split(count)), strict=True)
        return torch.cat(features), torch.cat(logits)

    return call


def weights_of(parts: Parts, batch: Batch, rows: Rows, ranks: Ranks) -> torch.Tensor:
    """w_i of a rank's part of a batch. Every rank must call this."""
    like_B = torch.ones(len(batch), dtype=parts.dtype, device=batch.labels_B.device)
    return sample_weights(rows, like_B, parts.objective, ranks)


def train_forward(parts: Parts, piece: Piece, weight_B: torch.Tensor, ranks: Ranks) -> Forward:
    """The model's forward in train mode, and the weighted loss; `weight_B` are those of the rank's whole part."""
    features_BD, logits_BC = parts.engine.forward(piece.augmented(parts.pictures), piece.last)
    objective = parts.objective
    seen_BC = objective.adjusted(logits_BC)
    loss_B = sample_loss(objective.loss, seen_BC, piece.labels_B, piece.rows.soft_logit, objective.smoothing)
    loss = (weight_B[piece.place] * loss_B).sum()
    hits = (logits_BC.detach().argmax(1) == piece.labels_B).sum()
    figures = torch.zeros(len(FIGURES), dtype=torch.float64, device=loss.device)
    figures[:3] = torch.stack([loss.detach().double(), hits.double(), hits.new_tensor(len(loss_B)).double()])
    # The engine takes the mean over ranks, whose parts of the batch may differ by one picture.
    trained = Trained(figures, loss_B.detach(), seen_BC.detach())
    return Forward(features_BD, loss * ranks.ranks / objective.batch_size, trained)


def seed_dropout(parts: Parts, done: int, ranks: Ranks) -> None:
    """Set the generator of dropout masks by the step, so that a resume repeats them, and by the rank."""
    state = np.random.SeedSequence([parts.loaders.task.seed, done, ranks.rank]).generate_state(1, np.uint64)
    seed = int(state[0] >> 1)
    if ranks.device.type == "cuda":
        torch.manual_seed(seed)
    else:  # where CUDA is not in use, torch.manual_seed notes the whole stack for it, in 2 ms
        torch.default_generator.manual_seed(seed)


def at_head(
    parts: Parts, hyper: Hyper, features: Sequence[torch.Tensor], batch: Batch, rows: Rows, ranks: Ranks
) -> Hypergradient:
    """The hypergradient as far as the last layer gives it; `features` are those of all pieces."""
    return hypergradient(
        torch.cat([features_BD.detach() for features_BD in features]),
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

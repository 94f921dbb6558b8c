"""What a run's model says of its train pictures as they are packed: a pass without gradients, kept in the run folder.

RUN/predictions.safetensors   columns of one checkpoint, whose step is in the metadata
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from autodo_dist.data.loader import Loader
from autodo_dist.data.split import Labels
from autodo_dist.evaluate import outputs
from autodo_dist.files import own_partial, whole
from autodo_dist.parallel.comm import Ranks

Numbers = npt.NDArray[np.float32]
NAME = "predictions.safetensors"
LIKELIEST = 5  # labels of a picture among which the one to suggest is looked for, beside the given one


@dataclass(frozen=True)
class Predictions:
    """Of each of N pictures: its given label's probability by p = softmax(logits); the label to suggest and how likely
    that is the true one, see `suggest`.

    NaN and -1 for a picture that was dropped, or that a shortened pass (train.steps_per_pass) did not come to.
    """

    given_N: Numbers
    suggested_N: Labels
    suggested_share_N: Numbers


@torch.no_grad()
def predict(
    module: nn.Module,
    loader: Loader,
    classes: int,
    dtype: torch.dtype,
    ranks: Ranks,
    before_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    """The word of `module` on every sample of an evaluation pass, in the order of its ids, the same on every rank.

    Leaves the module in eval mode. `before_batch` may break it off by an exception, on every rank alike. Every rank
    must call this.
    """
    kept = min(LIKELIEST, classes)
    mine = [np.empty(0, row_type(kept))]
    sum_CC = torch.zeros(classes, classes, dtype=torch.float64, device=ranks.device)
    for batch, logits_BC in outputs(module, loader, dtype, before_batch):
        share_BC = logits_BC.softmax(1)
        sum_CC.index_add_(0, batch.labels_B, share_BC.double())
        top = share_BC.topk(kept)
        given_B = share_BC.gather(1, batch.labels_B[:, None])[:, 0]
        rows_B = np.empty(len(batch), row_type(kept))
        columns = batch.ids_B, batch.labels_B, given_B, top.indices, top.values
        for name, column in zip(rows_B.dtype.names or (), columns, strict=True):
            rows_B[name] = column.cpu().numpy()
        mine.append(rows_B)
    rows_n = np.concatenate(ranks.gather(np.concatenate(mine)))
    suggested_n, share_n = suggest(rows_n, ranks.sum(sum_CC).cpu().numpy())
    place, count = np.searchsorted(loader.ids, rows_n["id"]), len(loader.ids)
    given_N, share_N = np.full((2, count), np.nan, np.float32)
    suggested_N = np.full(count, -1, np.int32)
    given_N[place], suggested_N[place], share_N[place] = rows_n["given_share"], suggested_n, share_n
    return Predictions(given_N, suggested_N, share_N)


def row_type(kept: int) -> np.dtype[np.void]:
    """What is kept of a picture: its `kept` likeliest labels with their shares, the likeliest first."""
    return np.dtype(
        [("id", "i8"), ("given", "i4"), ("given_share", "f4"), ("label", "i4", (kept,)), ("share", "f4", (kept,))]
    )


def suggest(rows_n: npt.NDArray[np.void], sum_CC: npt.NDArray[np.float64]) -> tuple[Labels, Numbers]:
    """The likeliest true label of each picture with given label y, and its probability, from p and y together.

    By Bayes' rule p(c)·Q(y, c) / Σ_c p(c)·Q(y, c): p is what the picture says, Q(y, ·) how often which label is true
    where y was given, estimated as the mean of p over all pictures with that label (the soft confusion matrix, of
    which sum_CC holds the sums). So where the given labels are mostly right, it takes much to overrule y, and where one
    class is often mistaken for another, little to name that one. It takes p to be of balanced classes, as logit
    adjustment makes it: p of a network that learnt the class shares counts them twice. Over the likeliest labels and y.
    """
    counts_C1 = sum_CC.sum(1, keepdims=True)
    q_CC = np.divide(sum_CC, counts_C1, out=np.full_like(sum_CC, 1 / len(sum_CC)), where=counts_C1 > 0)
    given_n1 = rows_n["given"][:, None]
    label_nK = np.concatenate([rows_n["label"], given_n1], 1)
    share_nK = np.concatenate([rows_n["share"], rows_n["given_share"][:, None]], 1).astype(np.float64)
    share_nK[:, -1] *= (rows_n["label"] != given_n1).all(1)  # it is there once
    both_nK = share_nK * q_CC[given_n1, label_nK]
    best_n1 = both_nK.argmax(1)[:, None]
    total_n1 = both_nK.sum(1, keepdims=True)
    return (
        np.take_along_axis(label_nK, best_n1, 1)[:, 0].astype(np.int32),
        (np.take_along_axis(both_nK, best_n1, 1) / total_n1)[:, 0].astype(np.float32),
    )


def write_predictions(run: Path, step: int, found: Predictions) -> None:
    """Keep the predictions of the checkpoint of that step, in place of those of another."""
    path = run / NAME
    with whole(path, own_partial(path)) as partial:
        save_file(vars(found), partial, metadata={"autodo": json.dumps({"step": step})})


def read_predictions(run: Path, step: int, samples: int) -> Predictions | None:
    """The predictions that are kept of the checkpoint of that step; None if there are none, or of other samples."""
    try:
        with safe_open(run / NAME, "numpy") as file:
            if json.loads(file.metadata()["autodo"]) != {"step": step}:
                return None
            found = Predictions(*(file.get_tensor(name) for name in Predictions.__dataclass_fields__))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return found if len(found.given_N) == samples else None

"""What a run's model says of its train pictures as they are packed: a pass without gradients, kept in the run folder.

RUN/predictions.safetensors   columns of one checkpoint, whose step is in the metadata
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from autodo_dist.data.loader import Batch, Loader
from autodo_dist.files import own_partial, whole
from autodo_dist.models import Classifier
from autodo_dist.parallel.comm import Ranks

NAME = "predictions.safetensors"
MOST_CLEAN = 10_000  # clean pictures that teach the last layer, evenly over all: a minute's fit at 1,000 classes
PRIOR = 0.1  # chosen on house numbers at seed 100, 20 % uniform and 40 % asymmetric noise, of 0.001, 0.01, 0.1, 1


@dataclass(frozen=True)
class Predictions:
    """Of p = softmax(logits) of each of N pictures: that of its given label, the likeliest label, and that one's.

    clean_N: the given label's by the same features with a last layer that the clean validation part taught, see
    `clean_head`. NaN and -1 for a picture that was dropped, or that a shortened pass (train.steps_per_pass) did not
    come to.
    """

    given_N: npt.NDArray[np.float32]
    label_N: npt.NDArray[np.int32]
    likeliest_N: npt.NDArray[np.float32]
    clean_N: npt.NDArray[np.float32]


@torch.no_grad()
def predict(
    module: Classifier,
    train: Loader,
    clean: Loader,
    dtype: torch.dtype,
    ranks: Ranks,
    before_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    """The word of `module` on every sample of an evaluation pass over `train`, in the order of its ids.

    The same on every rank. `clean` is a pass over pictures whose labels are true. Leaves the module in eval mode.
    `before_batch` may break it off by an exception, on every rank alike. Every rank must call this.
    """
    module.eval()
    clean = clean.over(clean.ids[:: math.ceil(len(clean.ids) / MOST_CLEAN) or 1])
    seen = [
        (batch.ids_B, batch.labels_B, features_BD)
        for batch, features_BD, _ in outputs(module, clean, dtype, before_batch)
    ]
    columns = [torch.cat(it).cpu() for it in zip(*seen, strict=True)] if seen else []
    ids_V, labels_V, features_VD = (torch.cat(it) for it in zip(*filter(None, ranks.gather(columns)), strict=True))
    order_V = ids_V.argsort()  # the same sums on any number of ranks
    classes = module.head.out_features
    features_VD, labels_V = (it[order_V].to(ranks.device) for it in (features_VD, labels_V))
    head = ranks.from_main(clean_head(features_VD, labels_V, classes) if ranks.main else None)
    assert head is not None
    weight_CD, bias_C = (it.to(ranks.device) for it in head)

    mine: list[torch.Tensor] = []
    for batch, features_BD, logits_BC in outputs(module, train, dtype, before_batch):
        likeliest_B, label_B = logits_BC.softmax(1).max(1)
        shares = (logits_BC.softmax(1), (features_BD.double() @ weight_CD.T + bias_C).softmax(1))
        given_B, clean_B = (share_BC.gather(1, batch.labels_B[:, None])[:, 0] for share_BC in shares)
        columns = [batch.ids_B, given_B, label_B, likeliest_B, clean_B]
        mine.append(torch.stack([it.double() for it in columns]).cpu())
    parts = ranks.gather(torch.cat([torch.empty(5, 0, dtype=torch.float64), *mine], 1).numpy())
    ids, *values = np.concatenate(parts, 1)
    place = np.searchsorted(train.ids, ids.astype(np.int64))
    found = []
    for value, none, kind in zip(values, (np.nan, -1, np.nan, np.nan), ("f4", "i4", "f4", "f4"), strict=True):
        found.append(np.full(len(train.ids), none, kind))
        found[-1][place] = value
    return Predictions(*found)


def outputs(
    module: Classifier, loader: Loader, dtype: torch.dtype, before_batch: Callable[[], None]
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """Each batch of an evaluation pass that has pictures, with its features and logits. Every rank must call this."""
    for batch in loader.batches(epoch=0):
        before_batch()
        images_BCHW = batch.images_BCHW.to(dtype)
        if len(batch):
            yield batch, *module(images_BCHW)
        else:  # a forward is a collective where weights are cut over ranks
            module(images_BCHW.new_zeros(1, *images_BCHW.shape[1:]))


@torch.enable_grad()
def clean_head(features_VD: torch.Tensor, labels_V: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C × D) and bias of the last layer that clean pictures alone teach, in float64.

    argmin Σ CE(W x + b, y) + |W|²/2·PRIOR over standardised features x: multinomial logistic regression with a Gaussian
    prior of variance PRIOR. The encoder has seen every train picture, this layer no given label at all.
    """
    mean_D, std_D = features_VD.double().mean(0), features_VD.double().std(0, correction=0) + 1e-6
    x_VD = (features_VD.double() - mean_D) / std_D
    weight_CD, bias_C = x_VD.new_zeros(classes, x_VD.shape[1]), x_VD.new_zeros(classes)
    free = [weight_CD.requires_grad_(), bias_C.requires_grad_()]
    solver = torch.optim.LBFGS(
        free, max_iter=300, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        fit = F.cross_entropy(x_VD @ weight_CD.T + bias_C, labels_V, reduction="sum")
        value = (fit + weight_CD.square().sum() / (2 * PRIOR)) / len(x_VD)
        value.backward()
        return value

    solver.step(loss)
    weight_CD, bias_C = weight_CD.detach() / std_D, bias_C.detach()
    return weight_CD.cpu(), (bias_C - weight_CD @ mean_D).cpu()


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

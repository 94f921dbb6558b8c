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
from autodo_dist.evaluate import outputs
from autodo_dist.files import own_partial, whole
from autodo_dist.parallel.comm import Ranks

NAME = "predictions.safetensors"


@dataclass(frozen=True)
class Predictions:
    """Of p = softmax(logits) of each of N pictures: that of its given label, the likeliest label, and that one's.

    NaN and -1 for a picture that was dropped, or that a shortened pass (train.steps_per_pass) did not come to.
    """

    given_N: npt.NDArray[np.float32]
    label_N: npt.NDArray[np.int32]
    likeliest_N: npt.NDArray[np.float32]


@torch.no_grad()
def predict(
    module: nn.Module, loader: Loader, dtype: torch.dtype, ranks: Ranks, before_batch: Callable[[], None] = lambda: None
) -> Predictions:
    """The word of `module` on every sample of an evaluation pass, in the order of its ids, the same on every rank.

    Leaves the module in eval mode. `before_batch` may break it off by an exception, on every rank alike. Every rank
    must call this.
    """
    mine: list[torch.Tensor] = []
    for batch, logits_BC in outputs(module, loader, dtype, before_batch):
        share_BC = logits_BC.softmax(1)
        likeliest_B, label_B = share_BC.max(1)
        given_B = share_BC.gather(1, batch.labels_B[:, None])[:, 0]
        mine.append(torch.stack([batch.ids_B.double(), given_B.double(), label_B.double(), likeliest_B.double()]).cpu())
    parts = ranks.gather(torch.cat([torch.empty(4, 0, dtype=torch.float64), *mine], 1).numpy())
    ids, given, label, likeliest = np.concatenate(parts, 1)
    place = np.searchsorted(loader.ids, ids.astype(np.int64))
    found = Predictions(
        *(np.full(len(loader.ids), none, kind) for none, kind in ((np.nan, "f4"), (-1, "i4"), (np.nan, "f4")))
    )
    found.given_N[place], found.label_N[place], found.likeliest_N[place] = given, label, likeliest
    return found


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

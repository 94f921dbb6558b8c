"""What a run has learnt of its train samples, read from a checkpoint: block by block, so tables may exceed the memory.

A reader opens a source, and takes from it what it needs:

    source = open_source(Path("runs/digits"))       config, data, split, and the newest checkpoint, unread
    for block in source.blocks(): …                 rows as they are stored, about BLOCK bytes of them at a time
    columns = read_columns(source)                  a few numbers for every sample
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autodo_dist import build, build_data, run_folder
from autodo_dist.config import Config
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Labels, Split
from autodo_dist.errors import AutodoError
from autodo_dist.hyperparameters import Layout
from autodo_dist.method import losses
from autodo_dist.parallel.checkpoint_rows import RowReader, find_checkpoint
from autodo_dist.predictions import Predictions, read_predictions

LIKELIEST = 3  # labels of a soft label that are shown
BLOCK = 1 << 24  # bytes of the table that are in memory together, beside what is made of them

Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """A run's settings, its data and split, and one of its checkpoints."""

    run: Path
    config: Config
    manifest: Manifest
    split: Split
    layout: Layout
    reader: RowReader

    @functools.cached_property
    def wrong_N(self) -> npt.NDArray[np.bool_] | None:
        """Of each train sample, whether its given label is not the packed one, which is then the true one; None where
        no label is: the truth is not known.
        """
        train = self.split.train
        differs_N = self.split.label_N[train] != self.manifest.label_N[train]
        return differs_N if differs_N.any() else None

    @property
    def truth_known(self) -> bool:
        """Whether `wrong_N` is."""
        return self.wrong_N is not None

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self.reader.header.step

    def blocks(self) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """Consecutive samples of split.train, and what is stored of them: the layout's groups, float32 or float64.

        No groups where none is learnt per sample.
        """
        if not self.layout.width:
            count, step = len(self.split.train), BLOCK // 64
            yield from ((slice(start, min(count, start + step)), {}) for start in range(0, count, step))
            return
        for start, stop in self.reader.blocks("hyper.rows.value", BLOCK):
            values_nP = self.reader.between("hyper.rows.value", start, stop)
            wide = values_nP if values_nP.dtype == torch.float64 else values_nP.float()
            yield slice(start, stop), self.layout.split(wide)

    def shared(self) -> dict[str, dict[str, float]] | None:
        """The augmentation that all samples share; None where they do not."""
        if self.layout.augment != "shared":
            return None
        return augmentation(self.layout.operations, *self.reader.whole("hyper.shared.value").double().chunk(2))


@dataclass(frozen=True)
class Columns:
    """A few numbers for each of the N train samples, in the order of ids; None where the run does not learn them.

    weight: κ·softplus(λ^W), 1 at the start. Of the soft label q = softmax(λ^S): `learnt`, the likeliest class, its
    probability, and that of the given label. Of the model's prediction, where the run or `autodo labels` has made a
    pass over the train pictures with this checkpoint: the given label's probability, and the label that both together
    suggest (predictions.suggest), with its own; NaN and -1 for pictures that it left out. last_update: the hyper step
    of the last one, 0 for never.
    gate_CK, magnitude_CK: means over each given class's samples, NaN for a class without any.
    """

    id_N: Ids
    given_N: Labels
    weight_N: Numbers | None = None
    learnt_N: Labels | None = None
    learnt_probability_N: Numbers | None = None
    given_probability_N: Numbers | None = None
    given_prediction_N: Numbers | None = None
    suggested_N: Labels | None = None
    suggested_probability_N: Numbers | None = None
    last_update_N: npt.NDArray[np.int64] | None = None
    gate_CK: Numbers | None = None
    magnitude_CK: Numbers | None = None


def augmentation(
    operations: Sequence[str], gate_K: torch.Tensor, magnitude_K: torch.Tensor
) -> dict[str, dict[str, float]]:
    """Gate probability and magnitude (a share of the range) of each operation, from their logits."""
    values = zip(gate_K.sigmoid().tolist(), magnitude_K.sigmoid().tolist(), strict=True)
    return {name: {"probability": p, "magnitude": m} for name, (p, m) in zip(operations, values, strict=True)}


def readable(
    layout: Layout, values_nP: torch.Tensor, given_n: Labels, updated_n: torch.Tensor, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """What stored rows say: weight, likeliest labels and the given one's probability, augmentation, last hyper step.

    Groups that are not learnt per sample are left out.
    """
    if not layout.width:
        return [{} for _ in given_n]
    groups = layout.split(values_nP.double())
    columns: dict[str, list[Any]] = {}
    if "weight_logit" in groups:
        columns["weight"] = losses.weight(groups["weight_logit"]).tolist()
    if "soft_logit" in groups:
        soft_nC = groups["soft_logit"].softmax(1)
        top = soft_nC.topk(min(LIKELIEST, layout.classes))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        columns["soft_label"] = [{classes[k]: p for k, p in zip(*pair, strict=True)} for pair in pairs]
        columns["given_probability"] = soft_nC[range(len(given_n)), given_n.tolist()].tolist()
    if "gate_logit" in groups:
        both = zip(groups["gate_logit"], groups["magnitude_logit"], strict=True)
        columns["augment"] = [augmentation(layout.operations, *logits) for logits in both]
    columns["last_hyper_step"] = updated_n.tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def open_source(run: Path, step: int | None = None, data: Path | str | None = None) -> Source:
    """What the run's checkpoint of that step (None: the newest) has learnt; `data` is where the data set lies by now.

    AutodoError for a run that learns nothing, has no such checkpoint, or was made with other data.
    """
    config = run_folder.read_config(run)
    if not config.learn.anything:
        raise AutodoError(f"run {run}: learns nothing of its samples (learn.augment, weight, soft_label are all off)")
    return source_of(run, config, RowReader(find_checkpoint(run / "checkpoints", step)), data)


def source_of(run: Path, config: Config, reader: RowReader, data: Path | str | None = None) -> Source:
    """What a checkpoint has learnt. AutodoError if its rows are not those of the settings and the data."""
    manifest = build_data.read_data_of(run, config, data)
    split = build_data.build_split(config, manifest)
    layout = build.build_layout(config, len(manifest.classes))
    if layout.width and reader.size("hyper.rows.value") != (len(split.train), layout.width):
        raise AutodoError(
            f"checkpoint {reader.path}: its rows are not those of config.yaml and the data set's train part"
        )
    return Source(run, config, manifest, split, layout, reader)


def read_columns(source: Source, predictions: Predictions | None = None) -> Columns:
    """The columns of all samples, in one pass over the table; `predictions` are by default those of the run folder."""
    ids, layout, classes = source.split.train, source.layout, len(source.manifest.classes)
    given_N = source.split.label_N[ids]
    widths, count = layout.widths, len(ids)
    weight_N, share_N, own_N = (np.empty(count, np.float32) for _ in range(3))
    learnt_N = np.empty(count, np.int32)
    sums_2CK = torch.zeros(2, classes, len(layout.operations), dtype=torch.float64)
    for part, groups in source.blocks():
        given_n = torch.from_numpy(given_N[part]).long()
        if "weight_logit" in groups:
            weight_N[part] = losses.weight(groups["weight_logit"]).numpy()
        if "soft_logit" in groups:
            soft_nC = torch.softmax(groups["soft_logit"], 1)
            share_n, label_n = soft_nC.max(1)
            share_N[part], learnt_N[part] = share_n.numpy(), label_n.numpy()
            own_N[part] = soft_nC.gather(1, given_n[:, None])[:, 0].numpy()
        if "gate_logit" in groups:
            for sum_CK, name in zip(sums_2CK, ("gate_logit", "magnitude_logit"), strict=True):
                sum_CK.index_add_(0, given_n, groups[name].sigmoid().double())
    columns: dict[str, Any] = {}
    if widths["weight_logit"]:
        columns["weight_N"] = weight_N
    if widths["soft_logit"]:
        columns |= {"learnt_N": learnt_N, "learnt_probability_N": share_N, "given_probability_N": own_N}
    if widths["gate_logit"]:
        counts_C1 = np.bincount(given_N, minlength=classes)[:, None]
        with np.errstate(invalid="ignore"):
            columns["gate_CK"], columns["magnitude_CK"] = (sums_2CK.numpy() / counts_C1).astype(np.float32)
    predictions = predictions or read_predictions(source.run, source.step, count)
    if predictions is not None:
        columns |= {"given_prediction_N": predictions.given_N, "suggested_N": predictions.suggested_N}
        columns["suggested_probability_N"] = predictions.suggested_share_N
    if layout.width:
        columns["last_update_N"] = source.reader.whole("hyper.rows.touched").numpy()
    return Columns(ids, given_N, **columns)

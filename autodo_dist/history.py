"""Rows over time: RUN/history.jsonl, what a few train samples had learnt at the end of every few epochs.

    {"step": 1200, "epoch": 4, "id": 42, "weight": 0.31, "soft_label": {"cat": 0.9, …}, "given_probability": 0.05,
     "augment": {"rotate": {"probability": 0.2, "magnitude": 0.5}, …}, "last_hyper_step": 600,
     "gate_logit": [-1.386, …], "magnitude_logit": [0.0, …]}

`epoch` counts those done. The logits are the stored numbers, from which `autodo explain` warps a picture again to the
bit. Where all samples share the augmentation, a line without id has it, and is the first of its epoch.
"""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from pathlib import Path

import torch

from autodo_dist.data.order import Ids
from autodo_dist.files import sync
from autodo_dist.hyperparameters import Hyperparameters
from autodo_dist.learnt import augmentation, readable
from autodo_dist.metrics import LineFile

NAME = "history.jsonl"
LOGITS = ("gate_logit", "magnitude_logit")


class History:
    """Keeps the rows of `ids`. Lines are written once in an epoch, after its last step and before it counts as done.

    So a resume, which knows how many epochs are done, cuts off exactly the lines that will be written again.
    """

    def __init__(self, folder: Path, ids: Ids, classes: tuple[str, ...], epochs_done: int, main: bool) -> None:
        """On rank 0 (`main`), open the folder's file after the lines of the epochs that are done."""
        self.ids, self.classes, self.path = ids, classes, folder / NAME
        self.file = LineFile(self.path, kept(self.path, epochs_done)) if main else None

    def note(self, parameters: Hyperparameters, step: int, epoch: int) -> None:
        """Write the rows as they are after so many steps and, with this one, epochs. Every rank must call this."""
        ids = self.ids if self.file is not None else self.ids[:0]
        values_nP, updated_n = parameters.look_up(torch.from_numpy(ids))
        if self.file is None:
            return
        at = {"step": step, "epoch": epoch}
        layout = parameters.layout
        if layout.augment == "shared":
            gate_K, magnitude_K = parameters.shared.value_P.cpu().double().chunk(2)
            shared = {"augment": augmentation(layout.operations, gate_K, magnitude_K)}
            self.file.write(at | shared | {"gate_logit": gate_K.tolist(), "magnitude_logit": magnitude_K.tolist()})
        if layout.width:
            rows = readable(layout, values_nP, parameters.label_N[ids], updated_n, self.classes)
            for id_, row, values_P in zip(ids.tolist(), rows, values_nP, strict=True):
                groups = layout.split(values_P[None].double())  # a stored number is written as the one it equals
                logits = {name: groups[name][0].tolist() for name in LOGITS if name in groups}
                self.file.write(at | {"id": id_} | row | logits)
        with suppress(OSError):  # of which LineFile has warned
            sync(self.path)  # before a checkpoint says that the epoch is done

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def kept(path: Path, epochs_done: int) -> int:
    """How many of the file's first lines are of epochs that are done."""

    def done(line: str) -> bool:
        with suppress(ValueError, TypeError, KeyError):
            return bool(json.loads(line)["epoch"] <= epochs_done)
        return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return len(list(itertools.takewhile(done, lines)))

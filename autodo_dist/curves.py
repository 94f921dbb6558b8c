"""The numbers of metrics.jsonl as curves for TensorBoard, in RUN/tensorboard: an optional copy, nothing reads it back.

    loss, accuracy      train, validation, test      in one chart each: loss/train, loss/validation, …
    all other numbers   NAME/task, NAME/hyper        lr/task, cosine/hyper, images_per_second/task, …

Every start of a run adds a file. It begins with the step from which its points replace those of earlier starts, and
TensorBoard leaves these out.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autodo_dist.errors import AutodoError

log = logging.getLogger(__name__)
NAME = "tensorboard"
FLUSH_S = 10  # seconds after which points are on the disk
_EVALUATED = ("loss", "accuracy")


def check(wanted: bool) -> None:
    """AutodoError if curves are wanted and the package tensorboard is not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise AutodoError(
            "train.tensorboard = true: the package tensorboard is not installed; pip install tensorboard, or set it "
            "to false"
        )


def points(row: dict[str, Any]) -> dict[str, float]:
    """The curves that a line of metrics.jsonl adds a point to, and its value."""
    kind, found = row["kind"], {}
    for name, value in row.items():
        part, _, what = name.partition("_")
        if kind == "evaluation" and what in _EVALUATED:
            found[f"{what}/{part}"] = value
        elif kind != "evaluation" and name not in ("kind", "step", "epoch"):
            found[f"{name}/{'train' if name in _EVALUATED else kind}"] = value
    return {name: value for name, value in found.items() if value is not None}


class Curves:
    """Writes them. A disk that does not take them does no harm to the run."""

    def __init__(self, folder: Path, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """On from `step`, whose points are written anew: those of `lines`, all that metrics.jsonl holds by now."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / NAME), purge_step=step, flush_secs=FLUSH_S)
        self._broken = False
        for row in lines:
            if row["step"] >= step:
                self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        """Add the points of a line."""
        if self._broken:
            return
        try:
            for name, value in points(row).items():
                self._writer.add_scalar(name, value, row["step"])
        except OSError as error:
            self._broken = True
            log.warning("%s: cannot be written (%s); no more curves in this start", NAME, error)

    def close(self) -> None:
        """Write what is left."""
        try:
            self._writer.close()
        except OSError as error:
            log.warning("%s: cannot be written (%s)", NAME, error)

"""Losses and weights that are NaN or infinite: with which step and samples it began, and the batches left out since.

A step keeps a few small tensors and nothing is read from the device before the next look: at every line of metrics and
before every save. So it is noticed late, when bad gradients have long reached weights and momentum; but it is known
exactly where it began, and nothing later is ever saved or evaluated. Going back to the newest checkpoint undoes it all.

    nonfinite.jsonl     a line for each batch that is left out: step, epoch, pass, position, loss, ids
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from autodo_dist.data.loader import Batch
from autodo_dist.errors import AutodoError
from autodo_dist.files import write_text
from autodo_dist.parallel.comm import Ranks
from autodo_dist.steps import Trained

NAMED = 10  # ids in a message
Place = tuple[int, str, int]  # epoch, pass, position in the pass: a global batch, on any number of ranks


@dataclass(frozen=True)
class Fault:
    """The first global batch whose loss or gradient was not finite; a line of nonfinite.jsonl.

    step: counted from 1, as in metrics.jsonl. loss: the weighted mean over the batch, in words, as JSON knows no NaN.
    ids: the samples whose own loss is not finite; all of the batch where each one's loss is.
    """

    step: int
    epoch: int
    pass_: str
    position: int
    loss: str
    ids: list[int]

    @property
    def place(self) -> Place:
        """Which global batch it was."""
        return self.epoch, self.pass_, self.position

    def __str__(self) -> str:
        """What was not finite, where it began, and with which samples."""
        named = ", ".join(map(str, self.ids[:NAMED])) + (", …" if len(self.ids) > NAMED else "")
        if math.isfinite(float(self.loss)):
            return f"step {self.step}: the gradient is not finite (loss {self.loss}), batch of ids {named}"
        return f"step {self.step}: the loss is {self.loss}, not finite for ids {named}"


class NotFinite(Exception):
    """Raised on every rank alike; train.py decides what follows."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass(frozen=True)
class Seen:
    """A step that was made. loss: weighted sum over this rank's samples; norm: of its part of the model, after it."""

    step: int
    place: Place
    ids_B: torch.Tensor
    loss_B: torch.Tensor
    loss: torch.Tensor
    norm: torch.Tensor


class Watch:
    """The steps made since the last look. A gradient that is not finite makes the weights so in the same step.

    `norm` gives the 2-norm of the model, as Engine.norm does. A weight beyond 1.8e19 counts as infinite too: its square
    is, in float32. No other norm is read as fast on a CPU.
    """

    def __init__(self, norm: Callable[[], torch.Tensor], ranks: Ranks) -> None:
        self.norm, self.ranks = norm, ranks
        self.steps: list[Seen] = []

    @torch.no_grad()
    def note(self, step: int, place: Place, ids_B: torch.Tensor, trained: Trained) -> None:
        """Keep what `look` needs of a step, right after it. Costs one reading of the model's values, and no wait."""
        self.steps.append(Seen(step, place, ids_B, trained.loss_B, trained.figures[0], self.norm()))

    def look(self) -> None:
        """Read the steps since the last look; NotFinite tells of the first bad one. Every rank must call this."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        values = [torch.stack([seen.loss, seen.norm.double()]) for seen in steps]
        finite = torch.stack(values).isfinite().all(1).tolist()
        first = min(self.ranks.gather(finite.index(False) if False in finite else len(steps)))
        if first < len(steps):
            raise NotFinite(self._fault(steps[first]))

    def _fault(self, seen: Seen) -> Fault:
        own = seen.ids_B[~seen.loss_B.isfinite()].tolist()
        loss, pictures = seen.loss.item(), len(seen.ids_B)
        losses, counts, owns, alls = zip(*self.ranks.gather((loss, pictures, own, seen.ids_B.tolist())), strict=True)
        ids = [id_ for part in owns for id_ in part] or [id_ for part in alls for id_ in part]
        return Fault(seen.step, *seen.place, f"{sum(losses) / sum(counts):.6g}", ids)


def without(batches: Iterator[Batch], start: int, left_out: Collection[int]) -> Iterator[Batch | None]:
    """The batches of a pass from position `start` on, None in place of those at positions that are left out.

    The batch before such a one names the ids of the next that is not left out, as those are fetched next.
    """
    numbered = enumerate(batches, start)
    for position, batch in numbered:
        if position in left_out:
            yield None
            continue
        gap = 0
        while position + gap + 1 in left_out:
            _, missing = next(numbered)
            batch, gap = replace(batch, next_ids_B=missing.next_ids_B), gap + 1
        yield batch
        yield from [None] * gap


def record(folder: Path, fault: Fault) -> None:
    """Add a line to the folder's nonfinite.jsonl. AutodoError if it cannot be written."""
    text = "".join(json.dumps(asdict(line)) + "\n" for line in [*recorded(folder), fault])
    try:
        write_text(folder / "nonfinite.jsonl", text)
    except OSError as error:
        raise AutodoError(
            f"{fault}; {folder / 'nonfinite.jsonl'}: cannot be written ({error.strerror}); free space or mend the "
            "disk, then run the same command again"
        ) from error


def recorded(folder: Path) -> list[Fault]:
    """The lines of the folder's nonfinite.jsonl. AutodoError if they cannot be read."""
    path = folder / "nonfinite.jsonl"
    if not path.is_file():
        return []
    try:
        return [Fault(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise AutodoError(f"{path}: cannot be read ({error}); restore it from a copy, or delete it") from error

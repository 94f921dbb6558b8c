"""Fine-tuning: train on everything, then on the clean part alone with a lower learning rate.

The first (1 − share) of the epochs see train and clean part, with the run's schedule shrunk to them; the others see the
clean part, with half a cosine from `lr_factor` times the peak rate. Optimizer state and average of the weights go on.
(The customary baseline of methods with a clean part, e.g. in Shu et al., NeurIPS 2019.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from autodo_dist.build import Parts
from autodo_dist.build_data import trained_on
from autodo_dist.data.loader import Loader
from autodo_dist.errors import AutodoError
from autodo_dist.experiment.rivals.loop import Phase, Rule, Site, phase


@dataclass(frozen=True)
class Options:
    """share: of the epochs that are on the clean part alone. lr_factor: their peak rate, in those of the run's."""

    share: float = 0.2
    lr_factor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise AutodoError(f"fine_tune: share = {self.share:g}: not above 0 and below 1; 0.2 is usual")
        if not 0 < self.lr_factor < float("inf"):
            raise AutodoError(f"fine_tune: lr_factor = {self.lr_factor:g}: not a finite number above 0; 0.1 is usual")


def phases(options: Options, here: Site, parts: Parts) -> list[Phase]:
    """Everything, then the clean part."""
    here.check_clean("fine_tune")
    config, rule = here.config, Rule(here.config.train.label_smoothing)
    everything, clean = (trained_on(here.split, here.manifest, what) for what in ("all", "clean"))
    first = before_tuning(config.train.epochs, options.share)
    return [
        phase(here, parts.loaders.task, everything.train, everything.label_N, rule, range(first)),
        phase(
            here,
            small_batches(parts.loaders.task, len(clean.train)),
            clean.train,
            clean.label_N,
            rule,
            range(first, config.train.epochs),
            peak=options.lr_factor * config.lr,
            warmup_epochs=0,
        ),
    ]


def before_tuning(epochs: int, share: float) -> int:
    """Epochs on everything: round((1 − share)·epochs), but each side gets one at least. AutodoError for one epoch."""
    if epochs < 2:
        raise AutodoError(f"train.epochs = {epochs}: fine_tune needs one for each of its two phases; raise it")
    return min(epochs - 1, max(1, round((1 - share) * epochs)))


def small_batches(task: Loader, pictures: int) -> Loader:
    """The stream, in batches of so many pictures where that is less than a batch."""
    found = copy.copy(task)  # its pixels are made for as many, and so for fewer
    found.batch_size = min(task.batch_size, pictures)
    return found

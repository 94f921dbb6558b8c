"""What a practitioner would do with imbalanced, mislabelled train data and a small clean part, beside AutoDO.

elr, sop                 losses that resist wrong labels; they need no clean part
meta_weight_net          sample weights from a network that learns from the clean part
fine_tune                everything, then the clean part alone
confident_learning       wrong labels found by cross-validation and left out

Each file holds a rival's formula and its options; loop.py is the training that they share.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.experiment.rivals import confident_learning, elr, fine_tune, loop, meta_weight_net, sop
from autodo_dist.experiment.rivals.loop import Outcome, PhasesOf

OPTIONS: dict[str, type[Any]] = {
    "elr": elr.Options,
    "sop": sop.Options,
    "meta_weight_net": meta_weight_net.Options,
    "fine_tune": fine_tune.Options,
    "confident_learning": confident_learning.Options,
}
PHASES: dict[str, Callable[..., list[loop.Phase]]] = {
    "elr": elr.phases,
    "sop": sop.phases,
    "meta_weight_net": meta_weight_net.phases,
    "fine_tune": fine_tune.phases,
}
RIVALS: tuple[str, ...] = tuple(OPTIONS)
__all__ = ["RIVALS", "Outcome", "flops", "run"]


def run(config: Config, rival: str, options: Mapping[str, float]) -> Outcome:
    """Train a rival as one rank in this process, from the start; nothing is written to disk.

    `options` are fields of the rival's `Options`. AutodoError for a rival, option or setting that does not fit.
    """
    chosen = choose(rival, options)
    with loop.site(config) as here:
        if isinstance(chosen, confident_learning.Options):
            return confident_learning.run(chosen, here)
        return loop.run(here, phases_of(rival, chosen))


def flops(config: Config, rival: str, options: Mapping[str, float]) -> float:
    """Floating-point operations of the whole `run`, without training: a step of each kind counted, times the steps.

    Evaluations are not counted. For confident_learning it is the most that they can be.
    """
    chosen = choose(rival, options)
    with loop.site(config) as here:
        if isinstance(chosen, confident_learning.Options):
            return confident_learning.flops(chosen, here)
        return loop.flops(here, phases_of(rival, chosen))


def phases_of(rival: str, chosen: object) -> PhasesOf:
    """How the rival's training is laid out."""
    return functools.partial(PHASES[rival], chosen)


def choose(rival: str, options: Mapping[str, float]) -> object:
    """The rival's Options. AutodoError with the nearest name where a name is not known."""
    if rival not in OPTIONS:
        raise AutodoError(f"rival {rival!r} is unknown; did you mean {nearest(rival, RIVALS)}?")
    known = [field.name for field in fields(OPTIONS[rival])]
    for name in options:
        if name not in known:
            raise AutodoError(f"{rival}: unknown option {name}; did you mean {nearest(name, known)}?")
    return OPTIONS[rival](**options)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like this one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]

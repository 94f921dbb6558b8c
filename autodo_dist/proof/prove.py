"""A run of the user's own, unbroken, broken by kills, and on changing numbers of ranks: what came of each, compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from autodo_dist.build_data import build_split, check_sizes, check_split, read_data
from autodo_dist.config import Config
from autodo_dist.data.manifest import Manifest
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, write_text
from autodo_dist.models import build_model
from autodo_dist.proof.compare import Compared, Losses, compare, losses
from autodo_dist.proof.kill import Ended, Hit, Start, run
from autodo_dist.proof.plan import Aim, draw, named, places, shorten, spread

CLOSE = 1e-5  # largest difference of losses over numbers of ranks, where no number depends on a rank's part of a batch
AT_LEAST_S = 300.0  # that each start of a broken run may take, however short the unbroken one was
DRAWN_BY_RANK = (nn.modules.dropout._DropoutNd, StochasticDepth)


@dataclass(frozen=True)
class Fallen:
    """A kill of a run on so many ranks: its aim, and where it fell; None: the run had ended before."""

    ranks: int
    aim: Aim
    hit: Hit | None


@dataclass(frozen=True)
class Broken:
    """A run that was killed, and started again until it ended; seconds of all its starts."""

    kills: tuple[Fallen, ...]
    seconds: float


@dataclass(frozen=True)
class Elastic:
    """A run on changing numbers of ranks. depends: why its losses need not be those of the unbroken run, if so."""

    ranks: tuple[int, ...]
    broken: Broken
    losses: Losses
    depends: str


@dataclass(frozen=True)
class Proof:
    """What came of it. config: of the runs; elastic: None where it was not asked for.

    unbroken: seconds of the unbroken run; started: those before its first step, which each start takes.
    """

    config: Config
    seed: int
    ranks: int
    steps: int
    unbroken: float
    started: float
    broken: Broken
    compared: Compared
    elastic: Elastic | None

    @property
    def fault(self) -> str:
        """The first thing that is not as promised; empty if all is."""
        if self.compared.differences:
            return self.compared.differences[0]
        if self.elastic is not None:
            found = self.elastic.losses
            if found.other:
                return f"other numbers of ranks: {found.other}"
            if found.largest > CLOSE and not self.elastic.depends:
                return f"other numbers of ranks: a loss at step {found.step} differs by {found.largest:.3g} > {CLOSE:g}"
        return ""

    @property
    def on_gpu(self) -> bool:
        """Whether the runs trained on GPUs."""
        return self.config.train.device != "cpu" and torch.cuda.is_available()

    @property
    def missed(self) -> int:
        """How many kills did not fall, as the run had ended."""
        runs = [self.broken, *([self.elastic.broken] if self.elastic is not None else [])]
        return sum(kill.hit is None for broken in runs for kill in broken.kills)

    @property
    def verdict(self) -> Literal["bit-exact", "not equal", "incomplete"]:
        """One of three; incomplete: nothing differs, but not every kill fell."""
        return "not equal" if self.fault else "incomplete" if self.missed else "bit-exact"


def prove(
    config: Config,
    scratch: Path,
    *,
    steps: int,
    kills: int,
    ranks: int,
    elastic: Sequence[int],
    seed: int,
    start: Start,
    say: Callable[[str], None],
) -> Proof:
    """Run `config`, made short, in the folder `scratch`: unbroken and with kills on `ranks` ranks, and from there on
    the numbers of ranks `elastic`, if any.

    AutodoError if settings do not fit, or a run fails for another reason than a kill.
    """
    manifest = read_data(config)
    depends = depends_on_ranks(config, len(manifest.classes))
    short = named(shorten(config, steps, most_steps(config, manifest, max(ranks, *elastic, 0)), scratch), "", ranks)
    found = places(short)
    count = found[-1].steps
    if max(kills, len(elastic)) > count:
        raise AutodoError(f"--steps {steps}: fewer than {max(kills, len(elastic))} kills; raise it")
    generator = np.random.default_rng(seed)
    aims = draw(found[:-1], [ranks] * kills, generator)  # a run may end before a kill in its last save falls
    others = spread(found, [ranks, *elastic][:-1], generator)
    say(f"unbroken: {count} steps on {ranks} ranks")
    unbroken = one(start, short, "unbroken", ranks)
    limits = usual(short, unbroken), AT_LEAST_S + 10 * unbroken.seconds
    broken = break_run(start, short, "broken", [ranks] * (kills + 1), aims, *limits, say)
    compared = compare(scratch / "unbroken", scratch / "broken")
    changing = None
    if elastic:
        numbers = (ranks, *elastic)
        last = break_run(start, short, "elastic", numbers, others, *limits, say)
        changing = Elastic(numbers, last, losses(scratch / "unbroken", scratch / "elastic"), depends)
    return Proof(short, seed, ranks, count, unbroken.seconds, unbroken.start, broken, compared, changing)


def most_steps(config: Config, manifest: Manifest, ranks: int) -> int:
    """Global batches that the data gives for a training pass. AutodoError if it is too small for them, or the ranks."""
    split = build_split(config, manifest)
    check_split(config, manifest, split)
    check_sizes(config, len(split.train), ranks)
    return len(split.train) // config.train.batch_size


def one(
    start: Start,
    config: Config,
    name: str,
    ranks: int,
    aim: Aim | None = None,
    usual: Mapping[str, float] | None = None,
    limit: float | None = None,
) -> Ended:
    """Start the run `name` once."""
    config = named(config, name, ranks)
    file = config.run.root / f"{name}-{ranks}.yaml"
    write_text(file, config.to_yaml())
    return run(start, file, config.folder, ranks, aim, usual, limit)


def break_run(
    start: Start,
    config: Config,
    name: str,
    numbers: Sequence[int],
    aims: Sequence[Aim],
    usual: Mapping[str, float],
    limit: float,
    say: Callable[[str], None],
) -> Broken:
    """Start the run `name` again and again, on `numbers` of ranks: killed by each of the aims, then to its end."""
    kills: list[Fallen] = []
    seconds = 0.0
    for ranks, aim in zip_longest(numbers, aims):
        ended = one(start, config, name, ranks, aim, usual, limit)
        seconds += ended.seconds
        if aim is not None:
            kills.append(Fallen(ranks, aim, ended.hit))
            say(f"{name}, {describe(kills[-1])}")
        if ended.hit is None:
            break
    kills += [Fallen(ranks, aim, None) for ranks, aim in zip(numbers[len(kills) :], aims[len(kills) :], strict=False)]
    return Broken(tuple(kills), seconds)


def describe(kill: Fallen) -> str:
    """A kill in words."""
    place = kill.aim.place
    text = f"rank {kill.aim.rank} of {kill.ranks}, aimed at {place.phase}" + f" {place.steps}" * (
        place.phase != "start"
    )
    if kill.hit is None:
        return f"{text}: did not fall, the run had ended"
    return f"{text}: fell in {kill.hit.shown}" + ", a save was broken off" * kill.hit.saving


def usual(config: Config, ended: Ended) -> dict[str, float]:
    """Seconds that each phase took in the unbroken run, on average; of a save, the whole of it."""
    seconds: Mapping[str, float] = read_json(config.run.root / "unbroken/summary.json")["seconds"]
    counts: Counter[str] = Counter(place.phase for place in places(config))
    each = {name: seconds[name] / count for name, count in counts.items()}
    return each | {"start": ended.start, "save": sum(ended.saves) / max(1, len(ended.saves))}


def depends_on_ranks(config: Config, classes: int) -> str:
    """Why a loss depends on how a global batch is cut into ranks' parts, beyond float32's rounding; or empty."""
    with torch.device("meta"):
        model = build_model(config.model.name, classes, config.train.seed, config.data.image_size)
    parts = list(model.modules())
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts):
        return "BatchNorm's statistics are those of a rank's part of a batch"
    # timm's own stochastic depth has a drop_prob.
    if any((isinstance(part, DRAWN_BY_RANK) and part.p > 0) or getattr(part, "drop_prob", None) for part in parts):
        return "each rank draws dropout for its part of a batch"
    if config.learn.anything and config.hyper.curvature == "per_rank":
        return "hyper.curvature = per_rank"
    if config.train.precision in ("bf16", "fp16"):
        return f"sums in another order differ by the rounding of {config.train.precision}"
    return ""

"""Confident learning: find wrong labels by cross-validation, leave them out, and train again.

K networks, each trained with the run's own settings on all folds of the train part but one and on the clean part, tell
the class probabilities of the fold that they did not see; cleanlab's `filter.find_label_issues` (Northcutt, Jiang &
Chuang, JAIR 2021) names the labels that are likely wrong. The last training sees what is left and the clean part.
Folds have the train part's given labels in equal shares. Probabilities are those of the train loss, logit adjustment
included, as networks trained without it would give them: a model of the labels that were trained on. A picture that
has none, as it does not decode or train.steps_per_pass cuts passes off, is kept.

Shapes: N train samples, C classes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from autodo_dist.build import Parts
from autodo_dist.build_data import trained_on
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Labels
from autodo_dist.errors import AutodoError
from autodo_dist.evaluate import outputs
from autodo_dist.experiment.rivals import loop
from autodo_dist.experiment.rivals.loop import Outcome, Phase, Rule, Site, phase

Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """folds: K, and so the networks trained beside the last one."""

    folds: int = 5

    def __post_init__(self) -> None:
        if not float(self.folds).is_integer() or self.folds < 2:
            raise AutodoError(f"confident_learning: folds = {self.folds:g}: no whole number of at least 2; 5 is usual")


def run(options: Options, here: Site) -> Outcome:
    """All K + 1 trainings; operations and seconds are of all, predictions included."""
    here.check_clean("confident_learning")
    ids, seconds, spent = here.split.train, 0.0, 0.0
    share_NC = np.full((len(ids), len(here.manifest.classes)), np.nan)
    for inside, outside in folds(ids, here.split.label_N, int(options.folds), here.config.train.seed):
        with loop.parts_of(here) as parts:
            each = with_clean(inside, here, parts)
            seconds += loop.fit(parts, [each], here.ranks)
            share_NC[np.searchsorted(ids, outside)] = probabilities(here, parts, each, outside)
            spent += len(outside) * prediction_flops(parts, each) + loop.phases_flops(parts, [each], here.ranks)
    kept = ids[~suspected(here.split.label_N[ids], share_NC)]
    last = loop.run(here, functools.partial(phases, kept))
    return Outcome(last.test_accuracy, last.test_accuracy_best_epoch, last.flops + spent, last.seconds + seconds)


def flops(options: Options, here: Site) -> float:
    """Operations of `run`, at most: as if no label were found wrong, which is not known before."""
    here.check_clean("confident_learning")
    ids, label_N, seed = here.split.train, here.split.label_N, here.config.train.seed
    with loop.parts_of(here) as parts:
        last = with_clean(ids, here, parts)
        dealt = folds(ids, label_N, int(options.folds), seed)
        steps = last.steps + sum(with_clean(inside, here, parts).steps for inside, _ in dealt)
        predictions = len(ids) * prediction_flops(parts, last)
        return steps * loop.step_flops(parts, last, here.ranks) + predictions


def phases(kept: Ids, here: Site, parts: Parts) -> list[Phase]:
    """The last training."""
    return [with_clean(kept, here, parts)]


def with_clean(ids: Ids, here: Site, parts: Parts) -> Phase:
    """All epochs on these train samples and the clean part."""
    label_N = trained_on(here.split, here.manifest, "all").label_N
    rule = Rule(here.config.train.label_smoothing)
    return phase(here, parts.loaders.task, np.union1d(ids, here.split.validation), label_N, rule)


def folds(ids: Ids, label_N: Labels, count: int, seed: int) -> Iterator[tuple[Ids, Ids]]:
    """For each fold the sorted ids inside training and outside: every id is outside once."""
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():  # of a class with fewer samples than folds: the clean part has it in any case
        warnings.simplefilter("ignore", UserWarning)
        try:
            dealt = list(StratifiedKFold(count, shuffle=True, random_state=seed % 2**32).split(ids, label_N[ids]))
        except ValueError as error:  # more folds than the most frequent label has pictures
            raise AutodoError(f"confident_learning: folds = {count}: {error}; lower it") from error
    for inside, outside in dealt:
        yield ids[inside], ids[outside]


def probabilities(here: Site, parts: Parts, each: Phase, ids: Ids) -> Probabilities:
    """Class probabilities of these pictures by the model as it is, as rows; NaN where a picture has none."""
    share_nC = np.full((len(ids), len(here.manifest.classes)), np.nan)
    loader = parts.loaders.validation.over(ids, here.split.label_N)
    for batch, logits_BC in outputs(parts.evaluated, loader, parts.dtype):
        found_BC = (logits_BC + each.adjustment_C).double().softmax(1)
        share_nC[np.searchsorted(ids, batch.ids_B.cpu().numpy())] = found_BC.cpu().numpy()
    return share_nC


def suspected(given_N: Labels, share_NC: Probabilities) -> npt.NDArray[np.bool_]:
    """Which given labels are likely wrong, by cleanlab with its own settings; none without probabilities."""
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise AutodoError(f"confident_learning: cleanlab is not installed ({error}); pip install cleanlab") from error
    known_N = np.isfinite(share_NC).all(1)
    wrong_N = np.zeros(len(given_N), np.bool_)
    wrong_N[known_N] = find_label_issues(given_N[known_N], share_NC[known_N], n_jobs=1)
    return wrong_N


def prediction_flops(parts: Parts, each: Phase) -> float:
    """Operations of the prediction of one picture."""
    images_BCHW = loop.blank(each.loader).images_BCHW.to(parts.dtype)

    @torch.no_grad()
    def predict() -> None:
        parts.evaluated.eval()(parts.pictures.plain(images_BCHW))

    return loop.counted(predict) / len(images_BCHW)

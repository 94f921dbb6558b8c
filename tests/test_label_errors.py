"""The score of a label and its measures against hand computations; the model's predictions against its evaluation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankPool
from test_autodo import learning

from autodo_dist.build import build
from autodo_dist.build_data import build_split
from autodo_dist.data.manifest import read_manifest
from autodo_dist.evaluate import evaluate
from autodo_dist.label_errors import measures, scores
from autodo_dist.learnt import Columns
from autodo_dist.load_config import check_config
from autodo_dist.parallel import comm
from autodo_dist.predictions import (
    NAME,
    Predictions,
    predict,
    read_predictions,
    row_type,
    suggest,
    write_predictions,
)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_score_is_its_formula() -> None:
    bare = Columns(np.arange(3), np.zeros(3, np.int32))
    assert scores(bare).tolist() == [0, 0, 0]
    weights = replace(bare, weight_N=floats(0.5, 2, 1))
    assert scores(weights).tolist() == [-0.5, -2, -1]
    soft = replace(weights, given_probability_N=floats(0.25, 0.5, 1))
    assert scores(soft).tolist() == [0.75, 0.5, 0]
    both = replace(soft, given_prediction_N=floats(0.5, float("nan"), 0))
    assert scores(both).tolist() == [0.875, 0.5, 1]
    assert scores(replace(both, given_probability_N=None)).tolist() == [0.5, 0, 1]
    assert scores(both).dtype == np.float32


def test_measures_are_their_definitions() -> None:
    generator = np.random.default_rng(0)
    wrong = generator.random(60) < 0.3
    score = np.round(generator.normal(size=60) + wrong, 1)  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(score[wrong], score[~wrong])]
    found = measures(score, wrong)
    assert found["auroc"] == pytest.approx(np.mean(pairs), abs=1e-12)
    steps, seen = 0.0, 0
    for threshold in sorted(set(score.tolist()), reverse=True):
        taken = score >= threshold
        more = (wrong & taken).sum() - seen
        steps, seen = steps + more / wrong.sum() * wrong[taken].mean(), seen + more
    assert found["average_precision"] == pytest.approx(steps, abs=1e-12)
    first = sorted(range(60), key=lambda at: -score[at])[: wrong.sum()]
    assert found["precision_at_noise_rate"] == np.mean([wrong[at] for at in first])


def passes(tree: dict[str, Any]) -> tuple[Predictions, dict[str, Any], int]:
    """Predictions of a fresh model, what its evaluation says of the same pictures and labels, and how many they are."""
    config = check_config(tree, "test")
    torch.set_num_threads(1)
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(Path(tree["data"]["root"])), ranks)
        split = build_split(config, parts.manifest)
        loader = parts.loaders.validation.over(split.train, split.label_N)
        found = predict(parts.model, loader, 10, parts.dtype, ranks)
        judged = evaluate(parts.model, loader, parts.manifest.classes, parts.dtype, ranks)
        assert np.array_equal(parts.loaders.validation.ids, split.validation)  # as before
        return found, judged, len(split.train)


def test_predictions_are_the_models(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """The same on every rank, and on one and three; the labels that count are the given ones."""
    tree = learning(digits, tmp_path, train__precision="fp64", data__image_size=16)
    (one,), three = (pool.run(ranks, passes, tree) for ranks in (1, 3))
    found, judged, count = one
    assert count == len(found.given_N) == judged["pictures"]
    assert -np.log(found.given_N.astype(np.float64)).mean() == pytest.approx(judged["loss"], rel=1e-6)
    assert len(np.unique(found.suggested_N)) > 1
    assert set(found.suggested_N.tolist()) <= set(range(10))
    for other, _, _ in three:
        for name, values in vars(found).items():
            np.testing.assert_allclose(vars(other)[name], values, rtol=1e-6)


def test_a_suggestion_is_bayes_rule_on_prediction_and_given_label() -> None:
    """Against a loop over pictures and classes; a label that no picture was given says nothing."""
    generator, samples, classes, kept = np.random.default_rng(4), 300, 8, 3
    share_NC = generator.dirichlet(np.full(classes, 0.5), samples)
    given_N = generator.integers(classes - 1, size=samples)
    order_NC = np.argsort(-share_NC, 1)
    rows_N = np.zeros(samples, row_type(kept))
    rows_N["given"], rows_N["given_share"] = given_N, share_NC[np.arange(samples), given_N]
    rows_N["label"], rows_N["share"] = order_NC[:, :kept], np.take_along_axis(share_NC, order_NC[:, :kept], 1)
    sum_CC = np.stack([share_NC[given_N == label].sum(0) for label in range(classes)])
    label_N, share_N = suggest(rows_N, sum_CC)
    overruled = 0
    for at in range(samples):
        among = {*order_NC[at, :kept].tolist(), int(given_N[at])}
        mean_C = share_NC[given_N == given_N[at]].mean(0)
        likely = {label: share_NC[at, label] * mean_C[label] for label in among}
        best = max(likely, key=lambda label: likely[label])
        assert label_N[at] == best
        assert share_N[at] == pytest.approx(likely[best] / sum(likely.values()), rel=1e-5)
        overruled += best != order_NC[at, 0]
    assert overruled > 10
    rows_N["given"] = classes - 1
    assert np.array_equal(suggest(rows_N, sum_CC)[0], share_NC.argmax(1))


def test_a_shortened_pass_knows_less(digits: Path, tmp_path: Path) -> None:
    tree = learning(digits, tmp_path, train__steps_per_pass=2, data__image_size=16)
    found, _, count = passes(tree)
    assert np.isfinite(found.given_N).sum() == (found.suggested_N >= 0).sum() == 200 < count


def test_kept_predictions_are_of_one_step(tmp_path: Path) -> None:
    kept = Predictions(floats(0.5, float("nan")), np.array([3, -1], np.int32), floats(0.75, float("nan")))
    assert read_predictions(tmp_path, 7, 2) is None
    write_predictions(tmp_path, 7, kept)
    found = read_predictions(tmp_path, 7, 2)
    assert found is not None
    for name, values in vars(kept).items():
        np.testing.assert_array_equal(vars(found)[name], values)
    assert read_predictions(tmp_path, 8, 2) is None
    assert read_predictions(tmp_path, 7, 3) is None
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-5])
    assert read_predictions(tmp_path, 7, 2) is None

"""The columns of a run, against its labels.csv, and against the rows that are stored."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from test_autodo import learning
from test_train import run_train, settings

from autodo_dist import learnt
from autodo_dist.errors import AutodoError
from autodo_dist.learnt import open_source, read_columns


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every group per sample, and noisy labels."""
    return run_train(learning(digits, tmp_path_factory.mktemp("learnt"), data__label_noise=0.1))


def test_columns_are_those_of_labels_csv_and_of_the_stored_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learnt, "BLOCK", 10_000)  # many blocks
    source = open_source(run)
    assert source.truth_known
    found = read_columns(source)
    with (run / "labels.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["id"]) for line in lines] == found.id_N.tolist()
    classes = source.manifest.classes
    assert found.learnt_N is not None
    assert [line["given_label"] for line in lines] == [classes[k] for k in found.given_N]
    assert [line["learnt_label"] for line in lines] == [classes[k] for k in found.learnt_N]
    np.testing.assert_allclose([float(line["weight"]) for line in lines], found.weight_N, rtol=1e-5)
    shares = [float(line["learnt_probability"]) for line in lines]
    np.testing.assert_allclose(shares, found.learnt_probability_N, rtol=1e-5)
    groups = source.layout.split(source.reader.whole("hyper.rows.value").double())
    soft_NC = torch.softmax(groups["soft_logit"], 1).numpy()
    np.testing.assert_allclose(
        found.weight_N, torch.nn.functional.softplus(groups["weight_logit"]) / np.log(2), rtol=1e-5
    )
    assert np.array_equal(found.learnt_N, soft_NC.argmax(1))
    np.testing.assert_allclose(found.learnt_probability_N, soft_NC.max(1), rtol=1e-5)
    own_N = np.take_along_axis(soft_NC, found.given_N[:, None].astype(np.int64), 1)[:, 0]
    np.testing.assert_allclose(found.given_probability_N, own_N, rtol=1e-5)
    for name, mean_CK in (("gate_logit", found.gate_CK), ("magnitude_logit", found.magnitude_CK)):
        each_NK = groups[name].sigmoid().numpy()
        expected_CK = np.stack([each_NK[found.given_N == k].mean(0) for k in range(len(classes))])
        np.testing.assert_allclose(mean_CK, expected_CK, rtol=1e-5)
    assert found.last_update_N is not None
    assert 0 < found.last_update_N.max() <= 6


def test_what_is_not_learnt_per_sample_has_no_column(digits: Path, tmp_path: Path) -> None:
    only = {"learn__augment": "shared", "learn__weight": False, "learn__soft_label": False}
    source = open_source(run_train(learning(digits, tmp_path, **only)))

    found, shared = read_columns(source), source.shared()
    assert found.weight_N is found.learnt_N is found.gate_CK is found.last_update_N is None
    assert shared is not None
    assert tuple(shared) == source.layout.operations
    assert [len(groups) for _, groups in source.blocks()] == [0]


def test_a_run_that_learns_nothing_is_named(digits: Path, tmp_path: Path) -> None:
    run = run_train(settings(digits, tmp_path))
    with pytest.raises(AutodoError, match="learns nothing of its samples"):
        open_source(run)

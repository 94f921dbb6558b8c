"""Soft labels that follow predictions, against Bayes' rule written out sample by sample."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from test_train import settings

from autodo_dist import ensembling
from autodo_dist.errors import AutodoError
from autodo_dist.hyperparameters import Hyperparameters, Layout
from autodo_dist.load_config import check_config
from autodo_dist.method.hypergrad import Rows
from autodo_dist.method.rmsprop import Rmsprop
from autodo_dist.parallel import comm

CPU = torch.device("cpu")
Array = npt.NDArray[np.float64]
LAYOUT = Layout("none", (), True, 3, 0.1)
IDS = np.array([1, 3, 4, 6, 7, 9])
LABELS = np.array([0, 2, 1, 1, 0, 2, 2, 1, 0, 0], np.int32)
BETA = 0.6


class Written:
    """The module's formulas in loops over samples and classes."""

    def __init__(self) -> None:
        self.mean: dict[int, Array] = {}
        self.given: Array | None = None  # P(y | c)

    def note(self, ids: list[int], shares: Array) -> None:
        for id_, share in zip(ids, shares, strict=True):
            if id_ in IDS and np.isfinite(share).all():
                self.mean[id_] = BETA * self.mean[id_] + (1 - BETA) * share if id_ in self.mean else share

    def renew(self) -> None:
        counts = np.full((3, 3), ensembling.PSEUDOCOUNT)
        for id_, mean in self.mean.items():
            counts[LABELS[id_]] += mean
        self.given = np.array(
            [[counts[y, c] / sum(counts[k, c] for k in range(3)) for c in range(3)] for y in range(3)]
        )

    def base(self, id_: int) -> Array:
        label = int(LABELS[id_])
        if self.given is None or id_ not in self.mean:
            share = np.eye(3)[label]
        else:
            likely = [(self.mean[id_][c] + ensembling.FLOOR) * self.given[label, c] for c in range(3)]
            share = np.array(likely) / sum(likely)
        return np.log(0.9 * share + 0.1 / 3)


def predictions(steps: int) -> list[tuple[list[int], Array]]:
    """Batches of ids, other samples' among them, and what a network says of them."""
    generator = np.random.default_rng(0)
    return [
        ([int(id_) for id_ in generator.choice(10, 5, replace=False)], generator.dirichlet(np.full(3, 0.4), 5))
        for _ in range(steps)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_soft_labels_follow_and_keep_what_they_learnt(dtype: torch.dtype) -> None:
    """A table with ensembling less one without, with the same gradients, is the change of log[(1 − α)P + α/C]."""
    written, work = Written(), predictions(12)
    work[3][1][2, 1] = math.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with comm.process_group(comm.place(), CPU) as ranks:
        both = [
            Hyperparameters(LAYOUT, IDS, LABELS, ranks, Rmsprop(), wide, 99, dtype, guests=True, ensembling=momentum)
            for momentum in (BETA, 0.0)
        ]
        started = both[0].fetch(torch.arange(10)).soft_logit
        for step, (ids, shares) in enumerate(work, start=1):
            if step % 4 == 1 and step > 4:
                both[0].follow_predictions(step)
                written.renew()
            ids_B = torch.tensor(ids)
            grads_BP = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).to(wide)
            for parameters in both:
                parameters.apply_grads(ids_B, Rows(**LAYOUT.split(grads_BP)), lr=0.1, step=step)
                parameters.note_predictions(ids_B, torch.from_numpy(shares).to(wide).log(), step)
            written.note(ids, shares)
        following, plain = (parameters.fetch(torch.arange(10)) for parameters in both)
        facts = both[0].facts()
    assert following.soft_logit is not None
    assert plain.soft_logit is not None
    assert started is not None
    assert following.weight_logit is not None
    assert torch.equal(following.weight_logit, plain.weight_logit)
    moved = (following.soft_logit - plain.soft_logit).double().numpy()
    expected, apart = np.zeros((10, 3)), Written()
    for id_ in IDS:
        expected[id_] = written.base(id_) - apart.base(id_)
    assert np.abs(expected[IDS]).max() > 1
    np.testing.assert_allclose(moved, expected, atol=1e-12 if dtype == torch.float64 else 0.2)
    others = np.setdiff1d(np.arange(10), IDS)
    assert torch.equal(following.soft_logit[others], started[others])
    changed = following.soft_logit[IDS].argmax(1).numpy() != LABELS[IDS]
    assert facts["changed_labels"] == pytest.approx(changed.mean())


def test_until_they_follow_only_predictions_are_gathered() -> None:
    with comm.process_group(comm.place(), CPU) as ranks:
        found = Hyperparameters(LAYOUT, IDS, LABELS, ranks, Rmsprop(), torch.float64, 0, ensembling=BETA)
        before = found.table.value_nP.clone()
        found.follow_predictions(0)  # of which there are none
        found.note_predictions(torch.from_numpy(IDS), torch.zeros(6, 3, dtype=torch.float64), 0)
        found.rest()
        assert found.ensemble is not None
        assert torch.equal(found.table.value_nP, before)
        torch.testing.assert_close(found.ensemble.mean_nC, torch.full((6, 3), 1 / 3, dtype=torch.float64))


def test_a_move_of_bfloat16_rows_is_right_on_average() -> None:
    """A move of a tenth of the spacing, 50 times: to nearest, no row would leave its place."""
    layout, count, by = Layout("none", (), False, 3, 0.1), 2000, 2.0**-7 / 10
    with comm.process_group(comm.place(), CPU) as ranks:
        table = Hyperparameters(
            layout, np.arange(count), np.zeros(count, np.int32), ranks, Rmsprop(), torch.float32, 0, torch.bfloat16
        ).table
        before = table.value_nP.float()
        for step in range(50):
            table.add(torch.arange(count), torch.full((count, 3), by), step)
        moved = (table.value_nP.float() - before).mean(0)
    torch.testing.assert_close(moved, torch.full((3,), 50 * by), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("learn", "message"),
    [
        ({"weight": True}, r"learn.ensembling = 0.7: it is soft labels that follow predictions; set learn.soft_label"),
        ({"soft_label": True, "ensembling": 1.0}, r"learn.ensembling.* less than 1"),
        ({"soft_label": True, "ensembling_from": 0.0}, r"learn.ensembling_from.* greater than 0"),
        ({"soft_label": True, "ensembling_from": 0.9}, r"learn.ensembling_from = 0.9: .* not begin .* any of 2 epochs"),
    ],
)
def test_what_is_refused(digits: Path, tmp_path: Path, learn: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodoError, match=message):
        check_config(settings(digits, tmp_path) | {"learn": {"ensembling": 0.7} | learn}, "test")

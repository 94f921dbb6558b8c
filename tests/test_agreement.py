"""The question that any rank may answer with yes: known to all at the same step."""

from __future__ import annotations

import pytest
import torch
from ranks import RankPool

from autodo_dist.parallel import comm
from autodo_dist.parallel.agreement import Agreement


def asked(who: int, when: int, steps: int) -> list[bool]:
    """What this rank hears in so many steps and at the end; rank `who` says yes at step `when` alone."""
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        agreement = Agreement(ranks)
        heard = []
        for step in range(steps):
            heard.append(agreement.ask(step == when and ranks.rank == who))
            ranks.sum(torch.ones(3))  # the step's own collectives go on beside it
        return [*heard, agreement.settle()]


@pytest.mark.parametrize(("ranks", "who"), [(1, 0), (2, 1), (4, 0), (4, 2)])
def test_a_yes_of_one_rank_reaches_all_one_call_later(pool: RankPool, ranks: int, who: int) -> None:
    expected = [False, False, False, True, False, False]
    assert pool.run(ranks, asked, who, 2, 5) == [expected] * ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_yes_at_the_last_call_is_heard_as_they_part(pool: RankPool, ranks: int) -> None:
    assert pool.run(ranks, asked, 1, 2, 3) == [[False, False, False, True]] * ranks


def test_nobody_says_yes(pool: RankPool) -> None:
    assert pool.run(2, asked, 9, 0, 3) == [[False] * 4] * 2

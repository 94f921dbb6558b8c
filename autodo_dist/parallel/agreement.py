"""A question that any rank may answer with yes, asked at every step at no wait."""

from __future__ import annotations

import torch
import torch.distributed as dist

from autodo_dist.parallel.comm import Ranks


class Agreement:
    """Whether any rank has said yes, known to all at the same call.

    The ranks' answers travel beside the step that follows, in a process group of their own, and are read at the next
    call. So a yes counts one call later, and none waits for it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._group = ranks.twin().group
        self._answer = torch.zeros(1, dtype=torch.int32)  # on the CPU: a GPU's stream need not be waited for
        self._going: dist.Work | None = None

    def ask(self, mine: bool) -> bool:
        """Say yes or no; whether any rank said yes at the call before. Every rank must call this."""
        before = self.settle()
        self._answer.fill_(mine)
        self._going = dist.all_reduce(self._answer, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return before

    def settle(self) -> bool:
        """Wait for the answers that are on their way, before the ranks part; whether any of them is yes."""
        if self._going is None:
            return False
        self._going.wait()
        self._going = None
        return bool(self._answer.item())

"""Learning rates as functions of the global step, so that nothing of them needs saving."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to 0 at step `total`.

    peak·(step + 1)/warmup while step < warmup, then peak·½(1 + cos(π·(step − warmup)/(total − warmup)))
    (Loshchilov & Hutter 2017, without restarts).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

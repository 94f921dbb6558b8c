"""What a rank is doing, shown as the name of its main thread: `top`, `ps -o comm` and /proc/PID/comm say it.

Without a space: Slurm's proctrack/linuxproc would read /proc/PID/stat wrongly, and no signal would reach the rank.
"""

from __future__ import annotations

import ctypes

LONGEST = 15  # characters that Linux keeps
_PR_SET_NAME = 15
_prctl = ctypes.PyDLL(None).prctl  # CDLL would give up the GIL at each call, and may then wait long for it


def show(phase: str, steps: int | None = None) -> None:
    """Name the calling thread by a phase and the steps done, e.g. `task:1200`; without them where they do not fit.

    About 1 µs.
    """
    text = phase if steps is None else f"{phase}:{steps}"
    _prctl(_PR_SET_NAME, (text if len(text) <= LONGEST else phase).encode(), 0, 0, 0)

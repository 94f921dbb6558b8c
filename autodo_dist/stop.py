"""A request to stop: Slurm's signal before the time limit, a preemption, the launcher's Ctrl-C.

A handler only notes it. All ranks learn of it at the same step (parallel/agreement.py), save that step and end.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # sbatch --signal=USR2@…; preemption and scancel
_came: list[int] = []


class Stopped(Exception):
    """All ranks have agreed to stop at the step that they are at."""


def listen() -> None:
    """Note SIGNALS from here on in place of dying by them. Of the main thread alone."""
    _came.clear()
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _came.append(number))


def asked() -> bool:
    """Whether this process was asked to stop since `listen`."""
    return bool(_came)

"""Stochastic rounding to bfloat16, its randomness made of (step, id) so that it needs no generator and no state.

A row that takes steps smaller than half of bfloat16's spacing would never move if it were rounded to nearest; rounded
up or down with the probabilities that make it right on average, it moves as in float32 (Gupta et al. 2015).
"""

from __future__ import annotations

import torch


def random_words(step: int, ids_n: torch.Tensor, columns: int) -> torch.Tensor:
    """Uniform 64-bit words (n × columns) that depend on the step, the id and the column alone.

    SplitMix64's finalizer (Steele et al. 2014) as a counter-based generator, once for the row and once for the column.
    """
    row_n = _mix(ids_n.to(torch.int64) + _mix(torch.tensor(step, dtype=torch.int64, device=ids_n.device)))
    return _mix(row_n[:, None] + torch.arange(columns, dtype=torch.int64, device=ids_n.device))


def to_bfloat16(value: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """float32 values as one of the two bfloat16 values around them, the nearer one more often: right on average.

    The lowest 16 bits of `words` (of the same shape) decide: they are added below the bits that bfloat16 keeps.
    """
    bits = value.view(torch.int32) + (words & 0xFFFF).to(torch.int32)
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)


def _mix(word: torch.Tensor) -> torch.Tensor:
    word = word + _signed(0x9E3779B97F4A7C15)
    word = (word ^ _shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _signed(0x94D049BB133111EB)
    return word ^ _shifted(word, 31)


def _shifted(word: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that brings in zeros; torch's brings in the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word

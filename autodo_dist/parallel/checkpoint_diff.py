"""Two checkpoints compared: tensor by tensor and block by block, on any machine, in memory of a block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from autodo_dist.errors import AutodoError
from autodo_dist.parallel.checkpoint import leaves
from autodo_dist.parallel.checkpoint_rows import RowReader

BLOCK = 1 << 24  # bytes of a tensor that are looked at together
MEASURED = ("seconds",)  # of progress: wall-clock times, which no two runs share


@dataclass(frozen=True)
class TensorDifference:
    """How the tensors `name` of two checkpoints differ.

    `what` says it where there are no two alike to compare: missing, another shape or type. Else `elements` of `total`
    have other bits; over those, max_absolute = max |a − b| and max_relative = max |a − b| / max(|a|, |b|), both in
    float64 (so integers are compared in full only up to 2^53), infinite where one of the two is not finite.
    """

    name: str
    what: str = ""
    elements: int = 0
    total: int = 0
    max_absolute: float = 0.0
    max_relative: float = 0.0

    def __str__(self) -> str:
        numbers = (
            f"{self.elements} of {self.total} differ, by at most {self.max_absolute:.3g}, "
            f"relative {self.max_relative:.3g}"
        )
        return f"{self.name}: {self.what or numbers}"


def differences(a: RowReader, b: RowReader) -> Iterator[TensorDifference]:
    """The tensors that are not equal to the bit, by name."""
    for name in sorted({*a.names, *b.names}):
        missing = next((reader for reader in (a, b) if name not in reader.metadata.state_dict_metadata), None)
        if missing is not None:
            yield TensorDifference(name, what=f"missing in {missing.path}")
        elif (described := _described(a, name)) != (other := _described(b, name)):
            yield TensorDifference(name, what=f"{described} against {other}")
        elif (found := _compare(a, b, name)).elements:
            yield found


def progress_differences(a: RowReader, b: RowReader) -> Iterator[str]:
    """What two checkpoints say otherwise of how far their run has come, a line each; times are left out.

    AutodoError for what no run writes.
    """
    try:
        left, right = (dict(leaves(reader.header.progress)) for reader in (a, b))
    except RecursionError:
        raise AutodoError(
            f"progress of {a.path} or {b.path}: nested too deeply to be a run's; choose another checkpoint"
        ) from None
    for name in sorted({*left, *right}):
        if left.get(name) != right.get(name) and name.partition(".")[0] not in MEASURED:
            values = [json.dumps(found.get(name))[:80] for found in (left, right)]
            yield f"progress {ascii(name)[1:-1][:80]}: {values[0]} against {values[1]}"


def digest(reader: RowReader) -> str:
    """SHA-256 of all tensors of a checkpoint, by name: name, type, shape and bytes. It does not depend on the ranks."""
    found = hashlib.sha256()
    for name in reader.names:
        found.update(f"{name} {_described(reader, name)}\n".encode())
        for start, stop in reader.blocks(name, BLOCK):
            found.update(reader.between(name, start, stop).reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _described(reader: RowReader, name: str) -> str:
    return f"{str(reader.dtype(name)).removeprefix('torch.')} {tuple(reader.size(name))}"


def _compare(a: RowReader, b: RowReader, name: str) -> TensorDifference:
    elements, absolute, relative = 0, 0.0, 0.0
    for start, stop in a.blocks(name, BLOCK):
        left, right = a.between(name, start, stop).reshape(-1), b.between(name, start, stop).reshape(-1)
        bits_left, bits_right = (part.view(torch.uint8).view(len(part), -1) for part in (left, right))
        other = (bits_left != bits_right).any(1)
        if not other.any():
            continue
        left, right = left[other].double(), right[other].double()
        gap = (left - right).abs()
        gap[~left.isfinite() | ~right.isfinite()] = torch.inf
        scale = torch.maximum(left.abs(), right.abs())
        share = torch.where(gap == 0, 0.0, torch.where(gap.isinf(), torch.inf, gap / scale))  # −0 and 0 have other bits
        elements += len(left)
        absolute, relative = max(absolute, float(gap.max())), max(relative, float(share.max()))
    return TensorDifference(name, "", elements, a.size(name).numel(), absolute, relative)

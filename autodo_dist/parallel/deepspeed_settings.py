"""DeepSpeed's settings: those that follow from a run's own, and a user's JSON laid over them.

Keys are written with dots: {"zero_optimization": {"stage": 2}} is zero_optimization.stage = 2.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodo_dist.errors import AutodoError

# What a file may set besides: how numbers travel and what is logged. The rest would change what is trained, or where
# state lies, behind the back of schedule and checkpoints, and was not tried: offloading, quantizing, other optimizers.
# round_robin_gradients is left out as DeepSpeed 0.19.8 loses track of which element is whose by it.
PASSED_ON = (
    "bf16",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.sub_group_size",
    "zero_optimization.use_multi_rank_bucket_allreduce",
)

# Where neither a setting nor the file says anything. Without the first, stage 3 replaces torch's linear function in the
# whole process by one that rounds otherwise; without the second, steps wait for the GPU, for a report that is not read.
DEFAULTS = {
    "zero_optimization.memory_efficient_linear": False,
    "timers.throughput.enabled": False,
    "zero_allow_untested_optimizer": True,  # its list has no SGD; tests/test_engines.py tries it
}


@dataclass(frozen=True)
class Ours:
    """A value of DeepSpeed's that a setting of ours decides. `passed`: whether DeepSpeed is told; else we do it."""

    setting: str
    value: Any
    passed: bool = True


def check_installed() -> None:
    """AutodoError if there is no DeepSpeed. Does not import it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise AutodoError(
            "engine.name = deepspeed: DeepSpeed is not installed; `pip install deepspeed` (requirements.txt has the "
            "tested version), or set engine.name=ddp"
        )


def merged(ours: Mapping[str, Ours], file: Path | None) -> dict[str, Any]:
    """Ours and the file's, as a tree; "auto" leaves a value to us.

    AutodoError where the file cannot be read, clashes, or sets what it may not.
    """
    flat: dict[str, Any] = DEFAULTS | {key: it.value for key, it in ours.items() if it.passed}
    for key, value in _leaves(_read(file)) if file is not None else ():
        if key in ours:
            if value != "auto" and not _same(value, ours[key].value):
                said = json.dumps(ours[key].value)
                raise AutodoError(
                    f"engine.deepspeed_config = {file}: {key} = {json.dumps(value)} there, but {said} by "
                    f"{ours[key].setting}; set one as the other, or leave {key} out of the file"
                )
        elif any(f"{key}.".startswith(f"{name}.") for name in PASSED_ON):
            flat |= {key: value} if value != "auto" else {}
        else:
            raise AutodoError(
                f"engine.deepspeed_config = {file}: {key} is not passed on to DeepSpeed: this program decides it, or "
                "was not tried with it (docs/engines.md); leave it out of the file"
            )
    return _tree(flat)


def _same(theirs: Any, ours: Any) -> bool:
    """Names in whatever case; numbers by value, but no number for a yes."""
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    return isinstance(theirs, bool) == isinstance(ours, bool) and bool(theirs == ours)


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise AutodoError(
            f"engine.deepspeed_config = {file}: cannot be read as JSON ({' '.join(str(error).split())}); mend it"
        ) from error
    if not isinstance(tree, dict):
        raise AutodoError(f"engine.deepspeed_config = {file}: holds no settings; write them as {{...}}")
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return tree


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    return tree

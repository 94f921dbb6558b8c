"""Several runs of one configuration that differ in their seeds alone, and what they came to: mean ± deviation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from autodo_dist.config import Config
from autodo_dist.files import read_json
from autodo_dist.run_folder import finished

_ROWS = {  # field of summary.json -> what the table calls it
    "test_accuracy_final": "test error, last epoch",
    "test_accuracy_selected": "test error, epoch best on validation",
    "validation_accuracy_final": "validation error, last epoch",
}


def seeded(config: Config, runs: int) -> list[Config]:
    """The configuration with seeds 0, 1, …: start weights and order, and split and distortion unless a file gives them.

    Their run folders are NAME-seed0, NAME-seed1, …; the same seed of another method draws the same distortion.
    """
    return [_with_seed(config, seed) for seed in range(runs)]


def _with_seed(config: Config, seed: int) -> Config:
    data = config.data if config.data.split is not None else config.data.model_copy(update={"split_seed": seed})
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": f"{config.run.name}-seed{seed}"}),
            "train": config.train.model_copy(update={"seed": seed}),
            "data": data,
        }
    )


def table(folders: Sequence[Path]) -> str:
    """The results of the runs that are finished, as Markdown: mean ± standard deviation (of n - 1), and each one's."""
    done = [folder for folder in folders if finished(folder)]
    summaries = [read_json(folder / "summary.json") for folder in done]
    lines = [f"| {len(done)} of {len(folders)} runs finished | mean ± deviation | each |", "|---|---|---|"]
    for field, name in _ROWS.items():
        values = [100 * (1 - summary[field]) for summary in summaries if summary[field] is not None]
        if values:
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            each = ", ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {name} | {statistics.mean(values):.2f}{deviation} % | {each} |")
    return "\n".join(lines)

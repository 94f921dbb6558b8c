"""The benchmark and the contact sheets of policies: what their tables say, and that the documents say the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import contact_sheets, policies

ROOT = Path(__file__).parent.parent


def test_tables_say_largest_differences_and_median_ratios() -> None:
    found = dict.fromkeys(policies.OPERATIONS, 0.25) | {"equalize": 3.0}
    shown = policies.difference_table({32: {"dali": found, "torchvision": dict.fromkeys(policies.OPERATIONS, 0.0)}})
    assert "| operation | dali, 32 px | torchvision, 32 px |" in shown
    assert "| equalize | 3.00 | 0.00 |" in shown
    seconds = {name: [4.0, 2.0, 8.0] for name in policies.policies(64)} | {"none": [2.0, 1.5, 2.0]}
    assert policies.ratios(seconds, "randaugment") == [0.5, 0.75, 0.25]
    assert "| randaugment | 16 | 0.50 |" in policies.cost_table({"dali": seconds})


def test_the_document_has_the_figures_of_the_file() -> None:
    text = (ROOT / "docs/policies.md").read_text()
    rows = json.loads((ROOT / "docs/results/policies.json").read_text())
    values = {row["name"]: row["value"] for row in rows}
    sizes = {
        size: {
            decoder: {name: values[f"{name}, {size} px, {decoder} beside PIL"] for name in policies.OPERATIONS}
            for decoder in policies.DECODERS
        }
        for size in (32, 128, 224)
    }
    assert policies.difference_table(sizes) in text
    for name in policies.policies(64):
        cells = [
            f"{values[f'{name}, {decoder}']:.0f} | {values[f'{name} beside none, {decoder}']:.2f}"
            for decoder in policies.DECODERS
        ]
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_a_batch_is_loaded_with_and_without_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "BATCH", 4)
    seconds = policies.cost("torchvision", 1)
    assert set(seconds) == set(policies.policies(policies.SIZE))
    assert all(len(each) == 1 and each[0] > 0 for each in seconds.values())


def test_sheets_show_every_policy_and_every_learnt_operation(tmp_path: Path) -> None:
    contact_sheets.main(tmp_path)
    side, label = contact_sheets.SIDE + 2, contact_sheets.LABEL
    for name, lines in {"policies": 8, "warp": 11}.items():
        sheet = np.asarray(Image.open(tmp_path / f"{name}.jpg"), np.float32)
        assert sheet.shape[0] == lines * side
        rows = [sheet[at * side : (at + 1) * side, label:] for at in range(lines)]
        for at, row in enumerate(rows):
            assert all(np.abs(row - other).mean() > 1 for other in rows[:at])
    kept = [ROOT / f"docs/results/{name}.jpg" for name in ("policies", "warp")]
    assert sum(path.stat().st_size for path in kept) < 400_000

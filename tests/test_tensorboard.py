"""Event files read back with TensorBoard's own reader: every number of metrics.jsonl once, over resumes and forks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_autodo import learning
from test_train import cut_back, run_train

from autodo_dist import curves
from autodo_dist.curves import Curves, points
from autodo_dist.errors import AutodoError

Points = dict[str, list[tuple[int, float]]]


def small(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two epochs of four steps, learnt from the second on in hyper passes; a line every other step."""
    sizes = {"data__image_size": 16, "train__batch_size": 60, "train__steps_per_pass": 4}
    steps = {"train__log_every": 2, "checkpoint__every_steps": 3, "train__tensorboard": True}
    return learning(digits, folder, **sizes | steps | changes)


def read(run: Path) -> Points:
    """What TensorBoard shows."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(it.step, it.value) for it in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(run: Path) -> Points:
    """The same from metrics.jsonl, in float32, as event files have it."""
    found: Points = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "evaluation":
            names = {
                f"{part}_{what}": f"{what}/{part}" for part in ("validation", "test") for what in ("loss", "accuracy")
            }
        else:
            names = {name: f"{name}/{row['kind']}" for name in row.keys() - {"kind", "step", "epoch"}}
            names |= {name: f"{name}/train" for name in ("loss", "accuracy") if name in row}
        for name, tag in names.items():
            found.setdefault(tag, []).append((row["step"], float(np.float32(row[name]))))
    return found


def test_curves_are_the_lines_of_metrics(digits: Path, tmp_path: Path) -> None:
    run = run_train(small(digits, tmp_path))
    found = read(run)
    assert found == expected(run)
    assert {"loss/train", "loss/validation", "accuracy/test", "lr/task", "cosine/hyper", "data_wait_share/task"} < set(
        found
    )
    assert [step for step, _ in found["loss/train"]] == [2, 4, 10, 12]
    assert [step for step, _ in found["accuracy/validation"]] == [4, 12]


@pytest.mark.parametrize("step", [3, 4, 9])
def test_a_resume_leaves_no_point_twice(digits: Path, tmp_path: Path, step: int) -> None:
    tree = small(digits, tmp_path)
    run = run_train(tree)
    cut_back(run, step)
    run_train(tree)
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert read(run) == expected(run)


def test_a_start_at_an_evaluation_that_was_written_but_not_saved(tmp_path: Path) -> None:
    """A stop in an evaluation saves its step; killed right after the next try, the run evaluates once more."""
    lines = [{"kind": "task", "step": 4, "epoch": 1.0, "loss": 2.0}]
    again = {"kind": "evaluation", "step": 4, "epoch": 1, "test_loss": 1.5, "test_accuracy": None}
    first = Curves(tmp_path, 0, [])
    for row in (*lines, again):
        first.write(row)
    first.close()
    second = Curves(tmp_path, 4, lines)  # to which metrics.jsonl was cut
    second.write(again)
    second.close()
    assert read(tmp_path) == {"loss/train": [(4, 2.0)], "loss/test": [(4, 1.5)]}


def test_a_fork_goes_on(digits: Path, tmp_path: Path) -> None:
    plain = {f"learn__{name}": value for name, value in (("augment", "none"), ("weight", False), ("soft_label", False))}
    source = run_train(small(digits, tmp_path / "plain", **plain))
    run = run_train(small(digits, tmp_path, run__fork=f"{source}@4"))
    found = read(run)
    assert found == expected(run)
    assert [step for step, _ in found["loss/train"]] == [10, 12]


def test_no_files_where_none_are_wanted(digits: Path, tmp_path: Path) -> None:
    run = run_train(small(digits, tmp_path, train__tensorboard=False))
    assert not (run / "tensorboard").exists()


def test_a_missing_package_is_said_before_anything_starts(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AutodoError, match="the package tensorboard is not installed; pip install") as caught:
        run_train(small(digits, tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    curves.check(False)


def test_a_full_disk_ends_the_curves_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = Curves(tmp_path, 0, [])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    row = {"kind": "task", "step": 1, "epoch": 0.1, "loss": 2.0}
    written._writer.add_scalar = full  # type: ignore[method-assign]
    written.write(row)
    written.write(row)
    written.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text


def test_what_a_line_adds() -> None:
    row = {"kind": "evaluation", "step": 1, "epoch": 1, "test_loss": None, "test_accuracy": 0.5, "test_pictures": 7}
    assert points(row | {"test_accuracy_per_class": {"cat": 0.5}}) == {"accuracy/test": 0.5}

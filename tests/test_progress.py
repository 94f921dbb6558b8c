"""The progress in a checkpoint: taken back as it was, and refused in one line where another version wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import put_header
from test_train import cut_back, run_train, settings
from typer.testing import CliRunner

from autodo_dist.cli import app
from autodo_dist.errors import AutodoError
from autodo_dist.parallel import checkpoint
from autodo_dist.progress import Progress, read_progress
from autodo_dist.steps import FIGURES

MADE = Progress(
    epoch=3,
    pass_="task",
    position=2,
    step=44,
    hyper_steps=12,
    lines=9,
    sums=[[0.1 + 0.2, 1.0, 1e-300, -0.0, 3.0, 4.0]] * 2,
    seconds={"task": 1.5},
    last={"kind": "evaluation", "test_loss": None},
    best={"step": 30, "validation_accuracy": 1 / 3},
    best_test=1.0,
    left_out=[(0, "task", 3)],
)


def in_json() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(MADE)))
    return found


def test_it_comes_back_as_it_was() -> None:
    assert read_progress(in_json(), Path("here")) == MADE
    assert all(getattr(MADE, field.name) != getattr(Progress(), field.name) for field in fields(Progress))
    assert len(MADE.sums[0]) == len(FIGURES)


@pytest.mark.parametrize("name", [field.name for field in fields(Progress)])
def test_nothing_may_be_missing(name: str) -> None:
    """A default in its place would be a step backwards."""
    found = in_json()
    del found[name]
    with pytest.raises(AutodoError, match=rf"here: its progress is not what this version writes \({name}: missing\)"):
        read_progress(found, Path("here"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": "3"}, "epoch: input should be a valid integer"),
        ({"epoch": True}, "epoch: input should be a valid integer"),
        ({"step": 44.0}, "step: input should be a valid integer"),
        ({"position": -1}, "position: input should be greater than or equal to 0"),
        ({"pass_": "evaluation"}, "pass_: input should be 'hyper' or 'task'"),
        ({"sums": [[1.0, 2.0]]}, "sums.0: list should have at least 6 items"),
        ({"sums": [[1.0] * 7]}, "sums.0: list should have at most 6 items"),
        ({"sums": [None]}, "sums.0: input should be a valid array"),
        ({"best_test": float("nan")}, "best_test: input should be a finite number"),
        ({"last": []}, "last: input should be an object"),
        ({"left_out": [[0, "task"]]}, "left_out.0.2: field required"),
        ({"left_out": [[0, "task", [3]]]}, "left_out.0.2: input should be a valid integer"),
        ({"colour": 1}, "colour: unexpected keyword argument"),
        ({"\x1b[2J\n": 1}, r"\\x1b\[2J\\n: unexpected keyword argument"),
        ({"epoch": None, "colour": 1}, r"epoch: input should be a valid integer \(and 1 more\)"),
    ],
    ids=str,
)
def test_another_versions_is_refused_in_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(AutodoError, match=rf"not what this version writes \({words}.*go on with the version") as caught:
        read_progress(in_json() | change, Path("here"))
    assert "\n" not in str(caught.value)


def test_a_run_of_another_version(digits: Path, tmp_path: Path) -> None:
    """Its checkpoint can be evaluated. A resume and a fork stop, and leave it where it is."""
    tree = settings(digits, tmp_path, run__name="plain", data__image_size=8)
    folder = run_train(tree)
    cut_back(folder, 6)
    path = checkpoint.folder(folder / "checkpoints", 6)
    evaluated = CliRunner().invoke(app, ["evaluate", str(folder)]).output
    assert evaluated.startswith("step 6: test accuracy")
    progress = json.loads((path / "checkpoint.json").read_text())["progress"]
    del progress["step"]
    put_header(path, {"progress": progress})
    assert CliRunner().invoke(app, ["evaluate", str(folder)]).output == evaluated
    fork = settings(digits, tmp_path, run__name="forked", run__fork=f"{folder}@6", data__image_size=8)
    for words in (tree, fork):
        with pytest.raises(AutodoError, match=r"plain/checkpoints/step-00000006: its progress .* \(step: missing\)"):
            run_train(words)
        torch.distributed.destroy_process_group()
    assert checkpoint.check(path) is None

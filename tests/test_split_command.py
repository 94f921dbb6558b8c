"""`autodo split` and data.split: the same bytes anywhere, the run that the settings make, refusals in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from autodo_dist.build_data import build_split
from autodo_dist.commands.evaluate import evaluate_checkpoint
from autodo_dist.commands.split import show
from autodo_dist.commands.split import split as command
from autodo_dist.data.manifest import Manifest, read_manifest
from autodo_dist.data.split import Split
from autodo_dist.data.split_file import read_split
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.train import train


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = "from autodo_dist.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, "split", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def settings(digits: Path, folder: Path, **data: Any) -> dict[str, Any]:
    """A few steps of one epoch."""
    return {
        "run": {"root": str(folder), "name": "run"},
        "data": {"root": str(digits), "image_size": 32, "crop": "whole", "flip": False, "threads": 1} | data,
        "model": {"name": "convnet"},
        "optim": {"warmup_epochs": 0},
        "train": {"epochs": 1, "batch_size": 250},
    }


def figures(folder: Path) -> list[tuple[float | None, ...]]:
    """Losses of training and test in a run's metrics."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(row.get("loss"), row.get("test_loss"), row.get("validation_loss")) for row in rows]


def assert_equal(a: Split, b: Split) -> None:
    for name in ("train", "validation", "test", "label_N"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def test_two_processes_write_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    """Under another hash seed, locale, time zone and place; and once more into the same file."""
    options = ("--imbalance", "exponential", "--ratio", "20", "--noise", "asymmetric", "--noise-rate", "0.3")
    copy = shutil.copytree(digits, tmp_path / "copy")
    first = run(digits, tmp_path / "a", *options, PYTHONHASHSEED="1", TZ="UTC")
    second = run(copy, tmp_path / "b", *options, PYTHONHASHSEED="2", TZ="Asia/Tokyo", LC_ALL="C")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "was there already with the same bytes" in run(digits, tmp_path / "a", *options).stdout
    other = run(digits, tmp_path / "a", *options, "--seed", "1")
    assert (other.returncode, other.stdout) == (1, "")
    assert re.fullmatch(r"error: split .*/a: is there already and is not this split; .*\n", other.stderr)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_the_same_numbers_make_the_same_split(digits: Path, tmp_path: Path, fraction: float | None) -> None:
    command(digits, tmp_path / "file", validation_fraction=fraction, ratio=10, noise_rate=0.1, seed=3)
    drawn = {"validation_fraction": fraction, "imbalance_ratio": 10, "label_noise": 0.1, "split_seed": 3}
    manifest = read_manifest(digits)
    by_settings, by_file = (
        build_split(check_config(settings(digits, tmp_path, **data), "test"), manifest)
        for data in (drawn, {"split": str(tmp_path / "file")})
    )
    assert_equal(by_settings, by_file)
    header = json.loads((tmp_path / "file").read_bytes().partition(b"\n")[0])
    assert header["manifest"] == manifest.checksum
    assert header["made"] == {
        "validation_fraction": fraction,
        "imbalance": "step",
        "imbalance_ratio": 10,
        "noise": "uniform",
        "noise_rate": 0.1,
        "mapping": None,
        "seed": 3,
        "labels_sha256": None,
    }


def test_what_is_shown_is_what_is_written(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = tmp_path / "mapping.csv"
    mapping.write_text("from,to\n3,8\n8,3\n")
    out = tmp_path / "file"
    command(digits, out, imbalance="exponential", ratio=5, noise="asymmetric", noise_rate=0.5, mapping=mapping)
    manifest, shown = read_manifest(digits), capsys.readouterr().out
    split = read_split(out, manifest)
    rows = [[int(word) for word in line.split()] for line in shown.splitlines() if re.fullmatch(r"[\s\d]+\d\s*", line)]
    true, given = manifest.label_N[split.train], split.label_N[split.train]
    assert rows[:10] == [
        [
            label,
            *((manifest.label_N == label) & (manifest.part_N == 0)).nonzero()[0].shape,
            int((true == label).sum()),
            int((given == label).sum()),
            int((manifest.label_N[split.validation] == label).sum()),
            int((manifest.label_N[split.test] == label).sum()),
        ]
        for label in range(10)
    ]
    assert rows[-10:] == [
        [label, label, *(int(((true == label) & (given == other)).sum()) for other in range(10))] for label in range(10)
    ]
    assert set(zip(true[true != given].tolist(), given[true != given].tolist(), strict=True)) == {(3, 8), (8, 3)}
    wrong = int((true != given).sum())
    assert (
        f"noise: {wrong} of {len(true)} train labels are not the true ones ({100 * wrong / len(true):.2f} %)" in shown
    )
    assert f"{out}: 1797 samples, {out.stat().st_size:,} bytes" in shown


def test_given_labels_are_taken_from_a_file(digits: Path, tmp_path: Path) -> None:
    manifest = read_manifest(digits)
    labels = tmp_path / "labels.csv"
    wrong_N = (manifest.label_N + 1) % 10
    keys = manifest.keys.to_pylist()
    labels.write_text(
        "key,label\n" + "".join(f"{key},{manifest.classes[label]}\n" for key, label in zip(keys, wrong_N, strict=True))
    )
    command(digits, tmp_path / "file", ratio=3, labels=labels)
    split = read_split(tmp_path / "file", manifest)
    expected = manifest.label_N.copy()
    expected[split.train] = wrong_N[split.train]
    assert np.array_equal(split.label_N, expected)
    made = json.loads((tmp_path / "file").read_bytes().partition(b"\n")[0])["made"]
    assert made["labels_sha256"] == hashlib.sha256(labels.read_bytes()).hexdigest()


def thousand_classes() -> tuple[Manifest, Split]:
    """Class c has c + 1 train samples, one validation and one test sample; 7 of class 500 are given as 501."""
    label_N = np.concatenate([np.repeat(np.arange(1000), np.arange(1, 1001)), np.arange(1000), np.arange(1000)])
    part_N = np.repeat(np.arange(3), [500_500, 1000, 1000])
    empty = np.zeros(0)
    manifest = Manifest(
        root=Path("data"),
        name="many",
        classes=tuple(f"[n{label:04d}]" for label in range(1000)),
        shards=(),
        shard_N=empty,
        offset_N=empty,
        size_N=empty,
        height_N=empty,
        width_N=empty,
        label_N=label_N.astype(np.int32),
        part_N=part_N.astype(np.int8),
        checksum="0",
    )
    given_N = manifest.label_N.copy()
    given_N[np.flatnonzero(given_N == 500)[:7]] = 501
    given_N[0] = 999
    return manifest, Split(*(np.flatnonzero(part_N == part) for part in range(3)), given_N)


def test_many_classes_are_shown_by_quantiles_and_extremes(capsys: pytest.CaptureFixture[str]) -> None:
    manifest, split = thousand_classes()
    show(split, manifest, Console(width=100, markup=False, highlight=False))
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert len(rows) < 30
    assert ["fewest", "1", "1", "0", "1", "1"] in rows
    assert ["most", "1000", "1000", "1001", "1", "1"] in rows
    assert ["all", "500500", "500500", "500500", "1000", "1000"] in rows
    (median,) = (row for row in rows if row[:1] == ["median"])
    assert int(median[1]) in (500, 501)
    assert "train: most [n0999] 1000, [n0998] 999, [n0997] 998; fewest [n0000] 1, [n0001] 2, [n0002] 3" in shown
    assert "noise: 8 of 500500 train labels are not the true ones (0.00 %)" in shown
    assert ["[n0500]", "[n0501]", "7", "1.40"] in rows
    assert ["[n0000]", "[n0999]", "1", "100.00"] in rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": float("nan")}, "imbalance ratio nan"),
        ({"validation_fraction": 1.0}, "validation fraction 1"),
        ({"validation_fraction": 0.999}, "--validation-fraction: leaves class 0, 1, 2, 3, 4 without a train sample"),
        ({"noise": "asymmetric"}, "--noise asymmetric: changes no label at a rate of 0; add --noise-rate"),
        ({"mapping": Path("m.csv"), "noise_rate": 0.1}, "--mapping m.csv: .*; add --noise asymmetric"),
        ({"labels": Path("l.csv"), "noise_rate": 0.1}, "--labels l.csv: takes the place of drawn noise"),
        ({"labels": Path("l.csv"), "noise": "asymmetric"}, "--labels l.csv: takes the place of drawn noise"),
        ({"labels": Path("l.csv")}, "l.csv: cannot be read"),
    ],
)
def test_options_that_cannot_be_are_refused(
    digits: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AutodoError, match=message) as caught:
        command(digits, tmp_path / "file", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("validation_fraction", 0.0), ("imbalance_ratio", 10), ("label_noise", 0.1), ("split_seed", 1)],
)
def test_a_file_and_a_drawn_split_contradict_each_other(tmp_path: Path, name: str, value: float) -> None:
    tree = settings(tmp_path, tmp_path, split="some.split", **{name: value})
    with pytest.raises(AutodoError, match=rf"data\.split = 'some\.split': .*contradicts data\.{name} = ") as caught:
        check_config(tree, "test")
    assert "\n" not in str(caught.value)


def test_defaults_beside_a_file_are_no_contradiction(tmp_path: Path) -> None:
    defaults = {"validation_fraction": None, "imbalance_ratio": 1, "label_noise": 0, "split_seed": 0}
    assert check_config(settings(tmp_path, tmp_path, split="a", **defaults), "test").data.split == Path("a")


def test_a_run_by_file_and_its_resume(digits: Path, tmp_path: Path) -> None:
    """It trains as by settings; the file may move, but not change, for a resume, an evaluation and a fork."""
    file, moved = tmp_path / "file", tmp_path / "moved"
    command(digits, file, ratio=2, noise_rate=0.2)
    tree = settings(digits, tmp_path / "by_file", split=str(file))
    train(check_config(tree, "test"))
    train(check_config(settings(digits, tmp_path / "drawn", imbalance_ratio=2, label_noise=0.2), "test"))
    assert figures(tmp_path / "by_file") == figures(tmp_path / "drawn")
    folder = tmp_path / "by_file" / "run"
    assert json.loads((folder / "environment.json").read_text())["split_checksum"] == file.read_bytes()[-65:-1].decode()
    assert json.loads((tmp_path / "drawn/run/environment.json").read_text())["split_checksum"] is None

    file.rename(moved)
    (folder / "summary.json").unlink()
    tree["data"]["split"] = str(moved)
    train(check_config(tree, "test"))
    assert "resumed at step" in (folder / "logs" / "rank-00000.log").read_text()

    old = moved.read_bytes()[-65:-1].decode()
    moved.unlink()
    command(digits, moved, ratio=2, noise_rate=0.2, seed=1)
    new = moved.read_bytes()[-65:-1].decode()
    match = rf"was made with another split than data\.split = .*moved \(checksum {old[:12]}, now {new[:12]}\); set"
    fork = tree | {"run": {"root": str(tmp_path), "name": "fork", "fork": f"{folder}@3"}}
    for refused in (
        lambda: train(check_config(tree, "test")),
        lambda: train(check_config(fork, "test")),
        lambda: evaluate_checkpoint(folder, None, None),
    ):
        with pytest.raises(AutodoError, match=match):
            refused()
    tree["data"].pop("split")
    with pytest.raises(AutodoError, match=rf"data\.split = None \(checksum {old[:12]}, now none\)"):
        train(check_config(tree, "test"))

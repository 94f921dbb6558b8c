"""Whole runs on real ranks: resume bit for bit, the same numbers on any number of ranks, refusals."""

from __future__ import annotations

import collections
import json
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from ranks import RankError, RankPool
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from autodo_dist.build import build
from autodo_dist.commands.evaluate import evaluate, evaluate_checkpoint
from autodo_dist.config import Config
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.parallel.checkpoint_save import BESIDE, size
from autodo_dist.progress import tensors
from autodo_dist.train import train

Usage = collections.namedtuple("Usage", "total used free")  # shutil.disk_usage's
TIMES = ("seconds", "images_per_second", "data_wait_share", "peak_memory_bytes")


def settings(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Twelve steps of 100 pictures over two epochs, saved every five steps; `section__key` changes a setting."""
    tree: dict[str, Any] = {
        "run": {"root": str(folder), "name": "run"},
        "data": {
            "root": str(digits),
            "image_size": 16,
            "crop": "padded",
            "flip": False,
            "imbalance_ratio": 10,
            "label_noise": 0.1,
            "threads": 1,
        },
        "model": {"name": "convnet"},
        "optim": {"lr": 0.05, "warmup_epochs": 1},
        "train": {"epochs": 2, "batch_size": 100, "log_every": 4},
        "checkpoint": {"every_steps": 5, "keep": 99},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return tree


def run_train(tree: dict[str, Any]) -> Path:
    config = check_config(tree, "test")
    train(config)
    return config.folder


def weights(folder: Path, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint by name, read with DCP alone."""
    path = checkpoint.folder(folder / "checkpoints", step)
    assert checkpoint.check(path) is None
    state: dict[str, Any] = _load_state_dict_from_keys(checkpoint_id=path)
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        else:
            flat[prefix] = value

    walk("", state)
    assert any(isinstance(value, torch.Tensor) for value in flat.values())
    return flat


def assert_equal_states(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value
        assert same, name


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def cut_back(folder: Path, step: int) -> None:
    """Leave what a run killed right after the save of `step` would have left, and newer lines of metrics."""
    (folder / "summary.json").unlink()
    for path in checkpoint.complete(folder / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize(
    ("ranks", "model", "batch"), [(1, "convnet", 100), (4, "convnet", 100), (2, "resnet18", 100), (3, "convnet", 100)]
)
def test_resume_is_bit_exact(pool: RankPool, digits: Path, tmp_path: Path, ranks: int, model: str, batch: int) -> None:
    tree = settings(digits, tmp_path, model__name=model, train__batch_size=batch)
    folder = pool.run(ranks, run_train, tree)[0]
    final, metrics, summary = weights(folder, 12), lines(folder), json.loads((folder / "summary.json").read_text())
    assert [row["step"] for row in metrics] == [4, 6, 6, 10, 12, 12]
    cut_back(folder, 5)
    pool.run(ranks, run_train, tree)
    assert_equal_states(weights(folder, 12), final)
    assert lines(folder) == metrics
    again = json.loads((folder / "summary.json").read_text())
    assert again["test_accuracy_per_class"] == summary["test_accuracy_per_class"]
    assert len(json.loads((folder / "environment.json").read_text())["starts"]) == 2


def test_numbers_do_not_depend_on_the_number_of_ranks(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    folders = {}
    for ranks in (1, 2, 3, 4):
        tree = settings(digits, tmp_path / str(ranks), train__precision="fp64", checkpoint__every_steps=None)
        folders[ranks] = pool.run(ranks, run_train, tree)[0]
    for ranks in (2, 3, 4):
        assert_close_runs(folders[ranks], folders[1])


def assert_close_runs(got: Path, expected: Path, step: int = 12) -> None:
    """Weights and lines of metrics to 1e-10."""
    alone = weights(expected, step)
    for name, value in weights(got, step).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, alone[name], rtol=1e-10, atol=1e-10)
    rows = list(zip(lines(got), lines(expected), strict=True))
    assert [(row["kind"], row["step"]) for row, _ in rows] == [(row["kind"], row["step"]) for _, row in rows]
    for row, other in rows:
        for key in ("loss", "accuracy", "cosine", "test_loss", "validation_loss", "test_accuracy"):
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=1e-10)


def test_resume_on_another_number_of_ranks(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    check_four_ranks_then_three(pool, settings(digits, tmp_path, train__precision="fp64"), cut=5, last=12)


def check_four_ranks_then_three(pool: RankPool, tree: dict[str, Any], cut: int, last: int) -> None:
    """A run on four ranks, cut back to step `cut` and finished on three, against itself."""
    folder = pool.run(4, run_train, tree)[0]
    unbroken = Path(shutil.copytree(folder, folder.with_name("unbroken")))
    cut_back(folder, cut)
    pool.run(3, run_train, tree)
    assert_close_runs(folder, unbroken, last)


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tree = settings(digits, tmp_path_factory.mktemp("finished"))
    run_train(tree)
    return tree


@pytest.fixture
def run(finished: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a finished run, in a folder of the test's own."""
    shutil.copytree(finished["run"]["root"], tmp_path / "runs")
    return finished | {"run": {"root": str(tmp_path / "runs"), "name": "run"}}


def folder_of(tree: dict[str, Any]) -> Path:
    return Path(tree["run"]["root"]) / tree["run"]["name"]


def test_a_finished_run_does_nothing(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder_of(run).rglob("*")}
    run_train(run)
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder_of(run).rglob("*")} == before


def test_another_config_is_refused(run: dict[str, Any]) -> None:
    other = run | {"optim": {"lr": 0.06, "warmup_epochs": 1}}
    with pytest.raises(AutodoError, match=r"optim\.lr: 0\.05 -> 0\.06.*another run\.name"):
        run_train(other)


def test_settings_that_change_no_number_may_change(run: dict[str, Any]) -> None:
    cut_back(folder_of(run), 10)
    run_train(run | {"checkpoint": {"every_steps": None, "keep": 1}, "train": run["train"] | {"log_every": 3}})
    assert (folder_of(run) / "summary.json").is_file()


def test_another_data_set_is_refused(run: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(digits, tmp_path / "other"))
    header = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(header | {"name": "other"}))
    with pytest.raises(AutodoError, match="another packed data set"):
        run_train(run | {"data": run["data"] | {"root": str(copy)}})


def test_a_shard_that_is_gone_at_a_resume_is_named_and_nothing_lost(
    pool: RankPool, digits: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(digits, tmp_path / "data"))
    tree = settings(copy, tmp_path)
    folder = pool.run(1, run_train, tree)[0]
    final = weights(folder, 12)
    cut_back(folder, 5)
    (copy / "train-00001.tar").unlink()
    with pytest.raises(RankError, match=r"train-00001\.tar: tar or index is missing; copy it back or pack again"):
        pool.run(1, run_train, tree)
    shutil.copy2(digits / "train-00001.tar", copy)
    pool.run(1, run_train, tree)
    assert_equal_states(weights(folder, 12), final)


@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "header"])
def test_a_broken_newest_checkpoint_is_passed_over(run: dict[str, Any], damage: str) -> None:
    folder = folder_of(run)
    expected = weights(folder, 12)
    (folder / "summary.json").unlink()
    newest = checkpoint.complete(folder / "checkpoints")[-1]
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "delete":
        file.unlink()
    else:
        (newest / "checkpoint.json").write_text("{")
    run_train(run)
    log = (folder / "logs" / "rank-00000.log").read_text()
    assert f"{newest}: " in log
    assert newest.with_suffix(".broken").is_dir()
    assert "resumed at step 10" in log
    assert_equal_states(weights(folder, 12), expected)


def test_all_checkpoints_broken_is_an_error(run: dict[str, Any]) -> None:
    (folder_of(run) / "summary.json").unlink()
    for path in checkpoint.complete(folder_of(run) / "checkpoints"):
        (path / ".metadata").unlink()
    with pytest.raises(AutodoError, match="all broken"):
        run_train(run)


def test_old_checkpoints_are_pruned_but_not_the_best(digits: Path, tmp_path: Path) -> None:
    tree = settings(digits, tmp_path, checkpoint__every_steps=None, checkpoint__keep=1, train__epochs=4)
    folder = run_train(tree)
    best = max(
        (row for row in lines(folder) if row["kind"] == "evaluation"), key=lambda row: row["validation_accuracy"]
    )
    kept = {checkpoint.step_of(path) for path in checkpoint.complete(folder / "checkpoints")}
    assert kept == {best["step"], 24}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["selected_epoch"] == best["epoch"]
    assert summary["test_accuracy_selected"] == best["test_accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 5000}, "more than the 636 train pictures"),
        ({"optim__warmup_epochs": 2}, "not below train.epochs = 2"),
        ({"model__name": "resnet7"}, "model.name = 'resnet7' is unknown"),
        ({"data__root": "/nowhere"}, "no such folder"),
        ({"data__validation_fraction": 0.999}, "leaves class 0, 1, 2, 3, 4 without a train picture"),
        ({"data__device": "gpu"}, "this rank trains on the CPU"),
        ({"run__root": "/proc/runs"}, "cannot be written to"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    digits: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AutodoError, match=message):
        run_train(settings(digits, tmp_path, **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_more_ranks_than_pictures_in_a_batch(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="less than one picture for each of 4 ranks"):
        pool.run(4, run_train, settings(digits, tmp_path, train__batch_size=3))


def test_a_run_without_validation_pictures(digits: Path, tmp_path: Path) -> None:
    folder = run_train(settings(digits, tmp_path, data__validation_fraction=0.0, train__epochs=2))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_accuracy_selected"] is None
    assert 0 <= summary["test_accuracy_final"] <= 1


def test_config_round_trip(digits: Path, tmp_path: Path) -> None:
    config: Config = check_config(settings(digits, tmp_path), "test")
    assert check_config(yaml.safe_load(config.to_yaml()), "again") == config


def run_on_small_disk(tree: dict[str, Any], from_step: int, to_step: int) -> None:
    """Train while no file may grow beyond 200 kB in the saves of these steps: the kernel refuses the write."""
    save = checkpoint_save.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(root: Path, step: int, *rest: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 if from_step <= step <= to_step else soft, hard))
        try:
            save(root, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        with patch.object(checkpoint_save, "save", limited):
            run_train(tree)
    finally:
        signal.signal(signal.SIGXFSZ, handler)


def log_of(folder: Path) -> str:
    return (folder / "logs" / "rank-00000.log").read_text()


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_goes_on_while_the_disk_is_full(pool: RankPool, digits: Path, tmp_path: Path, ranks: int) -> None:
    """Two saves fail, with the numbers; the one before is kept, the ones after succeed, and nothing else changes."""
    plain = pool.run(ranks, run_train, settings(digits, tmp_path / "plain"))[0]
    tree = settings(digits, tmp_path / "full")
    pool.run(ranks, run_on_small_disk, tree, 6, 10)
    folder = tmp_path / "full" / "run"
    assert_equal_states(weights(folder, 12), weights(plain, 12))
    assert lines(folder) == lines(plain)
    saved = [checkpoint.step_of(path) for path in checkpoint.complete(folder / "checkpoints")]
    assert saved == [5, 12]
    assert not list((folder / "checkpoints").glob("*.partial"))
    log = log_of(folder)
    for step in (6, 10):
        assert re.search(
            rf"WARNING checkpoint .*/step-{step:08d}: cannot be written \(.*\); it takes 1,939,792 bytes, "
            r"[\d,]+ are free; kept: step-00000005",
            log,
        )
    assert log.count("cannot be written") == 2


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_last_save_must_succeed(pool: RankPool, digits: Path, tmp_path: Path, ranks: int) -> None:
    tree = settings(digits, tmp_path, checkpoint__keep=1)
    with pytest.raises(RankError, match=r"step-00000012: cannot be written \(.*\); it takes .* free; free space or"):
        pool.run(ranks, run_on_small_disk, tree, 10, 12)
    folder = tmp_path / "run"
    assert [checkpoint.step_of(path) for path in checkpoint.complete(folder / "checkpoints")] == [6]
    assert not (folder / "summary.json").exists()
    pool.run(ranks, run_train, tree)
    assert "resumed at step 6" in log_of(folder)
    assert (folder / "summary.json").is_file()


def sizes(tree: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors by `size`, and of its files."""
    config = check_config(tree, "test")
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        state = tensors(build(config, read_manifest(config.data.root), ranks))
        checkpoint_save.save(config.folder, 1, state, {}, ranks)
        return size(state), sum(path.stat().st_size for path in checkpoint.folder(config.folder, 1).iterdir())


def test_size_counts_every_tensor_once(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """The model on all ranks, and the parts that each has of the tables."""
    learn = {"augment": "per_sample", "weight": True, "soft_label": True}
    tree = settings(digits, tmp_path) | {"learn": learn, "hyper": {"start_epoch": 1}}
    ((one, files),) = pool.run(1, sizes, tree)
    three = pool.run(3, sizes, tree)
    assert [found for found, _ in three] == [one] * 3
    assert one < files < one * 1.01 + BESIDE
    assert one < three[0][1] < one * 1.01 + BESIDE


def test_a_save_that_cannot_fit_is_not_begun(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not know its size says 0."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total=10**9, used=0, free=2_900_000))
    monkeypatch.setattr(checkpoint_save, "_write", lambda *_: pytest.fail("was begun"))
    with pytest.raises(AutodoError, match=r"step-00000012: .* \(the disk is too full\); .* 2,900,000 are free; free"):
        run_train(settings(digits, tmp_path))
    torch.distributed.destroy_process_group()
    assert log_of(tmp_path / "run").count("kept: none") == 4
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total=0, used=0, free=0))
    folder = run_train(settings(digits, tmp_path))
    assert len(checkpoint.complete(folder / "checkpoints")) == 4


def test_broken_checkpoints_do_not_push_out_good_ones(digits: Path, tmp_path: Path) -> None:
    """Two newest broken, two kept: what is saved next must stay."""
    tree = settings(digits, tmp_path, checkpoint__keep=2)
    folder = run_train(tree | {"checkpoint": {"every_steps": 5, "keep": 99}})
    (folder / "summary.json").unlink()
    for path in checkpoint.complete(folder / "checkpoints")[-2:]:
        (path / ".metadata").unlink()
    run_train(tree)
    kept = [checkpoint.step_of(path) for path in checkpoint.complete(folder / "checkpoints")]
    assert kept[-1] == 12
    assert all(checkpoint.check(path) is None for path in checkpoint.complete(folder / "checkpoints"))


def test_a_copy_beside_the_checkpoints_is_left_alone(run: dict[str, Any]) -> None:
    folder = folder_of(run)
    newest = checkpoint.complete(folder / "checkpoints")[-1]
    copy = Path(shutil.copytree(newest, newest.with_name(newest.name + ".bak")))
    assert checkpoint.complete(folder / "checkpoints")[-1] == newest
    (folder / "summary.json").unlink()
    run_train(run)
    assert copy.is_dir()


def test_a_diverged_run_stops(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match=r"step \d+: the .* not finite.*; lower optim\.lr .* or set train\.on_nonfi"):
        run_train(settings(digits, tmp_path, optim__lr=1e30, train__log_every=1))


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_is_what_torch_is_asked_for(digits: Path, tmp_path: Path, wanted: bool) -> None:
    """It stays as the newest run of a process wants it. On the CPU it changes no number."""
    try:
        run_train(settings(digits, tmp_path, train__deterministic=wanted, train__epochs=1, optim__warmup_epochs=0))
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert torch.is_deterministic_algorithms_warn_only_enabled() == wanted
        assert not wanted or os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_evaluate_says_that_there_is_no_test_part(tmp_path: Path) -> None:
    root = tmp_path / "packed"
    invoke = ["autodo", "pack", "digits", str(root), "--test-fraction", "0"]
    subprocess.run(invoke, check=True, capture_output=True)
    folder = run_train(settings(root, tmp_path))
    assert json.loads((folder / "summary.json").read_text())["test_accuracy_final"] is None
    with pytest.raises(AutodoError, match="no test part"):
        evaluate(folder, None, None)


def test_evaluate_checks_the_data_and_takes_its_new_place(run: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(digits, tmp_path / "moved"))
    expected = json.loads((folder_of(run) / "summary.json").read_text())["test_accuracy_final"]
    assert evaluate_checkpoint(folder_of(run), None, moved)["accuracy"] == expected
    with (moved / "test-00000.tar").open("ab") as tar:
        tar.write(bytes(512))
    with pytest.raises(AutodoError, match=r"test-00000\.tar: \d+ bytes, \d+ were packed"):
        evaluate_checkpoint(folder_of(run), None, moved)

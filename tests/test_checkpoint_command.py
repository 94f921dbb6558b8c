"""`autodo checkpoint list | verify | diff | prune`: what they say, their exit status, and what is left on the disk."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankPool
from test_checkpoint import save
from test_row_table import CPU, RULE, sparse_ids
from test_rows_command import kilobytes
from typer.testing import CliRunner, Result

from autodo_dist.cli import app
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json
from autodo_dist.parallel import checkpoint, checkpoint_diff, checkpoint_save, comm
from autodo_dist.parallel.checkpoint_diff import TensorDifference, differences
from autodo_dist.parallel.checkpoint_header import write_header
from autodo_dist.parallel.checkpoint_rows import RowReader
from autodo_dist.parallel.row_table import RowTable


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, words)])


def said(*words: object) -> str:
    result = call(*words)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def flip(path: Path) -> None:
    """One bit of the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 10 to 50, the best by validation that of step 20."""
    run = tmp_path_factory.mktemp("five") / "run"
    for step in (10, 20, 30, 40, 50):
        progress = {"epoch": step // 10, "best": {"step": min(step, 20)}, "seconds": {"task": step / 7}}
        save(run / "checkpoints", {"weight": torch.full((40, 5), float(step))}, step, progress)
    return run


@pytest.fixture
def run(five: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(five, tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.complete(run / "checkpoints")]


def of(run: Path, step: int) -> Path:
    return checkpoint.folder(run / "checkpoints", step)


def test_list(run: Path) -> None:
    (of(run, 30) / "__0_0.distcp").unlink()
    of(run, 10).rename(of(run, 10).with_suffix(".broken"))
    shutil.copytree(of(run, 20), of(run, 60).with_suffix(".partial"))
    shutil.copytree(of(run, 50), of(run, 50).with_suffix(".replaced"))
    head, _, *rows = said("list", run).splitlines()
    assert head == f"{run}/checkpoints: 4 checkpoints, 3 partial, replaced or broken"
    assert [row.split()[0] for row in rows] == ["20", "30", "40", "50", "10", "50", "60"]
    size = sum(file.stat().st_size for file in of(run, 20).iterdir())
    assert re.match(rf" +20 +2 +{size:,}  20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  complete, best by validation$", rows[0])
    assert rows[1].endswith("broken: __0_0.distcp is unreadable (No such file or directory)")
    assert rows[2].endswith("complete")
    assert rows[3].endswith("complete, newest")
    assert rows[4].endswith("renamed as broken")
    assert rows[5].endswith("its step was saved again; the next start takes it back where that is not there")
    assert rows[6].endswith("left by a save that broke off, or being written")


def test_verify(run: Path) -> None:
    assert len(said("verify", run).splitlines()) == 5
    flip(of(run, 20) / "__0_0.distcp")
    assert "complete, best" in said("list", run)  # which reads no contents
    result = call("verify", run)
    assert [line.partition(":")[0][-2:] for line in result.stdout.splitlines()] == ["10", "30", "40", "50"]
    assert isinstance(result.exception, AutodoError)
    assert "1 not as written (step-00000020: __0_0.distcp is not what was written (checksum))" in str(result.exception)
    assert said("verify", run, "--step", 30).startswith(str(of(run, 30)))
    with pytest.raises(AutodoError, match="is not what was written"):
        said("verify", run, "--step", 20)
    (of(run, 40) / ".metadata").unlink()
    with pytest.raises(AutodoError, match=r"2 not as written .*step-00000040: .metadata is unreadable \(No such file"):
        said("verify", run)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_verify_finds_any_damage_and_names_the_file(run: Path, name: str, damage: str) -> None:
    file = of(run, 50) / name
    if damage == "flip":
        raw = file.read_bytes()
        place = len(raw) // 2
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
    with pytest.raises(AutodoError, match="step-00000050") as caught:
        said("verify", run)
    assert f"step-00000050: {name} " in str(caught.value)


def test_equal_checkpoints(run: Path, five: Path) -> None:
    """Whatever their wall-clock times were."""
    header = read_json(of(run, 20) / "checkpoint.json")
    del header["sha256"]
    write_header(of(run, 20), header | {"progress": header["progress"] | {"seconds": {"task": 9.9}}})
    assert said("diff", f"{run}@20", f"{five}@20") == "equal: 1 tensors, and the progress\n"
    assert said("diff", run, f"{five}@50") == "equal: 1 tensors, and the progress\n"  # the newest


def test_different_checkpoints(run: Path, five: Path) -> None:
    result = call("diff", f"{run}@30", f"{five}@10")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "weight: 200 of 200 differ, by at most 20, relative 0.667",
        "progress best.step: 20 against 10",
        "progress epoch: 3 against 1",
        "progress step: 30 against 10",
    ]


def test_the_number_of_saving_ranks_is_no_difference(pool: RankPool, tmp_path: Path) -> None:
    for ranks in (1, 3):
        pool.run(ranks, save_same_table, tmp_path / str(ranks) / "checkpoints")
    assert said("diff", tmp_path / "1", tmp_path / "3") == "equal: 3 tensors, and the progress\n"


def save_same_table(root: Path) -> None:
    """Forty-one rows, each on one of the ranks."""

    def start(ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.sin(ids[:, None] * (1.0 + np.arange(7))))

    with comm.process_group(comm.place(), CPU) as ranks:
        checkpoint_save.save(root, 3, RowTable(sparse_ids(41), start, ranks, RULE).state(), {"step": 3}, ranks)


def compared(tmp_path: Path, left: dict[str, Any], right: dict[str, Any]) -> dict[str, TensorDifference]:
    paths = [save(tmp_path / side / "checkpoints", state) for side, state in (("left", left), ("right", right))]
    return {it.name: it for it in differences(*(RowReader(path) for path in paths))}


def test_every_kind_of_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula, in blocks smaller than a tensor."""
    monkeypatch.setattr(checkpoint_diff, "BLOCK", 100)
    torch.manual_seed(0)
    base = torch.randn(50, 7)
    other = base.clone()
    other[::3] += torch.randn(17, 7) * 1e-3
    nan = torch.tensor([torch.nan, 1.0])
    left = {
        "same": base,
        "close": base,
        "gone": base,
        "shape": base,
        "type": base,
        "nan": nan,
        "count": torch.tensor(4),
    }
    right = {"same": base, "close": other, "new": base, "shape": base[:49], "type": base.double()}
    right |= {"nan": nan.clone(), "count": torch.tensor(6), "zero": torch.tensor([-0.0])}
    found = compared(tmp_path, left | {"zero": torch.tensor([0.0])}, right)
    assert sorted(found) == ["close", "count", "gone", "new", "shape", "type", "zero"]
    a, b = base.double(), other.double()
    close = found["close"]
    assert (close.elements, close.total) == (17 * 7, 350)
    assert close.max_absolute == pytest.approx(float((a - b).abs().max()), rel=1e-12)
    relative = ((a - b).abs() / torch.maximum(a.abs(), b.abs())).max()
    assert close.max_relative == pytest.approx(float(relative), rel=1e-12)
    assert (found["count"].max_absolute, found["count"].max_relative) == (2, pytest.approx(1 / 3))
    assert found["gone"].what == f"missing in {tmp_path}/right/checkpoints/step-00000003"
    assert found["new"].what.startswith(f"missing in {tmp_path}/left/")
    assert found["shape"].what == "float32 (50, 7) against float32 (49, 7)"
    assert found["type"].what == "float32 (50, 7) against float64 (50, 7)"
    assert (found["zero"].elements, found["zero"].max_absolute, found["zero"].max_relative) == (1, 0, 0)


def test_infinity_against_a_number(tmp_path: Path) -> None:
    found = compared(tmp_path, {"x": torch.tensor([torch.inf, 1.0])}, {"x": torch.tensor([5.0, 1.0])})["x"]
    assert (found.elements, found.max_absolute, found.max_relative) == (1, torch.inf, torch.inf)


def test_a_diff_takes_memory_of_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_diff, "BLOCK", 4_000_000)
    state = {"table": torch.randn(40_000, 500)}  # 80 MB
    left = save(tmp_path / "left" / "checkpoints", state)
    state["table"][-1, -1] += 1
    right = save(tmp_path / "right" / "checkpoints", state)
    del state
    readers = RowReader(left), RowReader(right)
    resident = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    assert [it.elements for it in differences(*readers)] == [1]
    assert (kilobytes("VmHWM") - resident) * 1024 < 10 * checkpoint_diff.BLOCK


@pytest.mark.parametrize(("keep", "left"), [(1, [20, 50]), (2, [20, 40, 50]), (9, [10, 20, 30, 40, 50])])
def test_prune_keeps_the_newest_and_the_best(run: Path, keep: int, left: list[int]) -> None:
    expected = sum(file.stat().st_size for step in {10, 20, 30, 40, 50} - {*left} for file in of(run, step).iterdir())
    dry = said("prune", run, "--keep", keep, "--dry-run").splitlines()
    assert steps(run) == [10, 20, 30, 40, 50]
    wet = said("prune", run, "--keep", keep).splitlines()
    assert steps(run) == left
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [of(run, step).name for step in left]
    assert wet[-1] == f"{5 - len(left)} of 5 checkpoints, {expected:,} bytes"
    assert dry == [line.replace("deleting", "would delete") for line in wet[:-1]] + [wet[-1] + " (nothing was deleted)"]


def test_prune_never_deletes_the_newest_good_one(run: Path) -> None:
    for step in (40, 50):
        flip(of(run, step) / "__0_0.distcp")
    said("prune", run, "--keep", 1)
    assert steps(run) == [20, 30, 50]
    for step in (20, 30):
        flip(of(run, step) / "__0_0.distcp")
    with pytest.raises(AutodoError, match="none of its checkpoints is as written; nothing is deleted"):
        said("prune", run, "--keep", 1)
    assert steps(run) == [20, 30, 50]


def test_prune_does_not_follow_a_link(run: Path) -> None:
    shutil.rmtree(of(run, 10))
    of(run, 10).symlink_to(of(run, 30))
    with pytest.raises(AutodoError, match="step-00000010 is a link; nothing is deleted"):
        said("prune", run, "--keep", 1)
    assert len(steps(run)) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "{run}/none"], "no checkpoints there; see `ls"),
        (["verify", "{run}", "--step", "7"], "no checkpoint of step 7; those there: 10, 20, 30, 40, 50"),
        (["diff", "{run}@7", "{run}@10"], "no checkpoint of step 7"),
        (["diff", "{run}@x", "{run}@10"], "no checkpoints there"),
        (["export", "{run}@10", "{run}/out.bin"], "a name that ends in .safetensors"),
        (["export", "{run}@10", "{run}/none/out.safetensors"], "there is no folder"),
        (["export", "{run}@10", "{run}/out.safetensors"], "no run there"),
    ],
)
def test_bad_words_are_one_line(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(AutodoError, match=message) as caught:
        said(*(word.format(run=run) for word in words))
    assert "\n" not in str(caught.value)
    assert not list(run.glob("out*"))


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert said("list", tmp_path).startswith(f"{tmp_path}/checkpoints: 0 checkpoints")
    assert said("prune", tmp_path, "--keep", 1) == "0 of 0 checkpoints, 0 bytes\n"
    with pytest.raises(AutodoError, match="no checkpoint yet"):
        said("verify", tmp_path)

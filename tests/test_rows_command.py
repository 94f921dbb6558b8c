"""Rows read out of a checkpoint: those of a full load, in memory of their own size; the command that shows them."""

from __future__ import annotations

import csv
import json
import re
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import RankPool
from test_autodo import learning
from test_row_table import CPU, RULE, sparse_ids
from test_train import run_train, settings
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from typer.testing import CliRunner

from autodo_dist.cli import app
from autodo_dist.commands.rows import parse_ids
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, write_json
from autodo_dist.parallel import checkpoint_save, comm
from autodo_dist.parallel.checkpoint_header import write_header
from autodo_dist.parallel.checkpoint_rows import LayoutError, RowReader, Window, find_checkpoint, values_start
from autodo_dist.parallel.row_table import RowTable

ROWS, WIDTH = 7_400, 1_015  # 60 MB with the second moments, in float32
WANTED = np.array([7_399, 0, 17, 2_467, 2_466, 4_934, 4_933, 17], np.int64)  # both sides of three ranks' borders
PER_CHUNK = 20_000  # bytes: a zip's directory and small records
MB = 1_000_000


def save_table(root: Path, dtype: torch.dtype, rows: int = ROWS, width: int = WIDTH) -> None:
    """A table after three steps, saved as a run saves it."""

    def start(ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.sin(ids[:, None] * (1.0 + np.arange(width)))).to(dtype)

    with comm.process_group(comm.place(), CPU) as ranks:
        table = RowTable(sparse_ids(rows), start, ranks, RULE)
        generator = torch.Generator().manual_seed(ranks.rank)
        for step in (1, 2, 3):
            ids = torch.from_numpy(sparse_ids(rows)[np.concatenate([WANTED % rows, np.arange(step)])])
            grads = torch.randn(len(ids), width, generator=generator)
            table.apply_grads(ids, grads, lr=0.1, step=step)
        state = {"hyper": {"rows": table.state(), "shared": torch.arange(6.0)}}
        checkpoint_save.save(root, 3, state, {"step": 3}, ranks)


def kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def system_bytes() -> int:
    """Bytes that this process has asked files for, as the kernel counts them."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float32), (3, torch.float32), (3, torch.bfloat16)], ids=str)
def test_rows_are_those_of_a_full_load(pool: RankPool, tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    """And take memory of their own size, with a checkpoint of 30 to 60 MB: counted here and by the kernel."""
    pool.run(ranks, save_table, tmp_path, dtype)
    path = find_checkpoint(tmp_path, None)
    names = [f"hyper.rows.{name}" for name in ("value", "second_moment", "touched")]
    RowReader(path).rows(names[0], WANTED[:1])  # imports and first allocations
    tracemalloc.start()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    resident, read = kilobytes("VmRSS"), system_bytes()
    reader = RowReader(path)
    found = [reader.rows(name, WANTED) for name in names]
    read, grown = system_bytes() - read, kilobytes("VmHWM") - resident
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    state = _load_state_dict_from_keys(checkpoint_id=path)["hyper"]["rows"]
    for name, rows in zip(names, found, strict=True):
        whole = state[name.rpartition(".")[2]]
        assert rows.dtype == whole.dtype
        assert torch.equal(rows, whole[torch.from_numpy(WANTED)])
    assert found[0].dtype == dtype
    assert found[2].tolist() == [3, 3, 3, 3, 3, 3, 3, 3]
    size = sum(file.stat().st_size for file in path.glob("*.distcp"))
    rows_alone = sum(rows.nbytes for rows in found)
    assert size > 2 * ROWS * WIDTH * dtype.itemsize
    assert rows_alone <= reader.bytes_read <= rows_alone + 3 * ranks * PER_CHUNK
    assert read < reader.bytes_read + 100_000  # .metadata twice, checkpoint.json, /proc
    assert python_peak < 1.5 * MB  # .metadata's checksum is made in blocks of 1 MiB
    assert grown * 1024 < 4 * MB


def test_a_tensor_that_is_not_a_table(pool: RankPool, tmp_path: Path) -> None:
    """More ranks than rows, and a tensor that every rank has; no rows at all."""
    pool.run(4, save_table, tmp_path, torch.float64, 3, 2)
    reader = RowReader(find_checkpoint(tmp_path, 3))
    assert reader.rows("hyper.shared", np.array([5, 0])).tolist() == [5, 0]
    whole = _load_state_dict_from_keys(checkpoint_id=reader.path)["hyper"]["rows"]["value"]
    assert torch.equal(reader.rows("hyper.rows.value", np.arange(3)), whole)
    assert reader.rows("hyper.rows.value", np.arange(0)).shape == (0, 2)
    for row in (6, -1):
        with pytest.raises(AutodoError, match=rf"hyper.shared has 6 rows, not one of {row}"):
            reader.rows("hyper.shared", np.array([row]))
    with pytest.raises(AutodoError, match=r"holds no tensor hyper.rows.colour"):
        reader.size("hyper.rows.colour")


def test_files_that_are_not_as_expected(pool: RankPool, tmp_path: Path) -> None:
    pool.run(1, save_table, tmp_path, torch.float32, 40, 5)
    path = find_checkpoint(tmp_path, None)
    file = path / "__0_0.distcp"
    good, header = file.read_bytes(), read_json(path / "checkpoint.json")
    header.pop("sha256")
    reader = RowReader(path)
    reader.rows("hyper.rows.value", np.arange(40))

    def refused(message: str) -> None:
        with pytest.raises(AutodoError, match=message) as caught:
            reader.rows("hyper.rows.value", np.arange(40))
        assert "\n" not in str(caught.value)

    file.write_bytes(bytes(len(good)))
    refused("hyper.rows.value is not stored as expected")
    file.write_bytes(good.replace(b"little", b"big   "))
    refused("not stored as expected")
    file.write_bytes(good[:300])  # after the sizes were looked at
    refused("not stored as expected")
    with pytest.raises(AutodoError, match=r"__0_0.distcp has \d+ bytes instead of \d+; choose another with --step"):
        RowReader(path)
    file.unlink()
    refused("not stored as expected .*No such file")
    file.write_bytes(good)
    write_header(path, header | {"format": 99})
    with pytest.raises(AutodoError, match="format 99 is newer"):
        RowReader(path)
    write_header(path, header)
    metadata = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(metadata[:-1] + b"x")
    with pytest.raises(AutodoError, match=r".metadata is not what was written"):
        RowReader(path)


def test_compressed_or_strided_values_are_refused(tmp_path: Path) -> None:
    """What torch.save writes of a transposed tensor, and a zip that another program made smaller."""
    shape, file = torch.Size((64, 32)), tmp_path / "tensor"
    torch.save(torch.zeros(32, 64).T, file)
    with pytest.raises(LayoutError, match=r"strides \(1, 64\)"):
        values_start(Window(file, 0, file.stat().st_size), shape, torch.float32)
    torch.save(torch.zeros(64, 32), file)
    size = file.stat().st_size
    assert values_start(Window(file, 0, size), shape, torch.float32) + 64 * 32 * 4 < size
    with pytest.raises(LayoutError, match=r"of torch.float32"):
        values_start(Window(file, 0, size), shape, torch.int32)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as small:
        for record in archive.infolist():
            small.writestr(record.filename, archive.read(record))
    with pytest.raises((LayoutError, RuntimeError)):
        values_start(Window(tmp_path / "small", 0, (tmp_path / "small").stat().st_size), shape, torch.float32)


@pytest.fixture(scope="module")
def learnt(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every group per sample."""
    return run_train(learning(digits, tmp_path_factory.mktemp("rows")))


def call(*words: object) -> str:
    result = CliRunner().invoke(app, ["rows", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def labels(run: Path) -> dict[int, dict[str, str]]:
    with (run / "labels.csv").open(newline="") as file:
        return {int(row["id"]): row for row in csv.DictReader(file)}


def test_the_command_agrees_with_labels_csv(learnt: Path) -> None:
    table = labels(learnt)
    ids = list(table)[5:90:7]
    found = json.loads(call(learnt, "--ids", ",".join(map(str, ids)), "--json"))
    assert (found["step"], found["rows_stored"], found["shared"]) == (18, 636, None)
    assert [row["id"] for row in found["rows"]] == ids
    steps = set()
    for row in found["rows"]:
        expected = table[row["id"]]
        likeliest, *others = row["soft_label"].items()
        assert (row["key"], row["given_label"]) == (expected["key"], expected["given_label"])
        assert row["weight"] == pytest.approx(float(expected["weight"]), rel=1e-5)
        assert likeliest == (expected["learnt_label"], pytest.approx(float(expected["learnt_probability"]), 1e-5))
        assert len(others) == 2
        assert list(row["augment"])[:2] == ["rotate", "translate_x"]
        assert all(0 < it["probability"] < 1 and 0 < it["magnitude"] < 1 for it in row["augment"].values())
        steps.add(row["last_hyper_step"])
        assert (row["second_moment_norm"] > 0) == (row["last_hyper_step"] > 0)
    assert steps <= set(range(7))
    assert len(steps) > 1


def test_the_command_speaks(learnt: Path) -> None:
    """As text, and of a checkpoint before the first hyper step, where everything is as it starts."""
    first, second = list(labels(learnt))[:2]
    assert f"id {first}: " in call(learnt, "--ids", first)
    lines = call(learnt, "--ids", f"{second}, {first}-{first}", "--step", 5).splitlines()
    key, given = (labels(learnt)[second][name] for name in ("key", "given_label"))
    assert lines[0].startswith(f"{learnt}/checkpoints/step-00000005: 2 of 636 rows, ")
    assert lines[1:3] == [f"id {second}: {key}", f"  given label {given}, weight 1"]
    assert lines[3].startswith(f"  likeliest labels: {given} 0.9100, ")
    assert lines[4] == "  rotate: probability 0.2000, magnitude 0.5000"
    assert lines[11] == "  no hyper step yet"
    assert lines[12].startswith(f"id {first}: ")


def test_shared_augmentation_and_weights(digits: Path, tmp_path: Path) -> None:
    changes = {"learn__augment": "shared", "learn__soft_label": False}
    run = run_train(learning(digits, tmp_path, **changes))
    ids = list(labels(run))[:2]
    found = json.loads(call(run, "--ids", ",".join(map(str, ids)), "--json"))
    assert set(found["rows"][0]) == {"id", "key", "given_label", "weight", "last_hyper_step", "second_moment_norm"}
    assert len(found["shared"]) == 7
    assert {it["probability"] for it in found["shared"].values()} != {0.2}
    assert call(run, "--ids", ids[0]).splitlines()[1] == "all samples"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ids", "1,x"], "'x' is neither a number nor a range; write e.g. --ids 3,17,40-45"),
        (["--ids", ""], "neither a number nor a range"),
        (["--ids", "3-"], "neither a number nor a range"),
        (["--ids", "-3"], "neither a number nor a range"),
        (["--ids", "9-3"], "goes backwards; write 3-9"),
        (["--ids", "0-99999999999999999"], "id 0 has no row; only the 636 train ids"),
        (["--ids", "0-1796"], "has no row; only the 636 train ids of this run have one"),
        (["--ids", "5", "--step", "7"], "no checkpoint of step 7; those there: 5, 6, 10, 15, 18"),
        (["--ids", "5", "--data", "/nowhere"], "data /nowhere: no such folder"),
    ],
)
def test_bad_words_are_one_line(learnt: Path, words: list[str], message: str) -> None:
    with pytest.raises(AutodoError, match=re.escape(message)) as caught:
        call(learnt, *words)
    assert "\n" not in str(caught.value)


def test_runs_without_rows_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match="no run there"):
        call(tmp_path / "none", "--ids", 3)
    tree: dict[str, Any] = settings(digits, tmp_path, train__epochs=1, optim__warmup_epochs=0)
    plain = run_train(tree)
    with pytest.raises(AutodoError, match="learns nothing of its samples"):
        call(plain, "--ids", 3)
    for folder in (plain / "checkpoints").iterdir():
        folder.rename(folder.with_suffix(".broken"))
    text = (plain / "config.yaml").read_text().replace("weight: false", "weight: true")
    text = text.replace("start_epoch: 50", "start_epoch: 0")
    (plain / "config.yaml").write_text(text)
    with pytest.raises(AutodoError, match="no checkpoint yet; those there: none"):
        call(plain, "--ids", 3)


def test_ids_and_ranges() -> None:
    assert parse_ids("3,17,40-45") == [(3, 3), (17, 17), (40, 45)]
    assert parse_ids(" 3 , 4 - 4 ") == [(3, 3), (4, 4)]


def test_another_data_set_is_refused(learnt: Path, tmp_path: Path, digits: Path) -> None:
    shutil.copytree(digits, tmp_path / "digits")
    header = read_json(tmp_path / "digits/manifest.json")
    write_json(tmp_path / "digits/manifest.json", header | {"name": "other"})
    assert read_manifest(tmp_path / "digits").name == "other"
    with pytest.raises(AutodoError, match="was made with another packed data set"):
        call(learnt, "--ids", 3, "--data", tmp_path / "digits")

"""`autodo checkpoint export`: torchvision loads the model as it is, and the rows are those of the run."""

from __future__ import annotations

import csv
import dataclasses
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torchvision
from ranks import RankPool
from safetensors import safe_open
from safetensors.torch import load_file
from test_autodo import learning
from test_checkpoint import CPU, save
from test_checkpoint_command import said
from test_rows_command import kilobytes, save_table
from test_train import run_train, settings
from torch import nn

from autodo_dist import export
from autodo_dist import learnt as learnt_module
from autodo_dist.build import build_classifier
from autodo_dist.data.manifest import read_manifest
from autodo_dist.data.split import Split
from autodo_dist.errors import AutodoError
from autodo_dist.hyperparameters import Layout
from autodo_dist.learnt import Source
from autodo_dist.load_config import check_config
from autodo_dist.models import build_model
from autodo_dist.parallel.checkpoint_rows import RowReader


def swap_activations(module: nn.Module) -> nn.Module:
    """What a user of the exported file does to torchvision's network."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.CELU())
        else:
            swap_activations(child)
    return module


def untrained(digits: Path, root: Path, model: str, **changes: Any) -> tuple[Path, nn.Module]:
    """A run's folder with a checkpoint of a model whose BatchNorm has seen a batch."""
    config = check_config(settings(digits, root, model__name=model, **changes), "test")
    config.folder.mkdir(parents=True)
    (config.folder / "config.yaml").write_text(config.to_yaml())
    network = build_classifier(config, 10, CPU)
    network.train()(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=dtype(network)))
    save(config.folder / "checkpoints", {"model": network.state_dict(), "optimizer": {"state": {}}}, 7)
    return config.folder, network.eval()


def dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_torchvision_loads_it_and_gives_the_same_logits(digits: Path, tmp_path: Path, precision: str) -> None:
    run, ours = untrained(digits, tmp_path, "resnet18", train__precision=precision)
    out = tmp_path / "model.safetensors"
    assert said("export", f"{run}@7", out) == f"{out}: resnet18 of step 7, 122 tensors\n"
    theirs = swap_activations(torchvision.models.resnet18(num_classes=10)).to(dtype(ours)).eval()
    theirs.load_state_dict(load_file(out))
    images = torch.randn(4, 3, 64, 64, dtype=dtype(ours))
    with torch.no_grad():
        logits = theirs(images)
        assert torch.equal(logits, ours(images)[1])
    assert logits.std() > 0
    with safe_open(out, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "model": "resnet18",
            "activation": "CELU in the place of ReLU",
            "run": "run",
            "step": "7",
        }
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["model.safetensors"]


def test_a_network_of_our_own_keeps_its_names(digits: Path, tmp_path: Path) -> None:
    run, ours = untrained(digits, tmp_path, "convnet")
    said("export", run, tmp_path / "model.safetensors")
    ours.load_state_dict(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "name", ["vgg11", "densenet121", "vit_b_16", "mobilenet_v3_small", "efficientnet_b0", "swin_t"]
)
def test_names_of_other_families(name: str) -> None:
    """Where the head is called classifier, classifier.6, heads.head, … On the meta device: names and shapes alone."""
    with torch.device("meta"):
        ours = build_model(name, 7, 0)
        theirs = torchvision.models.get_model(name, num_classes=7)
    names = ours.own_names()
    theirs.load_state_dict({names[key]: value for key, value in ours.state_dict().items()}, assign=True)


def test_another_model_than_the_config_says_is_refused(digits: Path, tmp_path: Path) -> None:
    run, _ = untrained(digits, tmp_path, "resnet18")
    text = (run / "config.yaml").read_text()
    for other in ("resnet34", "vgg11"):
        (run / "config.yaml").write_text(text.replace("resnet18", other))
        with pytest.raises(AutodoError, match=f"its tensors are not those of {other}"):
            said("export", run, tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("model*"))


@pytest.fixture(scope="module")
def learnt(pool: RankPool, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every group per sample, saved by three ranks."""
    folder: Path = pool.run(3, run_train, learning(digits, tmp_path_factory.mktemp("export")))[0]
    return folder


def test_the_rows_are_those_of_the_run(learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the run's labels.csv and `autodo rows`; in blocks of a few rows."""
    monkeypatch.setattr(learnt_module, "BLOCK", 10_000)
    out = tmp_path / "model.safetensors"
    assert said("export", learnt, out).endswith(f"\n{tmp_path}/model.parquet: 636 rows\n")
    file = pa.parquet.ParquetFile(tmp_path / "model.parquet")
    assert file.num_row_groups > 5
    rows = file.read().to_pylist()
    with (learnt / "labels.csv").open(newline="") as labels:
        expected = {int(row["id"]): row for row in csv.DictReader(labels)}
    assert [row["id"] for row in rows] == sorted(expected)
    for row in rows:
        csv_row = expected[row["id"]]
        assert (row["key"], row["given_label"]) == (csv_row["key"], csv_row["given_label"])
        assert row["weight"] == pytest.approx(float(csv_row["weight"]), rel=1e-5)
        assert row["learnt_label"] == csv_row["learnt_label"]
        assert row["learnt_probability"] == pytest.approx(float(csv_row["learnt_probability"]), rel=1e-5)
        logits = torch.tensor(row["soft_logit"])
        assert float(torch.softmax(logits, 0).max()) == pytest.approx(row["learnt_probability"], rel=1e-5)
    about = json.loads(file.schema_arrow.metadata[b"autodo"])
    assert about == {"run": "run", "step": 18, "classes": [str(digit) for digit in range(10)]}
    by_hand = json.loads(run_rows(learnt, [row["id"] for row in rows[:9]]))["rows"]
    for row, shown in zip(rows, by_hand, strict=False):
        assert row["last_hyper_step"] == shown["last_hyper_step"]
        for operation, it in shown["augment"].items():
            assert row[f"gate.{operation}"] == pytest.approx(it["probability"], rel=1e-5)
            assert row[f"magnitude.{operation}"] == pytest.approx(it["magnitude"], rel=1e-5)


def run_rows(run: Path, ids: list[int]) -> str:
    from typer.testing import CliRunner

    from autodo_dist.cli import app

    return CliRunner().invoke(app, ["rows", str(run), "--ids", ",".join(map(str, ids)), "--json"]).stdout


def test_shared_augmentation_is_in_the_metadata(digits: Path, tmp_path: Path) -> None:
    run = run_train(learning(digits, tmp_path, learn__augment="shared", learn__weight=False, learn__soft_label=False))
    said("export", run, tmp_path / "model.safetensors")
    table = pa.parquet.read_table(tmp_path / "model.parquet")
    assert table.column_names == ["id", "key", "given_label"]
    assert table.num_rows == 636
    shared = json.loads(table.schema.metadata[b"autodo"])["shared"]
    assert len(shared) == 7
    assert {it["probability"] for it in shared.values()} != {0.2}


def test_nothing_is_overwritten_and_nothing_half_stays(learnt: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    (tmp_path / "model.parquet").write_text("mine")
    with pytest.raises(AutodoError, match=r"model.parquet: is there already"):
        said("export", learnt, out)
    (tmp_path / "model.parquet").unlink()
    with pytest.raises(AutodoError, match="no such folder"):
        said("export", learnt, out, "--data", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    run = Path(shutil.copytree(learnt, tmp_path / "run"))
    file = next((run / "checkpoints" / "step-00000018").glob("__1_0.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AutodoError, match=r"__1_0.distcp has \d+ bytes instead of \d+"):
        said("export", run, tmp_path / "other.safetensors")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("limit", [100_000, 1_000_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(learnt: Path, tmp_path: Path, limit: int) -> None:
    """At the model, of 971 KB; at the rows, of which a limit lower than the model's size cannot be alone."""
    if limit > 971_136:
        (tmp_path / "model.parquet.partial").mkdir()  # cannot be written to
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(AutodoError, match=r"cannot be written .*free space") as caught:
            said("export", learnt, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_memory_does_not_grow_with_the_table(
    pool: RankPool, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of 30 MB that three ranks saved, in blocks of 1 MB."""
    pool.run(3, save_table, tmp_path / "checkpoints", torch.float32, 7_400, 1_015)
    monkeypatch.setattr(learnt_module, "BLOCK", 1_000_000)
    small = read_manifest(digits)
    classes = tuple(f"class {k}" for k in range(1_000))
    manifest = dataclasses.replace(small, classes=classes)
    vars(manifest)["keys"] = pa.array([f"picture {k}" for k in range(7_400)])  # as if they had been read
    layout = Layout("per_sample", tuple("abcdefg"), True, 1_000, 0.1)
    assert layout.width == 1_015
    ids = np.arange(7_400)
    split = Split(ids, ids[:0], ids[:0], np.zeros(7_400, np.int32))
    reader = RowReader(tmp_path / "checkpoints" / "step-00000003")
    source = Source(tmp_path, check_config({"data": {"root": str(digits)}}, "test"), manifest, split, layout, reader)
    schema = next(export.blocks(source)).schema
    resident = rows = 0
    with pa.parquet.ParquetWriter(tmp_path / "out", schema) as file:
        for count, block in enumerate(export.blocks(source), start=1):
            if count == 6:  # the allocators have what they keep
                Path("/proc/self/clear_refs").write_text("5")
                resident = kilobytes("VmRSS")
            file.write_table(block)
            rows += block.num_rows
    assert (rows, count) == (7_400, 31)
    assert (kilobytes("VmHWM") - resident) * 1024 < 20_000_000  # allocators keep some; the rest is 25 MB and its copies
    logits = pa.parquet.read_table(tmp_path / "out", columns=["soft_logit"]).column(0).combine_chunks().flatten()
    assert np.array_equal(logits.to_numpy(), reader.whole("hyper.rows.value")[:, 15:].numpy().reshape(-1))

"""Checkpoints: what a save keeps, what a load gives, and that a hostile one runs nothing and leads nowhere."""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ranks import RankPool
from test_crashes import model_and_table
from test_rows_command import kilobytes, save_table
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from typer.testing import CliRunner

from autodo_dist.cli import app
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, sha256, write_json
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.parallel.checkpoint_header import FORMAT, write_header
from autodo_dist.parallel.checkpoint_metadata import read_metadata
from autodo_dist.parallel.checkpoint_rows import RowReader
from autodo_dist.parallel.engine import DdpEngine

CPU = torch.device("cpu")
SHAPES = {
    "weight": torch.arange(60.0).reshape(5, 12),
    "number": torch.tensor(7),
    "empty": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
    "narrow": torch.linspace(-1, 1, 9).bfloat16(),
    "picture": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "view": torch.arange(100).reshape(10, 10)[2:5, 1:4],
}


def save(root: Path, state: dict[str, Any], step: int = 3, progress: dict[str, Any] | None = None) -> Path:
    with comm.process_group(comm.Place(), CPU) as ranks:
        checkpoint_save.save(root, step, state, {"step": step} | (progress or {}), ranks)
    return checkpoint.folder(root, step)


def alone(call: Callable[[comm.Ranks], Any]) -> Any:
    """What one rank gets; its process group is taken down after an error, too, as many tests go on then."""
    try:
        with comm.process_group(comm.Place(), CPU) as ranks:
            return call(ranks)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def restore(path: Path, state: dict[str, Any]) -> Any:
    return alone(lambda ranks: checkpoint.restore(path, state, ranks))


def newest(root: Path) -> Any:
    return alone(lambda ranks: checkpoint.newest(root, ranks))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "run" / "checkpoints"
    return save(root, {"model": SHAPES})


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own, in a run's folder."""
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(made.parent, root)
    return root / made.name


def blank() -> dict[str, Any]:
    return {"model": {name: torch.zeros_like(value) for name, value in SHAPES.items()}}


def test_what_was_saved_is_loaded(made: Path) -> None:
    """Contiguous or not, of any type; against the values themselves, which DCP's own reader finds as well."""
    state = blank()
    assert restore(made, state) == {"step": 3}
    reader = RowReader(made)
    plain = blank()
    dcp.load(plain, checkpoint_id=made)
    for name, value in SHAPES.items():
        assert torch.equal(state["model"][name], value), name
        assert torch.equal(plain["model"][name], value), name
        assert torch.equal(reader.whole(f"model.{name}"), value), name
    for name in ("weight", "picture"):
        assert torch.equal(reader.between(f"model.{name}", 1, 3), SHAPES[name][1:3])


def test_metadata_is_what_dcp_itself_reads(pool: RankPool, tmp_path: Path, made: Path) -> None:
    """One rank and four, of which one has no row."""
    pool.run(4, save_table, tmp_path / "run", torch.float32, 3, 2)
    for path in (made, tmp_path / "run" / "step-00000003"):
        expected = dcp.FileSystemReader(path).read_metadata()
        found = read_metadata(path, checkpoint.read_header(path).sizes)
        assert found.storage_data == expected.storage_data
        assert found.state_dict_metadata.keys() == expected.state_dict_metadata.keys()
        for name, stored in expected.state_dict_metadata.items():
            ours = found.state_dict_metadata[name]
            assert (ours.size, ours.chunks) == (stored.size, stored.chunks)
            assert ours.properties.dtype == stored.properties.dtype


def test_blocks_on_any_number_of_ranks(pool: RankPool, tmp_path: Path) -> None:
    pool.run(3, save_table, tmp_path / "run", torch.bfloat16, 41, 5)
    reader = RowReader(tmp_path / "run" / "step-00000003", contents_of=None)
    whole = reader.whole("hyper.rows.value")
    assert whole.shape == (41, 5)
    for block_bytes in (1, 70, 10_000):
        bounds = list(reader.blocks("hyper.rows.value", block_bytes))
        assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
        parts = [reader.between("hyper.rows.value", *each) for each in bounds]
        assert torch.equal(torch.cat(parts), whole)


def test_only_tensors_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"groups\.0\.lr is no tensor but float"):
        save(tmp_path, {"optimizer": {"weight": torch.zeros(2), "groups": [{"lr": 0.1}]}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_engines_state_is_tensors_and_its_numbers_are_the_settings(tmp_path: Path, momentum: float) -> None:
    def steps(engine: DdpEngine, count: int) -> None:
        for _ in range(count):
            engine.backward(engine.module(torch.ones(1, 3)).square().sum())
            engine.step(0.05)

    def made(ranks: comm.Ranks) -> DdpEngine:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        return DdpEngine(module, torch.optim.SGD(module.parameters(), 0.1, momentum, weight_decay=0.01), ranks)

    with comm.process_group(comm.Place(), CPU) as ranks:
        unbroken, broken, resumed = (made(ranks) for _ in range(3))
        steps(unbroken, 5)
        steps(broken, 3)
        checkpoint_save.save(tmp_path, 3, broken.state(), {}, ranks)
        state = resumed.state()
        checkpoint.restore(checkpoint.folder(tmp_path, 3), state, ranks)
        resumed.restore(state)
        assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.01
        steps(resumed, 2)
    assert torch.equal(resumed.module.weight, unbroken.module.weight)
    names = [name for name, _ in checkpoint.leaves(resumed.state())]
    assert ("optimizer.state.weight.momentum_buffer" in names) == (momentum > 0)


def test_a_checkpoint_of_format_1_is_loaded(tmp_path: Path) -> None:
    """It had the optimizer's settings as pickles: they are left where they are."""
    root = tmp_path / "run" / "checkpoints"
    path = checkpoint.folder(root, 3)
    root.mkdir(parents=True)
    dcp.save({"model": SHAPES, "optimizer": {"param_groups": [{"lr": 0.1}]}}, checkpoint_id=path)
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in path.iterdir()}
    write_json(path / "checkpoint.json", {"format": 1, "step": 3, "progress": {"step": 3}, "files": files})
    state = blank()
    restore(path, state)
    assert torch.equal(state["model"]["weight"], SHAPES["weight"])
    assert not any("param_groups" in name for name in RowReader(path).names)


def test_another_type_or_shape_or_name_does_not_fit(made: Path) -> None:
    wrong: dict[str, torch.Tensor]
    for wrong, words in (
        ({"weight": torch.zeros(5, 12).double()}, "model.weight is of torch.float32, not of torch.float64"),
        ({"weight": torch.zeros(5, 13)}, "Size mismatch"),
        ({"colour": torch.zeros(5)}, "model.colour"),
    ):
        with pytest.raises(AutodoError, match=f"does not fit this model .*{words}.*start another run.name") as caught:
            restore(made, {"model": wrong})
        assert "\n" not in str(caught.value)


# --- hostile ones: an attacker can write every file, so checksums are right


def reseal(path: Path, **header: Any) -> None:
    """Make checkpoint.json agree with the files as they are now."""
    names = read_json(path / "checkpoint.json")["files"]
    files = {name: {"size": (path / name).stat().st_size, "sha256": sha256(path / name)} for name in names}
    put_header(path, {"files": files} | header)


def put_header(path: Path, changes: dict[str, Any]) -> None:
    """Lay these fields over checkpoint.json, whose own checksum is right then."""
    header = read_json(path / "checkpoint.json") | changes
    header.pop("sha256", None)
    write_header(path, header)


def put_metadata(path: Path, raw: bytes) -> None:
    (path / ".metadata").write_bytes(raw)
    reseal(path)


def changed(path: Path, change: Callable[[Metadata], Any]) -> None:
    """DCP's own metadata, changed and written as DCP writes it."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    change(metadata)
    put_metadata(path, pickle.dumps(metadata))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path, function: str = "system") -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> tuple[Any, ...]:
        calls = {
            "system": (os.system, (f"touch {self.marker}",)),
            "eval": (builtins.eval, (f"open({str(self.marker)!r}, 'w').close()",)),
            "torch": (torch.save, (torch.zeros(1), str(self.marker))),
            "nested": (torch.Size, (Payload(self.marker),)),
        }
        return calls[self.function]


def assert_refused(path: Path, words: str, marker: Path | None = None) -> None:
    """By every reader and every command, in one line, and nothing ran."""
    run = path.parent.parent
    assert re.search(words, str(checkpoint.check(path))), checkpoint.check(path)
    for read in (lambda: restore(path, blank()), lambda: RowReader(path)):
        with pytest.raises(AutodoError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)
    for command in (["verify", run], ["diff", f"{run}@3", f"{run}@3"], ["export", run, run / "out.safetensors"]):
        result = CliRunner().invoke(app, ["checkpoint", *map(str, command)])
        assert isinstance(result.exception, AutodoError), (command, result.output)
        assert re.search(words, str(result.exception))
        assert "\n" not in str(result.exception)
    result = CliRunner().invoke(app, ["checkpoint", "list", str(run)])
    assert result.exit_code == 0
    assert re.search(f" 3 .*broken: .*{words}", result.output), result.output
    assert marker is None or not marker.exists()


@pytest.mark.parametrize("function", ["system", "eval", "torch", "nested"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
def test_a_hostile_pickle_in_metadata_runs_nothing(
    path: Path, tmp_path: Path, function: str, protocol: int, inside: bool
) -> None:
    marker = tmp_path / "ran"
    payload: Any = Payload(marker, function)
    if inside:  # in a place that nothing of ours looks at
        payload, content = dcp.FileSystemReader(path).read_metadata(), payload
        payload.planner_data = {"model.weight": ("model", content)}
    raw = pickle.dumps(payload, protocol)
    try:
        pickle.loads(raw)
    except TypeError:  # torch.Size of what the payload gave
        assert function == "nested"
    assert marker.exists()  # so the pickle is armed
    marker.unlink()
    put_metadata(path, raw)
    assert_refused(
        path, r"none of DCP's classes; nothing was run|has a pickle's \w+ at byte \d+; nothing was run", marker
    )


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


NAMED = short("torch.distributed.checkpoint.metadata") + short("Metadata") + b"\x93"
CLASS_STATE = b"N}" + short("injected") + b"Ks\x01".replace(b"Ks\x01", b"K\x01s") + b"\x86b"  # (None, {"injected": 1})


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "GLOBAL at byte 0"),
        (b"\x80\x04" + short("id") + b"Q.", "BINPERSID at byte"),
        (b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".", "LONG_BINPUT at byte"),  # 64 GB of memo
        (b"\x80\x04\x96" + struct.pack("<Q", 2**60) + b"x.", "BYTEARRAY8|no pickle"),
        (
            b"\x80\x04" + short("torch.serialization") + short("_get_layout.__globals__") + b"\x93.",
            "none of DCP's classes",
        ),
        (b"\x80\x04" + NAMED + CLASS_STATE + b".", "no pickle of DCP's"),
        (b"\x80\x04" + NAMED + b")\x81.", "no Metadata where one belongs"),
        (b"\x80\x04" + NAMED + b".", "no Metadata where one belongs"),
        (b"\x80\x04}.", "no Metadata where one belongs"),
        (b"\x80\x04" + b")\x81.", "no pickle of DCP's"),
        (b"\x80\x04", "no pickle of DCP's"),
        (b"", "no pickle of DCP's"),
        (b"\xff" * 99, "no pickle of DCP's"),
    ],
    ids=str,
)
def test_pickles_that_no_pickler_writes(path: Path, raw: bytes, words: str) -> None:
    put_metadata(path, raw)
    started, resident = time.perf_counter(), kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    assert re.search(words, str(checkpoint.check(path))), checkpoint.check(path)
    assert kilobytes("VmHWM") - resident < 50_000
    assert time.perf_counter() - started < 2
    assert not hasattr(Metadata, "injected")


def test_the_class_state_above_is_armed() -> None:
    try:
        pickle.loads(b"\x80\x04" + NAMED + CLASS_STATE + b".")
        assert Metadata.injected == 1  # type: ignore[attr-defined]
    finally:
        del Metadata.injected  # type: ignore[attr-defined]


def zip_of(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def put_zip(path: Path, raw: bytes, name: str = "model.weight") -> None:
    """Let a tensor's place be these bytes."""
    file = path / "__0_0.distcp"
    start = file.stat().st_size
    file.write_bytes(file.read_bytes() + raw)

    def move(metadata: Metadata) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == name)
        metadata.storage_data[index] = _StorageInfo(file.name, start, len(raw))

    changed(path, move)


def assert_tensor_refused(path: Path, words: str) -> None:
    state, run = blank(), path.parent.parent
    for read in (lambda: restore(path, state), lambda: RowReader(path).whole("model.weight")):
        with pytest.raises(AutodoError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    result = CliRunner().invoke(app, ["checkpoint", "diff", f"{run}@3", f"{run}@3"])
    assert isinstance(result.exception, AutodoError)
    assert re.search(words, str(result.exception))


def test_a_hostile_pickle_in_a_tensor_runs_nothing(path: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    values = zip_of(SHAPES["weight"])
    hostile = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(values)) as good, zipfile.ZipFile(hostile, "w") as bad:
        for record in good.infolist():
            armed = record.filename.endswith("data.pkl")
            bad.writestr(record.filename, pickle.dumps(Payload(marker), 2) if armed else good.read(record))
    torch.load(io.BytesIO(hostile.getvalue()), weights_only=False)
    assert marker.exists()  # so it is armed
    marker.unlink()
    put_zip(path, hostile.getvalue())
    assert_tensor_refused(path, "model.weight is not stored as expected.*nothing was run")
    assert not marker.exists()


def test_a_hostile_pickle_in_place_of_a_tensor_runs_nothing(path: Path, tmp_path: Path) -> None:
    """DCP loads what .metadata calls no tensor by torch.load without weights_only."""
    marker = tmp_path / "ran"
    put_zip(path, zip_of(Payload(marker)))
    changed(path, lambda metadata: metadata.state_dict_metadata.update({"model.weight": BytesStorageMetadata()}))
    index = next(it for it in dcp.FileSystemReader(path).read_metadata().storage_data if it.fqn == "model.weight")
    changed(
        path,
        lambda metadata: metadata.storage_data.update(
            {MetadataIndex("model.weight"): metadata.storage_data.pop(index)}
        ),
    )
    dcp.load(blank(), checkpoint_id=path)
    assert marker.exists()  # so it is armed
    marker.unlink()
    with pytest.raises(AutodoError, match=r"does not fit this model .*model\.weight"):
        restore(path, blank())
    with pytest.raises(AutodoError, match=r"holds no tensor model\.weight"):
        RowReader(path).whole("model.weight")
    assert not marker.exists()


def test_zips_that_lie(path: Path) -> None:
    """Compressed, of other values, with more records, or none at all."""
    good, packed = zip_of(SHAPES["weight"]), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for record in archive.infolist():
            bomb = record.filename.endswith("data.pkl")
            small.writestr(record.filename, archive.read(record) + (bytes(10_000_000) if bomb else b""))
    extra = io.BytesIO(good)
    with zipfile.ZipFile(extra, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    lies = {
        "compressed": packed.getvalue(),
        "constants.pkl": extra.getvalue(),
        "bytes of values": zip_of(torch.zeros(5, 13)),
        "not .5, 12. of torch.float32": zip_of(torch.zeros(60)),
        "dense": zip_of(torch.zeros(60).as_strided((5, 12), (1, 1))),
        "no zip": bytes(500),
    }
    for words, raw in lies.items():
        shutil.rmtree(copy := path.with_name("step-00000004"), ignore_errors=True)
        shutil.copytree(path, copy)
        reseal(copy, step=4)
        put_zip(copy, raw)
        with pytest.raises(AutodoError, match=words):
            RowReader(copy).whole("model.weight")
        with pytest.raises(AutodoError, match=f"model.weight is not stored as expected.*{words}"):
            restore(copy, blank())


# --- names and sizes


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "secret", "..", "a/__0_0.distcp", "__0_0.distcp\n"])
def test_names_that_leave_the_folder_are_refused(path: Path, tmp_path: Path, name: str) -> None:
    """In checkpoint.json and in .metadata; a file of that name is there to be opened, were it not for the refusal."""
    (tmp_path / "run" / "secret").write_bytes((path / "__0_0.distcp").read_bytes())
    header = read_json(path / "checkpoint.json")
    facts = header["files"]["__0_0.distcp"]
    put_header(path, {"files": header["files"] | {name: facts}})
    assert_refused(path, r"checkpoint.json names '.*', no file that a save writes")
    write_json(path / "checkpoint.json", header)
    changed(
        path,
        lambda metadata: [setattr(info, "relative_path", name) for info in metadata.storage_data.values()],
    )
    assert_refused(path, r"puts model\.\w+ in '.*', no file of checkpoint.json")


def test_links_out_of_the_run_are_refused(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(path, outside / path.name)
    for name in ("__0_0.distcp", ".metadata", "checkpoint.json"):
        kept = (path / name).read_bytes()
        (path / name).unlink()
        (path / name).symlink_to(outside / path.name / name)
        assert_refused(path, re.escape(f"{name} is a link out of the run's folder"))
        (path / name).unlink()
        (path / name).write_bytes(kept)
    assert checkpoint.check(path) is None
    shutil.rmtree(path)
    path.symlink_to(outside / path.name)
    assert_refused(path, "step-00000003 is a link out of the run's folder")
    path.unlink()
    path.symlink_to(path)
    assert "leads nowhere" in str(checkpoint.check(path)) or "unreadable" in str(checkpoint.check(path))


def test_a_folder_of_checkpoints_outside_of_the_run_is_refused_and_left_alone(path: Path, tmp_path: Path) -> None:
    """By a resume too, which would otherwise rename what it does not trust."""
    root = path.parent
    shutil.move(root, tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AutodoError, match="checkpoints is a link out of the run's folder"):
        newest(root)
    for command in (["list"], ["verify"], ["prune", "--keep", "1"]):
        result = CliRunner().invoke(app, ["checkpoint", command[0], str(root.parent), *command[1:]])
        assert "checkpoints is a link out of the run's folder" in str(result.exception)
    assert (tmp_path / "elsewhere" / path.name).is_dir()


def test_something_else_than_a_file_is_refused(path: Path) -> None:
    (path / "__0_0.distcp").unlink()
    os.mkfifo(path / "__0_0.distcp")  # to open it is to wait for ever
    assert_refused(path, "__0_0.distcp is neither a file nor a folder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: setattr(it, "size", torch.Size([2**40, 12])), "5 of 1099511627776 rows"),
        (lambda it: setattr(it.chunks[0], "sizes", torch.Size([2**40, 12])), r"1099511627776 of 5 rows"),
        (lambda it: setattr(it, "size", torch.Size([5, 2**60])), "not cut by rows alone"),
        (lambda it: setattr(it, "chunks", []), "with 0 of 5 rows"),
        (lambda it: it.chunks.append(it.chunks[0]), "rows missing or twice at row 5"),
        (lambda it: setattr(it.chunks[0], "offsets", torch.Size([0, 1])), "not cut by rows alone"),
        (lambda it: setattr(it.chunks[0], "offsets", torch.Size([0])), "chunks of other dimensions"),
        (lambda it: setattr(it, "size", (5, 12)), "no size where one belongs"),
        (lambda it: setattr(it, "chunks", None), "without a type or a place"),
    ],
)
def test_impossible_sizes_are_refused(path: Path, change: Callable[[Any], Any], words: str) -> None:
    changed(path, lambda metadata: change(metadata.state_dict_metadata["model.weight"]))
    assert_refused(path, words)


def test_a_size_that_agrees_with_itself_but_not_with_the_file(path: Path) -> None:
    """A tensor of 53 TB in a file of 10 KB: nothing is allocated."""

    def grow(metadata: Metadata) -> None:
        stored = metadata.state_dict_metadata["model.weight"]
        stored.size = stored.chunks[0].sizes = torch.Size([2**40, 12])

    changed(path, grow)
    resident = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    assert_refused(path, "model.weight with 52776558133248 bytes where 1769 were stored")
    assert kilobytes("VmHWM") - resident < 100_000


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((0, 10**9), "behind the end of __0_0.distcp"),
        ((10**15, 3000), "behind the end of __0_0.distcp"),
        ((-1, 3000), "no numbers for the place of model.weight"),
        ((0, "9"), "no numbers for the place of model.weight"),
        ((0, 100), "240 bytes where 100 were stored"),
    ],
)
def test_impossible_places_are_refused(path: Path, place: tuple[Any, Any], words: str) -> None:
    def move(metadata: Metadata) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == "model.weight")
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", *place)

    changed(path, move)
    assert_refused(path, words)


def save_where_one_rank_fails(root: Path, which: str) -> str:
    """A save in which only one rank's disk gives an error; what it says on this one."""
    with comm.process_group(comm.place(), torch.device("cpu"), timedelta(seconds=60)) as ranks:
        state = {"weight": torch.ones(3)}
        full = OSError(errno.EDQUOT, "Disk quota exceeded")
        failing = {
            "begin": patch.object(Path, "mkdir", side_effect=full if ranks.main else None),
            "facts": patch.object(checkpoint_save, "sha256", side_effect=full if not ranks.main else sha256),
            "finish": patch.object(checkpoint_save, "write_header", side_effect=full),
        }
        with failing[which], pytest.raises(AutodoError) as caught:
            checkpoint_save.save(root, 1, state, {}, ranks)
        assert checkpoint.complete(root) == []
        checkpoint_save.save(root, 2, state, {}, ranks)
        return str(caught.value)


@pytest.mark.parametrize("which", ["begin", "facts", "finish"])
def test_a_save_fails_on_every_rank_or_on_none(pool: RankPool, tmp_path: Path, which: str) -> None:
    """Where one rank alone meets the error, the others do not wait for it."""
    start = time.monotonic()
    said = pool.run(3, save_where_one_rank_fails, tmp_path / which, which)
    assert time.monotonic() - start < 50
    assert len(set(said)) == 1
    assert "step-00000001: cannot be written ([Errno 122] Disk quota exceeded); it takes 12 bytes, " in said[0]
    assert [path.name for path in checkpoint.complete(tmp_path / which)] == ["step-00000002"]


def test_a_name_that_would_write_to_the_terminal_is_refused(path: Path) -> None:
    def rename(metadata: Metadata) -> None:
        metadata.state_dict_metadata["\x1b[2Jmodel"] = metadata.state_dict_metadata.pop("model.weight")

    changed(path, rename)
    assert_refused(path, "name cannot be printed")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"format": FORMAT + 1}, f"format {FORMAT + 1} is newer than this program's {FORMAT}"),
        ({"format": "1"}, "no format, step, progress or files"),
        ({"step": 4}, "is that of step 4"),
        ({"progress": []}, "no format, step, progress or files"),
        ({"files": {}}, "does not list .metadata"),
        ({"files": {".metadata": {"size": -1, "sha256": ""}}}, "no size or SHA-256 of .metadata"),
        ({"files": {".metadata": {"size": 5}}}, "no size or SHA-256 of .metadata"),
    ],
)
def test_headers_that_lie_are_refused(path: Path, header: dict[str, Any], words: str) -> None:
    put_header(path, header)
    assert_refused(path, words)


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 1' + b"0" * 9_000 + b"}"])
def test_headers_that_cannot_be_read_are_refused(path: Path, raw: bytes) -> None:
    (path / "checkpoint.json").write_bytes(raw)
    assert_refused(path, "checkpoint.json is unreadable|no format, step, progress or files")


def test_files_of_absurd_length_are_not_read(path: Path) -> None:
    for name in (".metadata", "checkpoint.json"):
        with (path / name).open("r+b") as file:
            file.truncate(1 << 40)  # takes no room on the disk
        found = str(checkpoint.check(path))
        assert re.search(rf"{name} has 1099511627776 bytes", found), found


def test_a_resume_refuses_a_newer_format_and_leaves_it(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would otherwise go on from an older checkpoint. A hostile one is passed over, and so is a broken one."""
    root = path.parent
    older = path.with_name("step-00000002")
    shutil.copytree(path, older)
    reseal(older, step=2)
    put_header(path, {"format": 99})
    with pytest.raises(AutodoError, match=r"format 99 is newer.*update the program"):
        newest(root)
    assert path.is_dir()
    put_metadata(path, pickle.dumps(Payload(root / "ran")))
    reseal(path, format=FORMAT)
    shutil.copytree(path, path.with_suffix(".broken"))  # of an earlier start
    assert newest(root) == older
    assert "passed over and renamed to step-00000003.broken" in caplog.text
    assert not path.exists()
    assert not (root / "ran").exists()


def save_two(root: Path) -> None:
    """Checkpoints 3 and 4, whose values are 3 and 4."""
    with comm.process_group(comm.place(), CPU) as ranks:
        for step in (3, 4):
            progress = {"step": step, "seconds": {"task": 1.5}, "last": {"kind": "evaluation", "accuracy": 3e-7}}
            checkpoint_save.save(root, step, model_and_table(float(step), ranks), progress, ranks)


def taken_up(roots: list[Path]) -> list[set[float]]:
    """All values of the tensors, after a resume from each of these folders."""
    values = []
    with comm.process_group(comm.place(), CPU) as ranks:
        for root in roots:
            state = model_and_table(0.0, ranks)
            path = checkpoint.newest(root, ranks)
            assert path is not None
            checkpoint.restore(path, state, ranks)
            values.append(
                {*state["model"]["weight"].flatten().tolist(), *state["rows"]["value"].to_local().flatten().tolist()}
            )
    return values


def test_damage_of_any_file_of_the_newest_checkpoint_is_found(pool: RankPool, tmp_path: Path) -> None:
    """The file is named, and the checkpoint before is taken up."""
    whole = tmp_path / "whole" / "checkpoints"
    pool.run(2, save_two, whole)
    names = sorted(file.name for file in checkpoint.folder(whole, 4).iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json"]
    roots = [whole]
    for name in names:
        raw = (checkpoint.folder(whole, 4) / name).read_bytes()
        damaged: list[bytes | None] = [None, raw[:-1], raw[: len(raw) // 2], b"", raw + b"\0"]
        damaged += [flipped(raw, 8 * place + place % 8) for place in (0, len(raw) // 2, len(raw) - 1)]
        for number, data in enumerate(damaged):
            roots.append(Path(shutil.copytree(whole, tmp_path / f"{name}-{number}" / "checkpoints")))
            file = checkpoint.folder(roots[-1], 4) / name
            file.unlink() if data is None else file.write_bytes(data)
            assert str(checkpoint.check(file.parent)).startswith(f"{name} ")
    assert len(roots) == 1 + 4 * 8
    for mine in pool.run(2, taken_up, roots):
        assert mine == [{4.0}] + [{3.0}] * (len(roots) - 1)
    for root in roots[1:]:
        assert [path.name for path in sorted(root.iterdir())] == ["step-00000003", "step-00000004.broken"]


def flipped(raw: bytes, bit: int) -> bytes:
    return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


def test_any_flipped_bit_of_checkpoint_json_is_found(path: Path) -> None:
    """No other file holds its checksum. Among them are digits of the progress, and of the format."""
    file = path / "checkpoint.json"
    raw = file.read_bytes()
    for bit in range(8 * len(raw)):
        file.write_bytes(flipped(raw, bit))
        found = str(checkpoint.check(path))
        assert re.match(r"checkpoint.json is (not what was written \(checksum\)$|unreadable)", found), (bit, found)
    file.write_bytes(raw)
    assert checkpoint.check(path) is None


@given(data=st.data())
@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
def test_any_damage_is_a_refusal_or_nothing(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of .metadata or of the tensors' file, changed anywhere, with checksums that agree: no other exception."""
    path = tmp_path / "run" / "checkpoints" / made.name
    if not path.exists():
        shutil.copytree(made, path)
    name = data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
    raw = bytearray((made / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for each in (".metadata", "__0_0.distcp"):
        (path / each).write_bytes(raw if each == name else (made / each).read_bytes())
    reseal(path)
    assert hashlib.sha256(raw).hexdigest() == read_json(path / "checkpoint.json")["files"][name]["sha256"]
    with contextlib.suppress(AutodoError):
        reader = RowReader(path)
        for tensor in reader.names:
            reader.whole(tensor)

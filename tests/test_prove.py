"""`autodo prove-resume`: real kills that change nothing, a resume that was tampered with, and what it refuses.

Ranks are forked from a process that has imported everything (benchmarks/warm.py), which saves ten seconds a start; the
user's own command is started, killed and refused by two tests of its own.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from typer.testing import CliRunner

from autodo_dist import metrics
from autodo_dist.cli import app
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json
from autodo_dist.load_config import check_config
from autodo_dist.parallel import checkpoint, comm
from autodo_dist.parallel.checkpoint_diff import digest
from autodo_dist.parallel.checkpoint_header import read_header, write_header
from autodo_dist.parallel.checkpoint_save import save
from autodo_dist.proof import kill, prove
from autodo_dist.proof.compare import Compared, Losses, compare, last_checkpoint, losses
from autodo_dist.proof.kill import Hit, Watch, last_error, parted, partials, shown, strike
from autodo_dist.proof.plan import Aim, Place, draw, named, places, shorten, spread
from autodo_dist.proof.prove import Broken, Elastic, Fallen, Proof, break_run, depends_on_ranks, one
from autodo_dist.train import train
from benchmarks import warm

PHASES = {"start", "task", "hyper", "evaluation", "save"}


def settings(digits: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """The user's: 30 epochs, AutoDO from the tenth on, two ranks; `section__key` changes one."""
    tree: dict[str, Any] = {
        "run": {"root": str(root), "name": "mine"},
        "data": {"root": str(digits), "image_size": 16, "crop": "padded", "crop_padding": 1, "flip": False},
        "model": {"name": "convnet"},
        "optim": {"lr": 0.05},
        "train": {"epochs": 30, "batch_size": 32},
        "learn": {"augment": "per_sample", "weight": True, "soft_label": True},
        "hyper": {"start_epoch": 10, "way": "separate", "validation_every": 2},
        "launch": {"ranks_per_node": 2, "executor": "slurm", "nodes": 2},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return tree


def config(digits: Path, root: Path, **changes: Any) -> Config:
    return check_config(settings(digits, root, **changes), "of the test")


@pytest.fixture
def file(digits: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings(digits, tmp_path / "runs")))
    return path


@pytest.fixture
def warmly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill, "submit", warm.start)


def invoke(file: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["prove-resume", str(file), *words])


# Real runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("warmly")
def test_five_kills_in_five_phases_change_no_bit(file: Path, tmp_path: Path) -> None:
    """Nor do other numbers of ranks, but for rounding; and nothing is left behind."""
    out = tmp_path / "verdict.json"
    result = invoke(file, "--steps", "30", "--kills", "5", "--elastic", "1,3", "--seed", "11", "--out", str(out))
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["verdict"] == "bit-exact"
    kills = found["broken"]["kills"]
    assert {each["aim"]["place"]["phase"] for each in kills} == PHASES
    assert all(each["hit"] is not None for each in kills)
    assert len(set(found["compared"]["digests"])) == 1
    assert found["compared"]["step"] == found["steps"] == 30
    assert found["compared"]["files"] == ["labels.csv", "history.jsonl", "summary.json"]
    assert [each["ranks"] for each in found["elastic"]["broken"]["kills"]] == [2, 1]
    assert found["elastic"]["depends"] == ""
    assert 0 <= found["elastic"]["losses"]["largest"] <= 1e-5
    text = result.output.splitlines()
    assert "verdict   bit-exact" in text
    assert f"SHA-256   {found['compared']['digests'][1]} broken" in text
    assert sum("kill -9 rank" in line for line in text) == 7
    (changed,) = (line for line in text if line.startswith("changed "))
    for what in ("train.epochs: 30 -> 2", "hyper.start_epoch: 10 -> 1", "launch.executor: slurm -> local"):
        assert what in changed
    assert list((tmp_path / "runs").iterdir()) == []


def momentum_lost(root: Path) -> None:
    """Zero the optimizer's state in the newest checkpoint, and save it anew: all its checksums are right."""
    path = checkpoint.complete(root)[-1]
    state: dict[str, Any] = _load_state_dict_from_keys(checkpoint_id=path)
    lost = 0.0

    def walk(value: Any) -> None:
        nonlocal lost
        if isinstance(value, dict):
            list(map(walk, value.values()))
        elif isinstance(value, torch.Tensor):
            lost += float(value.abs().sum())
            value.zero_()

    walk(state["optimizer"])
    assert lost > 0
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        save(root, checkpoint.step_of(path), state, read_header(path).progress, ranks)
    assert checkpoint.check(path) is None


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Momentum is lost between the first kill after a save and the next start."""
    done: list[Path] = []

    def start(file: Path, log: Path) -> kill.Launcher:
        root = file.parent / "broken/checkpoints"
        if file.name.startswith("broken") and checkpoint.complete(root) and not done:
            momentum_lost(root)
            done.append(root)
        return warm.start(file, log)

    monkeypatch.setattr(kill, "submit", start)
    return done


def test_a_resume_without_momentum_is_found(file: Path, tampered: list[Path], tmp_path: Path) -> None:
    """The negative control: exit status 1, the first difference named, the runs kept."""
    result = invoke(file, "--steps", "16", "--kills", "2", "--elastic", "none", "--seed", "1")
    assert len(tampered) == 1
    assert result.exit_code == 1
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(r"verdict   not equal: metrics\.jsonl, line \d+, step \d+: \w+ \S+ against .* more\)", last)
    digests = re.findall(r"SHA-256   (\w{64})", result.output)
    assert digests[0] != digests[1]
    (kept,) = (tmp_path / "runs").iterdir()
    assert compare(kept / "unbroken", kept / "broken").differences
    assert losses(kept / "unbroken", kept / "broken").largest > 1e-5


# The user's own command -----------------------------------------------------------------------------------------------


def test_a_rank_of_the_users_command_is_killed_while_it_starts(digits: Path, tmp_path: Path) -> None:
    short = named(shorten(config(digits, tmp_path), 40, 9, tmp_path), "", 2)
    ended = one(kill.submit, short, "cold", 2, Aim(1, Place("start", 0), 0.5), {"start": 1.0}, limit=60)
    assert ended.hit == Hit("start", saving=False)
    assert ended.saves == ()
    assert "rank 1 was killed by signal 9 (SIGKILL)" in (tmp_path / "cold.log").read_text()
    assert not (tmp_path / "cold/checkpoints").exists()


def test_a_run_that_fails_by_itself_is_one_clear_line(digits: Path, tmp_path: Path) -> None:
    short = named(shorten(config(digits, tmp_path), 40, 9, tmp_path), "", 2)
    few = short.model_copy(update={"train": short.train.model_copy(update={"batch_size": 1})})
    with pytest.raises(
        AutodoError, match=r"failed \(error: train\.batch_size = 1: smaller than .*\); see .*/cold\.log"
    ):
        one(kill.submit, few, "cold", 2, Aim(1, Place("task", 3), 0.0))


# Kills that do not fall as planned ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that learns nothing, on one rank; its aims are past its end, so that none falls."""
    short = shorten(
        config(digits, Path(), learn__augment="none", learn__weight=False, learn__soft_label=False), 8, 4, Path()
    )
    root = tmp_path_factory.mktemp("plain")
    return named(short.model_copy(update={"run": short.run.model_copy(update={"root": root})}), "", 1)


@pytest.fixture(scope="module")
def missed(plain: Config) -> Broken:
    late = [Aim(0, Place("task", 999), 0.0)] * 2
    return break_run(warm.start, plain, "unbroken", [1, 1, 1], late, {}, 120, lambda _: None)


def test_a_run_that_ends_before_its_kill_is_no_proof(plain: Config, missed: Broken) -> None:
    assert [fallen.hit for fallen in missed.kills] == [None, None]
    folder = plain.run.root / "unbroken"
    found = compare(folder, folder)
    assert (found.differences, found.step, found.files) == ((), 8, ("summary.json",))
    proof = Proof(plain, 0, 1, 8, 1.0, 0.5, missed, found, None)
    assert (proof.verdict, proof.missed, proof.fault) == ("incomplete", 2, "")


def test_a_finished_run_cannot_be_killed(plain: Config, missed: Broken) -> None:
    assert one(warm.start, plain, "unbroken", 1, Aim(0, Place("task", 0), 0.0)).hit is None


def test_a_run_that_fails_while_a_kill_is_due_is_not_taken_for_killed(plain: Config, tmp_path: Path) -> None:
    """Its rank is killed, and the launcher says that something else was the cause."""

    def fail(file: Path, log: Path) -> kill.Launcher:
        script = (
            "import subprocess, sys; subprocess.call([sys.executable, '-c', 'import time; time.sleep(9)']);"
            "sys.exit('error: rank 0 failed: its own fault')"
        )
        with log.open("wb") as out:
            return subprocess.Popen([sys.executable, "-c", script], stderr=out)

    with pytest.raises(AutodoError, match=r"failed \(error: rank 0 failed: its own fault\)"):
        one(fail, plain, "failing", 1, Aim(0, Place("start", 0), 0.0))


def test_a_run_that_hangs_is_ended(plain: Config, tmp_path: Path) -> None:
    def hang(file: Path, log: Path) -> kill.Launcher:
        with log.open("wb") as out:
            return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], stdout=out)

    with pytest.raises(AutodoError, match=r"has not ended after 1 s; see .*/logs"):
        one(hang, plain, "hanging", 1, limit=1)


def test_a_rank_that_has_ended_is_not_struck() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    found = psutil.Process(process.pid)
    while found.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert strike(found) is None
    assert process.wait() == 0
    assert strike(found) is None
    assert shown(process.pid) == ""


def test_what_a_broken_off_save_leaves_is_not_taken_for_one_that_goes_on(tmp_path: Path) -> None:
    assert partials(tmp_path) == {}
    (tmp_path / "checkpoints/step-00000003.partial").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000002").mkdir()
    (tmp_path / "checkpoints/step-00000001.partial").mkdir()  # is being deleted
    left = partials(tmp_path)
    assert list(left) == ["step-00000003.partial"]
    other = 2**22 + 1  # no process: this one's own name may be what an earlier test left
    watch = Watch(None, tmp_path, left, None)  # type: ignore[arg-type]
    aim = Aim(0, Place("save", 3), 0.0)
    assert not watch._reached(aim, other)
    time.sleep(0.01)
    (tmp_path / "checkpoints/step-00000003.partial/__0_0.distcp").touch()
    assert watch._reached(aim, other)


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("start", []),
        ("data:3", []),
        ("task:3", ["task:3"]),
        ("evaluation:4", ["task:3", "evaluation:4"]),
        ("save:4", ["task:3", "evaluation:4"]),
        ("hyper:4", ["task:3", "evaluation:4", "hyper:4"]),
        ("data:5", ["task:3", "evaluation:4", "save:4", "hyper:4"]),
        ("evaluation", []),  # of so many steps that they do not fit
    ],
)
def test_a_rank_past_its_aim_is_struck_too(
    text: str, reached: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save begins a little after the rank has gone on to the next step; then its folder tells, tested above."""
    monkeypatch.setattr(kill, "shown", lambda _: text)
    watch = Watch(None, tmp_path, {}, None)  # type: ignore[arg-type]
    aims = ["task:3", "evaluation:4", "save:4", "hyper:4"]
    found = [aim for aim in aims if watch._reached(Aim(0, Place(*parted(aim)), 0.0), 1)]  # type: ignore[arg-type]
    assert found == reached


# The plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["separate", "shared"])
def test_places_are_those_that_a_run_passes(
    digits: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a real run shows, but for its start and waits for data."""
    short = named(shorten(config(digits, tmp_path, hyper__way=way), 12, 9, tmp_path), "run", 1)
    seen: list[tuple[str, int | None]] = []
    monkeypatch.setattr(metrics, "show", lambda phase, steps: seen.append((phase, steps)))
    train(short)
    seen = [each for each, _ in itertools.groupby(seen) if each[0] != "data"]  # the last save is waited for
    *passed, labels = seen
    assert passed == [(place.phase, place.steps) for place in places(short)]
    assert labels == ("evaluation", passed[-1][1])


@pytest.mark.parametrize(
    ("way", "start", "steps", "most", "expected"),
    [
        ("separate", 10, 40, 99, (2, 13, 1, 39)),
        ("separate", 0, 40, 99, (2, 10, 0, 40)),
        ("separate", 10, 40, 9, (3, 9, 1, 45)),
        ("shared", 10, 40, 99, (2, 20, 1, 40)),
        ("shared", 10, 40, 3, (13, 3, 1, 39)),
        ("shared", 10, 5, 99, (2, 2, 1, 4)),
    ],
)
def test_a_short_run(way: str, start: int, steps: int, most: int, expected: tuple[int, ...]) -> None:
    """Epochs, steps of a pass, first epoch that learns, steps in all."""
    user = config(Path("data"), Path(), hyper__way=way, hyper__start_epoch=start)
    short = shorten(user, steps, most, Path("scratch"))
    assert expected == (
        short.train.epochs,
        short.train.steps_per_pass,
        short.hyper.start_epoch,
        places(short)[-1].steps,
    )
    assert short.optim.warmup_epochs <= short.train.epochs / 2
    assert short.checkpoint.every_steps is not None
    assert short.checkpoint.every_steps % short.train.log_every
    assert short.run.root == Path("scratch")
    kept = {"data", "model", "learn", "compat"}
    assert short.model_dump(include=kept) == user.model_dump(include=kept)


def test_what_is_not_learnt_is_not_set() -> None:
    user = config(Path("data"), Path(), learn__augment="none", learn__weight=False, learn__soft_label=False)
    short = shorten(user, 8, 99, Path())
    assert (short.hyper.start_epoch, short.train.steps_per_pass) == (10, 4)
    assert {place.phase for place in places(short)} == PHASES - {"start", "hyper"}


@given(st.integers(0, 2**32), st.lists(st.integers(1, 8), min_size=1, max_size=10))
def test_kills_are_drawn_in_turn_and_fall_in_order(seed: int, ranks: list[int]) -> None:
    found = places(shorten(config(Path("data"), Path()), 40, 99, Path()))
    aims = draw(found, ranks, np.random.default_rng(seed))
    assert aims == draw(found, ranks, np.random.default_rng(seed))
    assert all(0 <= aim.rank < number and 0 <= aim.late < 1 for aim, number in zip(aims, ranks, strict=True))
    counts = collections.Counter(aim.place.phase for aim in aims)
    assert set(counts) <= PHASES
    assert max(counts.values()) - min(counts[phase] for phase in PHASES) <= 1
    at = [found.index(aim.place) for aim in aims if aim.place.phase != "start"]
    assert at == sorted(at)
    assert len(set(at)) == len(at)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 8), min_size=1, max_size=20))
def test_every_number_of_ranks_has_its_share(seed: int, ranks: list[int]) -> None:
    found = places(shorten(config(Path("data"), Path()), 40, 99, Path()))
    aims = spread(found, ranks, np.random.default_rng(seed))
    share = len(found) / (len(ranks) + 2)
    at = [found.index(aim.place) for aim in aims]
    for number, (index, aim) in enumerate(zip(at, aims, strict=True), start=1):
        assert number * share - 1 < index < (number + 1) * share
        assert 0 <= aim.rank < ranks[number - 1]


def test_without_other_ranks_no_kill_is_spread() -> None:
    found = places(shorten(config(Path("data"), Path()), 40, 99, Path()))
    assert spread(found, [], np.random.default_rng(0)) == []


# The comparison -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(plain: Config, missed: Broken, tmp_path: Path) -> tuple[Path, Path]:
    """A finished run, and a copy of it that a test may change."""
    return plain.run.root / "unbroken", Path(shutil.copytree(plain.run.root / "unbroken", tmp_path / "other"))


def changed_line(folder: Path, number: int, **values: Any) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_times_are_no_difference(pair: tuple[Path, Path]) -> None:
    changed_line(pair[1], 0, seconds=99.0, images_per_second=1, data_wait_share=0, peak_memory_bytes=1)
    assert compare(*pair).differences == ()


def test_each_difference_is_named_the_earliest_first(pair: tuple[Path, Path]) -> None:
    changed_line(pair[1], 1, loss=0.25)
    summary = json.loads((pair[1] / "summary.json").read_text())
    (pair[1] / "summary.json").write_text(json.dumps(summary | {"steps": 9}))
    (pair[1] / "labels.csv").write_text("id\n")
    first, *others = compare(*pair).differences
    assert re.fullmatch(r"metrics\.jsonl, line 2, step 4: loss \S+ against 0\.25", first)
    assert others == ["labels.csv: other contents", "summary.json: steps 8 against 9"]


def test_a_line_too_few_and_another_progress(pair: tuple[Path, Path]) -> None:
    text = (pair[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (pair[1] / "metrics.jsonl").write_text("".join(text[:-1]))
    path = checkpoint.complete(pair[1] / "checkpoints")[-1]
    header = read_json(path / "checkpoint.json")
    del header["sha256"]
    write_header(path, header | {"progress": header["progress"] | {"epoch": 7}})
    assert compare(*pair).differences == (
        f"metrics.jsonl: line {len(text)} is missing in {pair[1]}",
        "progress epoch: 2 against 7",
    )
    assert losses(*pair).other is not None


def test_the_largest_difference_of_losses(pair: tuple[Path, Path]) -> None:
    row = json.loads((pair[0] / "metrics.jsonl").read_text().splitlines()[1])
    changed_line(pair[1], 1, loss=row["loss"] + 0.5)
    found = losses(*pair)
    assert (found.largest, found.step, found.other) == (pytest.approx(0.5), 4, None)
    changed_line(pair[1], 1, step=5)
    assert losses(*pair).other == "metrics.jsonl, line 2: step 4 against 5"


def test_the_digest_is_that_of_the_tensors_whatever_the_ranks(plain: Config, missed: Broken) -> None:
    """Against a digest of the tensors as DCP alone reads them; of 2 and 3 ranks: the test of chaos and of a proof."""
    reader = last_checkpoint(plain.run.root / "unbroken")
    expected = hashlib.sha256()
    for name in sorted(reader.names):
        value = reader.whole(name)
        expected.update(f"{name} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}\n".encode())
        expected.update(value.numpy().tobytes())
    assert digest(reader) == expected.hexdigest()


def proof_of(plain: Config, differences: tuple[str, ...], largest: float, other: str | None, depends: str) -> Proof:
    fell = Fallen(1, Aim(0, Place("task", 1), 0.5), Hit("task:1", saving=False))
    broken = Broken((fell,), 1.0)
    elastic = Elastic((1, 2), broken, Losses(largest, 5, 9, other), depends)
    return Proof(plain, 0, 1, 8, 1.0, 0.5, broken, Compared(("a", "b"), differences, 8, 1, 9, ()), elastic)


@pytest.mark.parametrize(
    ("found", "verdict", "fault"),
    [
        (((), 1e-7, None, ""), "bit-exact", ""),
        ((("first", "second"), 1e-7, None, ""), "not equal", "first"),
        (((), 1e-4, None, ""), "not equal", "other numbers of ranks: a loss at step 5 differs by 0.0001 > 1e-05"),
        (((), 1e-4, None, "BatchNorm"), "bit-exact", ""),
        (((), 1e-7, "line 2: step", "BatchNorm"), "not equal", "other numbers of ranks: line 2: step"),
    ],
)
def test_the_verdict(plain: Config, found: Any, verdict: str, fault: str) -> None:
    proof = proof_of(plain, *found)
    assert (proof.verdict, proof.fault) == (verdict, fault)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model__name": "convnet"}, ""),
        ({"model__name": "convnet", "hyper__curvature": "per_rank"}, "hyper.curvature = per_rank"),
        ({"model__name": "convnet", "train__precision": "bf16"}, "the rounding of bf16"),
        ({"model__name": "resnet18"}, "BatchNorm"),
        ({"model__name": "vgg11"}, "dropout"),
        ({"model__name": "convnext_tiny"}, "dropout"),
    ],
)
def test_what_depends_on_the_ranks(changes: dict[str, Any], why: str) -> None:
    user = config(Path("data"), Path(), **changes)
    found = depends_on_ranks(user, 10)
    assert why in found
    assert bool(why) == bool(found)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.root=/nowhere"], "data /nowhere: no such folder"),
        (["train.batch_size=2"], "train.batch_size = 2: less than one picture for each of 3 ranks"),
        (["--ranks", "40"], "train.batch_size = 32: less than one picture for each of 40 ranks"),
        (["train.batch_size=5000"], "more than the 1151 train pictures"),
        (["--steps", "5"], "--steps 5: too few for 3 passes; give at least 6"),
        (["--steps", "8", "--kills", "9"], "--steps 8: fewer than 9 kills"),
        (["--elastic", "1;3"], "--elastic 1;3: no numbers of ranks; give such as 1,3, or none"),
        (["--elastic", "0"], "--elastic 0: no numbers of ranks"),
        (["--out", "/nowhere/a.json"], "--out /nowhere/a.json: there is no folder /nowhere; make it"),
        (["run.root=/proc/runs"], "run folder /proc/runs: cannot be written to"),
        (["train.epoch=3"], "unknown key train.epoch"),
        (["model.name=resnet7"], "model.name = 'resnet7' is unknown"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    file: Path, tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill, "run", None)  # nothing is started
    monkeypatch.setattr(prove, "run", None)
    result = invoke(file, *words)
    assert isinstance(result.exception, AutodoError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.glob("runs/*"))


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    result = invoke(tmp_path / "none.yaml")
    assert isinstance(result.exception, AutodoError)
    assert "no such file" in str(result.exception)


def test_the_last_error_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("")
    assert last_error(log, 0) == "no output"
    log.write_text("one\nerror: rank 1 failed: why\nafter\n\n")
    assert last_error(log, 0) == "error: rank 1 failed: why"
    assert last_error(log, len("one\nerror: rank 1 failed: why\n")) == "after"

"""One run at a time in a run folder, whoever dies and wherever."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import RankError, RankPool
from test_train import run_train, settings

from autodo_dist import run_lock
from autodo_dist.commands.evaluate import evaluate_checkpoint
from autodo_dist.errors import AutodoError
from autodo_dist.parallel import checkpoint, checkpoint_save, comm
from autodo_dist.run_lock import Holder, Lock, file, held, myself, numbers, read, refuse_if_held, take

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from autodo_dist.run_lock import myself, take
take(Path(sys.argv[1]), myself(slurm=False))
print("held", flush=True)
time.sleep(600)
"""
Start = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that holds the lock of a folder."""
    started: list[subprocess.Popen[str]] = []

    def hold(folder: Path) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        words = [sys.executable, "-c", HOLD, str(folder)]
        started.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Holder:
    """A holder on another machine; it is looked at for a short time only."""
    monkeypatch.setattr(run_lock, "PATIENCE", 0.4)
    return replace(myself(slurm=False), host="node17", pid=4711, since="2026-01-02 03:04:05+0000", machine="other boot")


def write(folder: Path, number: int, text: str, age: float = 0.0) -> None:
    """A lock file whose last sign of life is so many seconds old."""
    path = file(folder, number)
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)


def words(holder: Holder) -> str:
    return json.dumps(asdict(holder))


def test_a_living_process_is_named_and_a_dead_one_taken_over(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(tmp_path)
    holder = read(file(tmp_path, 1))
    assert holder is not None
    assert (holder.host, holder.pid) == (os.uname().nodename, process.pid)
    for refused in (lambda: take(tmp_path, myself(slurm=False)), lambda: refuse_if_held(tmp_path)):
        with pytest.raises(AutodoError) as caught:
            refused()
        assert str(caught.value) == (
            f"run {tmp_path}: in use by process {process.pid} on {holder.host}, since {holder.since}; wait for its end "
            "or end it, or choose another run.name"
        )
    process.kill()
    while run_lock.lives(holder):  # it is a zombie until it is waited for
        time.sleep(0.01)
    assert process.returncode is None
    refuse_if_held(tmp_path)
    assert take(tmp_path, myself(slurm=False))[0] == file(tmp_path, 2)
    assert numbers(tmp_path) == [2]
    assert f"lock of process {process.pid} on {holder.host}, since {holder.since} taken over" in caplog.text
    assert "that process has ended" in caplog.text


def test_another_process_with_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    me = myself(slurm=False)
    write(tmp_path, 3, words(replace(me, started=me.started - 1)))
    assert take(tmp_path, me)[0] == file(tmp_path, 4)
    with pytest.raises(AutodoError, match=f"in use by process {os.getpid()} "):
        take(tmp_path, me)


def test_a_holder_elsewhere_lives_as_long_as_it_gives_signs(
    tmp_path: Path, elsewhere: Holder, caplog: pytest.LogCaptureFixture
) -> None:
    me, path = myself(slurm=False), file(tmp_path, 1)
    write(tmp_path, 1, words(elsewhere), age=50)
    with pytest.raises(AutodoError, match=r"in use by process 4711 on node17, since 2026-01-02 03:04:05\+0000"):
        take(tmp_path, me)
    write(tmp_path, 1, words(elsewhere), age=100)
    with ThreadPoolExecutor(1) as pool:  # its file system was away, and is back
        late = pool.submit(lambda: (time.sleep(0.2), os.utime(path)))
        with pytest.raises(AutodoError, match="in use by"):
            take(tmp_path, me)
        late.result()
    write(tmp_path, 1, words(elsewhere), age=100)
    assert take(tmp_path, me)[0] == file(tmp_path, 2)
    assert "as it has given no sign of life for 100 s" in caplog.text


def test_age_is_told_by_the_file_systems_clock(
    tmp_path: Path, elsewhere: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock may be hours off."""
    write(tmp_path, 1, words(elsewhere))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(AutodoError, match="in use by"):
        take(tmp_path, myself(slurm=False))


def test_a_requeued_job_takes_over_at_once_and_no_other(tmp_path: Path, elsewhere: Holder) -> None:
    environment = {"SLURM_JOB_ID": "88", "SLURM_CLUSTER_NAME": "blue"}
    first = replace(elsewhere, job=myself(True, environment).job, restarts=0)
    assert first.job == "blue/88"
    again = environment | {"SLURM_RESTART_COUNT": "1"}
    for other in (again | {"SLURM_JOB_ID": "89"}, again | {"SLURM_CLUSTER_NAME": "red"}, environment):
        write(tmp_path, 1, words(first))
        with pytest.raises(AutodoError, match="in use by"):  # the same job, not requeued: a second srun in it
            take(tmp_path, myself(True, other))
    with pytest.raises(AutodoError, match="in use by"):  # the local launcher's SLURM_JOB_ID is a process
        take(tmp_path, myself(False, again))
    take(tmp_path, myself(True, again))
    assert numbers(tmp_path) == [2]
    assert myself(True, {}).job is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "x"}'])
def test_a_lock_that_says_nothing_counts_by_its_age(tmp_path: Path, elsewhere: Holder, text: str) -> None:
    write(tmp_path, 1, text)
    with pytest.raises(AutodoError, match="in use by a process unknown"):
        take(tmp_path, myself(slurm=False))
    write(tmp_path, 1, text, age=100)
    take(tmp_path, myself(slurm=False))


@pytest.mark.parametrize("dead", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path: Path, dead: bool) -> None:
    me = myself(slurm=False)
    with ThreadPoolExecutor(8) as pool:
        for turn in range(25):
            folder = tmp_path / str(turn)
            folder.mkdir()
            if dead:
                write(folder, 7, words(replace(me, started=1)))
            tries = [pool.submit(take, folder, replace(me, host=f"thread-{thread}")) for thread in range(8)]
            won = [each.result() for each in tries if each.exception() is None]
            assert all(isinstance(each.exception(), AutodoError | None) for each in tries)
            ((path, winner),) = won
            assert read(path) == winner
            assert numbers(folder) == [8 if dead else 1]


def test_a_full_disk_is_one_line_and_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    me = myself(slurm=False)
    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(AutodoError, match=r"cannot be locked \(No space left on device\)"):
        take(tmp_path, me)
    assert numbers(tmp_path) == []


@pytest.fixture
def alone() -> Iterator[comm.Ranks]:
    with comm.process_group(comm.Place(), torch.device("cpu")) as ranks:
        yield ranks


def test_a_lock_gives_signs_of_life_until_it_is_released(
    tmp_path: Path, alone: comm.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    with held(tmp_path, False, alone) as lock:
        os.utime(file(tmp_path, 1), (0, 0))
        deadline = time.monotonic() + 5
        while run_lock.stamp(file(tmp_path, 1)) == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert abs(run_lock.stamp(file(tmp_path, 1)) - time.time()) < 5
        lock.check()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), held(tmp_path, False, alone):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_a_holder_that_was_thought_dead_finds_out(tmp_path: Path, alone: comm.Ranks, elsewhere: Holder) -> None:
    me = myself(slurm=False)
    lock = Lock(take(tmp_path, me), alone)
    write(tmp_path, 2, words(elsewhere))
    with pytest.raises(AutodoError, match=r"taken over by process 4711 on node17, .*; this run stops and leaves"):
        lock.check()
    file(tmp_path, 1).unlink()
    with pytest.raises(AutodoError, match="taken over by process 4711"):
        lock.check()
    file(tmp_path, 2).unlink()
    with pytest.raises(AutodoError, match=r"its lock lock\.1\.json was removed"):
        lock.check()
    write(tmp_path, 1, words(elsewhere))  # by hand, and another run took its number
    lock.release()
    assert read(file(tmp_path, 1)) == elsewhere


def test_a_second_run_is_refused_on_every_rank(pool: RankPool, start: Start, digits: Path, tmp_path: Path) -> None:
    """And leaves all but logs alone; evaluation is not hindered; after a kill the next run says what it took over."""
    tree = settings(digits, tmp_path, train__epochs=1, optim__warmup_epochs=0)
    folder = pool.run(3, run_train, tree)[0]
    assert numbers(folder) == []
    (folder / "summary.json").unlink()
    process = start(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}
    with pytest.raises(RankError, match=f"AutodoError: run {folder}: in use by process {process.pid} on "):
        pool.run(3, run_train, tree)
    assert before == {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"
    }
    assert evaluate_checkpoint(folder, None, None)["step"] == 6
    process.kill()
    process.wait()
    pool.run(3, run_train, tree)
    log = (folder / "logs" / "rank-00000.log").read_text()
    assert f"WARNING run {folder}: lock of process {process.pid} on " in log
    assert (folder / "summary.json").is_file()
    assert numbers(folder) == []


def test_a_run_whose_folder_was_taken_over_saves_no_more(
    digits: Path, tmp_path: Path, elsewhere: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint_save.save

    def taken_over_then(root: Path, step: int, *rest: Any) -> None:
        save(root, step, *rest)
        write(root.parent, 2, words(elsewhere))

    monkeypatch.setattr(checkpoint_save, "save", taken_over_then)
    with pytest.raises(AutodoError, match="taken over by process 4711 on node17"):
        run_train(settings(digits, tmp_path))
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path / "run" / "checkpoints")] == [5]
    assert numbers(tmp_path / "run") == [2]


def test_the_launcher_refuses_before_it_starts_a_rank(start: Start, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(digits, tmp_path)))
    process = start(tmp_path / "run")
    launch = [sys.executable, str(ROOT / "launcher/submit.py"), "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: run {tmp_path / 'run'}: in use by process {process.pid} on ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock.1.json"]

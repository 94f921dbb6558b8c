"""`autodo watch`: frames of run folders in every state, time left against a simulated run, and a real run."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from test_train import settings
from test_warden import RANK
from typer.testing import CliRunner

from autodo_dist import ledger, standing
from autodo_dist.cli import app
from autodo_dist.commands.watch import frame, ranks, seldom, span, sparkline
from autodo_dist.config import Config
from autodo_dist.heartbeat import Heart
from autodo_dist.load_config import check_config
from autodo_dist.progress import Progress
from autodo_dist.standing import Lines, Looker, Rank, Saved, Standing, time_left
from autodo_dist.train import total_steps
from launcher.warden import Warden

ROOT = Path(__file__).parent.parent
ATTEMPT = "77/0"
PASS, BATCH = 10, 100


def config_of(folder: Path, **changes: Any) -> Config:
    """Four epochs of ten task steps, a hyper pass in front of each from the second on, evaluated every second epoch."""
    tree = settings(folder / "data", folder, train__epochs=4, train__evaluate_every=2)
    tree |= {"learn": {"weight": True}, "hyper": {"start_epoch": 1, "way": "separate"}}
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section] = tree[section] | {key: value}
    return check_config(tree, "test")


def line(kind: str, step: int, epoch: float, seconds: float, **more: Any) -> dict[str, Any]:
    """Of metrics.jsonl, over five steps."""
    rate = {"images_per_second": 5 * BATCH / seconds, "data_wait_share": 0.25, "peak_memory_bytes": 3_000_000_000}
    task = {"loss": 1.5, "accuracy": 0.625, "lr": 0.05} if kind == "task" else {"cosine": 0.9, "hyper_lr": 0.01}
    return {"kind": kind, "step": step, "epoch": epoch, "seconds": seconds} | rate | task | more


def evaluation(step: int, epoch: int, validation: float, test: float) -> dict[str, Any]:
    found = {"validation_accuracy": validation, "test_accuracy": test, "validation_loss": 1.0, "test_loss": 1.0}
    return {"kind": "evaluation", "step": step, "epoch": epoch} | found


ROWS = [
    line("task", 5, 0.5, 10.0),
    line("task", 10, 1.0, 10.0),
    line("hyper", 15, 1.5, 15.0),
    line("hyper", 20, 2.0, 15.0, weights_below_half=0.125, changed_labels=0.0625),
    line("task", 25, 1.5, 10.0),
    line("task", 30, 2.0, 10.0),
    evaluation(30, 2, 0.75, 0.5),
    line("hyper", 35, 2.5, 15.0),
]


class World:
    """A run's folder, written by hand."""

    def __init__(self, root: Path) -> None:
        self.run, self.queue, self.now = root / "run", "", time.time()

    def config(self, **changes: Any) -> None:
        config = config_of(self.run.parent, **changes)
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "config.yaml").write_text(config.to_yaml())

    def start(self, attempt: str = ATTEMPT, ago: float = 100.0, **more: Any) -> None:
        event = {
            "attempt": attempt,
            "begun": self.now - ago - 9,
            "time": self.now - ago,
            "silent_since": self.now - ago,
        }
        event |= {"step": 0, "epoch": 0, "pass_steps": PASS, "total_steps": 70, "ranks": 2, "kept": {}}
        ledger.add(self.run, {"event": "start", "seconds": {}, "lost_steps": 0, "lost_seconds": 0.0} | event | more)

    def end(self, cause: str, why: str, at: str = "", attempt: str = ATTEMPT) -> None:
        event = {"attempt": attempt, "time": self.now - 3, "cause": cause, "why": why, "at": at, "seconds": {}}
        ledger.add(self.run, {"event": "end"} | event)

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        (self.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def rank(self, rank: int, phase: str, step: int, attempt: str = ATTEMPT, ago: float = 0.0, count: int = 2) -> None:
        path = self.run / f"ranks/rank-{rank:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        word = {"attempt": attempt, "rank": rank, "ranks": count, "host": f"node{rank // 8:02}", "pid": 100 + rank}
        word |= {"phase": phase, "step": step, "seconds": 0.5, "memory_bytes": 2_000_000_000, "every": 5.0}
        path.write_text(json.dumps(word))
        os.utime(path, (self.now - ago, self.now - ago))

    def lock(self, ago: float) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "lock.1.json").write_text("{}")
        os.utime(self.run / "lock.1.json", (self.now - ago, self.now - ago))

    def checkpoint(self, step: int, ago: float, seconds: dict[str, float]) -> None:
        path = self.run / f"checkpoints/step-{step:08d}/checkpoint.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"step": step, "progress": {"seconds": seconds}}))
        os.utime(path, (self.now - ago, self.now - ago))

    def look(self) -> Standing:
        return Looker(self.run, lambda job: self.queue if job == "42" else "?").look()

    def text(self, width: int = 80, height: int = 24) -> str:
        return rendered(frame(Path("runs/one"), self.look(), height, self.now), width, height)


def rendered(found: Any, width: int = 80, height: int = 24) -> str:
    console = Console(record=True, width=width, height=height, file=io.StringIO(), highlight=False)
    console.print(found)
    text = console.export_text()
    lines = text.splitlines()
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    return text


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_run_that_has_not_started(world: World) -> None:
    assert world.text() == "runs/one  not started  no such folder yet\n"
    world.run.mkdir()
    assert world.text() == "runs/one  not started\n"
    (world.run / "slurm.json").write_text('{"job": "4')
    assert world.look().state == "not started"
    (world.run / "slurm.json").write_text('{"job": "42", "name": "one", "logs": "/x"}')
    world.queue = "PENDING Resources"
    assert world.text() == "runs/one  queued  PENDING Resources, job 42\n"
    world.queue = "RUNNING None"
    assert world.look().state == "starting"
    world.queue = ""
    world.lock(2.0)
    assert world.look().state == "starting"
    world.rank(0, "start", -1)
    assert world.text().splitlines()[0] == "runs/one  starting"
    assert "0  node00  100  start" in world.text()


def running(world: World) -> None:
    world.config()
    world.start()
    world.metrics(ROWS)
    for rank in range(2):
        world.rank(rank, "hyper", 37)
    world.checkpoint(20, 60.0, {"task": 20.0, "hyper": 30.0, "save": 2.0})
    world.checkpoint(30, 30.0, {"task": 40.0, "hyper": 30.0, "evaluation": 5.0, "save": 3.0, "data": 2.0})


def test_a_run_under_way(world: World) -> None:
    running(world)
    lines = world.text().splitlines()
    assert lines[0] == "runs/one  running, hyper pass"
    # 33 steps: 7 + 6 to come of 20 hyper steps' 3 s … the sum is checked below; here it is shown.
    assert lines[2].startswith("step 37 of 70 (52.9%), epoch 3 of 4; ")
    assert lines[2].endswith(" left")
    assert lines[3] == "images/s    33 now, 41 mean; data wait 25.0% now, 25.0% mean; memory 3.00 GB"
    assert lines[4] == "train       loss 1.5000, accuracy 62.50%, lr 0.05"
    assert lines[5] == "evaluation  validation 75.00%, test 50.00%, epoch 2"
    assert lines[6] == "best        validation 75.00%, test 50.00%, epoch 2"
    assert lines[7] == "error       ▁ 25.00% on validation"
    assert lines[8] == "hyper       cosine 0.9000, lr 0.01"
    assert lines[9] == "learnt      12.50% of the weights below 1/2, 6.25% of the labels changed"
    # 75 useful seconds of 79: nine before the start's record, seventy from there to the checkpoint.
    assert lines[10] == "checkpoint  step 30, 30 s ago; restarts 0; goodput 94.9%"
    assert [row.split() for row in lines[11:]] == [
        ["rank", "host", "pid", "at", "heard", "memory"],
        ["0", "node00", "100", "hyper:37", "0", "s", "ago", "2.00", "GB"],
        ["1", "node00", "101", "hyper:37", "0", "s", "ago", "2.00", "GB"],
    ]
    for phase, words in (("evaluation", "evaluating"), ("save", "saving"), ("data", "hyper pass")):
        world.rank(0, phase, 37)
        assert world.text().splitlines()[0] == f"runs/one  running, {words}"


def test_the_best_is_by_validation_and_the_error_has_a_line(world: World) -> None:
    running(world)
    world.metrics([evaluation(k, k, validation, 0.5 + k / 100) for k, validation in enumerate((0.5, 0.9, 0.7, 0.9), 1)])
    text = world.text()
    assert "best        validation 90.00%, test 52.00%, epoch 2" in text
    assert "error       █▁▅▁ 10.00% on validation" in text


def test_silent_ranks_and_those_behind_come_first(world: World) -> None:
    running(world)
    for rank in range(64):
        world.rank(rank, "data", 1207, count=64)
    world.rank(41, "task", 1206, count=64)
    world.rank(50, "task", 1207, ago=40.0, count=64)
    text = world.text().splitlines()
    assert text[0].endswith("no word of 1 of 64 ranks")
    first = text.index(next(it for it in text if it.startswith("rank")))
    assert text[first + 1].split()[:4] == ["50", "node06", "150", "task:1207"]
    assert "no word for 40 s" in text[first + 1]
    assert text[first + 2].split()[:4] == ["41", "node05", "141", "task:1206"]
    assert text[-1] == f"and {64 - (len(text) - first - 2)} more, at step 1207"
    assert len(text) == 23
    assert "and" not in rendered(ranks(world.look().ranks, 70)[0], 80, 80)


def test_words_of_an_earlier_start_are_not_shown(world: World) -> None:
    running(world)
    world.rank(9, "task", 5, attempt="76/0", ago=20.0)
    assert [it.rank for it in world.look().ranks] == [0, 1]


def test_ends(world: World) -> None:
    world.config()
    world.start(ago=500.0)
    world.metrics(ROWS)
    world.lock(300.0)
    assert world.text().startswith("runs/one  silent  no word of it, and no end")
    world.end("failed", "rank 1 was killed by signal 9 (SIGKILL)", "task:33")
    assert world.text().splitlines()[0] == "runs/one  failed  rank 1 was killed by signal 9 (SIGKILL) at task:33"
    (world.run / "slurm.json").write_text('{"job": "42", "name": "one", "logs": "/x"}')
    world.queue = "PENDING BeginTime"
    assert (
        world.text(200)
        .splitlines()[0]
        .startswith("runs/one  queued  PENDING BeginTime, job 42; before: failed, rank 1")
    )
    world.rank(0, "start", -1, attempt="77/1")
    assert world.text().splitlines()[0] == "runs/one  starting"
    world.start("77/1", ago=1.0)
    world.rank(0, "task", 31, attempt="77/1")
    assert world.text().splitlines()[0] == "runs/one  running, task pass"
    assert "restarts 1" in world.text()
    world.queue = ""
    world.now += 5
    world.end("stopped", "asked to; saved at step 40", attempt="77/1")  # the rank's word is still there
    assert world.text().splitlines()[0] == "runs/one  stopped  asked to; saved at step 40"
    assert "node00" not in world.text()
    (world.run / "summary.json").write_text("{}")
    assert world.text().splitlines()[0] == "runs/one  finished"


def test_files_that_are_half_written_or_gone(world: World) -> None:
    running(world)
    whole = {path: path.read_bytes() for path in world.run.rglob("*") if path.is_file()}
    for path, content in whole.items():
        for left in (
            b"",
            content[: len(content) // 2],
            b"\xff\x00[",
            b"[]\n",
            b'{"a": 1}\n' if path.suffix != ".jsonl" else b"7\n",
        ):
            path.write_bytes(left)
            assert world.text()
        path.unlink()
        assert world.text()
        path.write_bytes(content)
    for path in whole:
        path.unlink()
    assert world.look().state == "not started"


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def text(*steps: int) -> str:
        return "".join(json.dumps({"kind": "task", "epoch": 1.0, "step": step}) + "\n" for step in steps)

    lines = Lines(path)
    assert lines.look() == []
    path.write_text(text(1, 2) + text(3)[:20])
    assert [row["step"] for row in lines.look()] == [1, 2]
    with path.open("a") as file:
        file.write(text(3)[20:] + 'nonsense\n{"a": 1}\n[]\n' + text(4))
    assert [row["step"] for row in lines.look()] == [1, 2, 3, 4]
    (tmp_path / "new").write_text(text(1, 5, 6, 7, 8, 9))
    os.replace(tmp_path / "new", path)  # as a resume does, and then it grows beyond what was read
    assert [row["step"] for row in lines.look()] == [1, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("done", range(1, 17))
@pytest.mark.parametrize("every", [1, 3])
def test_time_left_is_that_of_a_simulated_run(tmp_path: Path, done: int, every: int) -> None:
    """Task steps of 2 s, hyper steps of 3 s, evaluations of 5 s and 0.1 s of saves a step; after so many lines."""
    config = config_of(tmp_path, train__evaluate_every=every)
    events: list[tuple[float, dict[str, Any] | None]] = []  # seconds, and the line written after them
    step = 0
    for epoch in range(4):
        for kind, each in (("hyper", 3.0), ("task", 2.0)):
            for position in range(PASS if kind == "task" or epoch >= 1 else 0):
                step += 1
                row = line(kind, step, epoch + (position + 1) / PASS, 5 * each) if position % 5 == 4 else None
                events.append((each + 0.1, row))
        if (epoch + 1) % every == 0 or epoch == 3:
            events.append((5.0, evaluation(step, epoch + 1, 0.5, 0.5)))
    rows = [row for _, row in events if row is not None]
    assert (step, len(rows)) == (70, 14 + (4 if every == 1 else 2))
    at = max(k for k, (_, row) in enumerate(events) if row is rows[done - 1])
    known = rows[:done]
    evaluations = sum(row["kind"] == "evaluation" for row in known)
    saved = Saved(known[-1]["step"], 0.0, {"evaluation": 5.0 * evaluations, "save": 0.1 * known[-1]["step"]})
    expected = sum(seconds for seconds, _ in events[at + 1 :])
    if not evaluations:
        expected -= 5.0 * sum(row is not None and row["kind"] == "evaluation" for _, row in events[at + 1 :])
    if not any(row["kind"] == "hyper" for row in known):
        expected -= 1.0 * 30  # taken for task steps
    found = time_left(known, config, PASS, 70, known[-1]["step"], saved)
    assert found == pytest.approx(expected)


def test_there_is_no_time_left_before_there_is_a_rate(tmp_path: Path) -> None:
    assert time_left([evaluation(10, 1, 0.5, 0.5)], config_of(tmp_path), PASS, 70, 10, None) is None


@pytest.mark.parametrize("way", ["separate", "shared", None])
@pytest.mark.parametrize("begun", [0, 3])
def test_total_steps_are_those_that_the_loop_makes(tmp_path: Path, way: str | None, begun: int) -> None:
    """From any progress, also that of a fork with more steps behind it than this run would have made."""
    config = config_of(tmp_path)
    loaders = SimpleNamespace(task=SimpleNamespace(steps=PASS), hyper=SimpleNamespace(steps=PASS))
    parts = cast(Any, SimpleNamespace(hyper=SimpleNamespace(way=way) if way else None, loaders=loaders))
    seen, step = [], 100
    for epoch in range(begun, 4):
        passes = ("hyper", "task") if way == "separate" and epoch >= 1 else ("task",)
        seen.append(Progress(epoch=epoch, step=step))
        for pass_ in passes:
            for position in range(PASS):
                step += 1
                seen.append(Progress(epoch=epoch, pass_=pass_, position=position + 1, step=step))  # type: ignore[arg-type]
    assert {total_steps(config, parts, progress) for progress in seen} == {step}


def test_small_words() -> None:
    assert [span(it) for it in (0.4, 59.6, 61, 3600 * 5 + 65, 86400 * 3 + 7300)] == [
        "0 s", "1 min 00 s", "1 min 01 s", "5 h 01 min", "3 d 2 h",
    ]  # fmt: skip
    assert sparkline([3.0]) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    asked: list[str] = []
    ask = seldom(lambda job: asked.append(job) or "PENDING", 60.0)  # type: ignore[func-returns-value]
    assert [ask("1"), ask("1")] == ["PENDING", "PENDING"]
    assert asked == ["1"]


def test_a_warden_says_where_its_rank_is_until_it_ends(tmp_path: Path) -> None:
    environment = os.environ | {"SLURM_PROCID": "1", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK + "time.sleep(60)", str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "on\n"
    path = tmp_path / "ranks/rank-00001.json"
    wait_for(path.is_file)
    (found,) = standing.read_ranks(tmp_path, time.time())
    assert (found.rank, found.ranks, found.pid, found.phase, found.step) == (1, 2, rank.pid, "task", 1207)
    assert found.attempt == "7/2"
    resident = int(Path(f"/proc/{rank.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert found.memory_bytes == pytest.approx(resident, rel=0.1)
    assert not found.silent
    rank.kill()
    rank.wait()
    wait_for(lambda: not path.exists())
    assert list((tmp_path / "ranks").iterdir()) == []


def test_many_ranks_speak_more_seldom(tmp_path: Path) -> None:
    heart = Heart(60.0)
    assert [Warden(heart, 1, 0, tmp_path, 0, ranks).every for ranks in (1, 64, 1000)] == [5.0, 5.0, 50.0]
    (tmp_path / "ranks").write_text("a file where the folder should be")
    Warden(heart, 1, 0, tmp_path, 0, 1).sign()
    slow = Rank(0, 1000, "h", 1, "task", 1, 0.0, 1, 50.0, "", age=140.0)
    assert not slow.silent


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_look_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from autodo_dist.standing import Looker; import autodo_dist.cli\n"
        "Looker(Path(sys.argv[1]), str).look(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_once_and_no_terminal_are_plain(world: World) -> None:
    running(world)
    result = CliRunner().invoke(app, ["watch", str(world.run)])
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "step 37 of 70" in result.stdout


def test_on_a_terminal_it_redraws_in_place_and_leaves_it_clean(world: World) -> None:
    running(world)
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen(
        ["autodo", "watch", str(world.run), "--every", "0.2"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    os.close(theirs)
    said = b""

    def hear() -> bytes:
        nonlocal said
        while select.select([ours], [], [], 0.1)[0]:
            try:
                said += os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
        return said

    wait_for(lambda: hear().count(b"step 37 of 70") >= 2)
    world.rank(0, "task", 41)
    wait_for(lambda: b"step 41 of 70" in hear())
    process.send_signal(signal.SIGINT)
    wait_for(lambda: [hear(), process.poll()][1] is not None)  # it may wait for its last frame to be read
    assert process.returncode == 0
    text = hear().decode()
    os.close(ours)
    assert text.index("\x1b[?1049h") < text.index("\x1b[?1049l")  # the screen of before is back
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # and the cursor
    after = text[text.rindex("\x1b[?1049l") :]
    assert "step 41 of 70" in after
    assert "Traceback" not in text
    assert "Aborted" not in text


def test_a_real_run_of_two_ranks(digits: Path, tmp_path: Path) -> None:
    """Watched from outside while it goes on."""
    words = [
        f"data.root={digits}", f"run.root={tmp_path}", "run.name=one", "data.image_size=16", "train.epochs=3",
        "train.batch_size=60", "train.steps_per_pass=5", "train.log_every=2", "hyper.start_epoch=1",
        "optim.warmup_epochs=1", "launch.max_restarts=0", "launch.ranks_per_node=2",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "launcher/submit.py"), "--config", str(ROOT / "configs/digits.yaml"), *words]
    looker, states = Looker(tmp_path / "one", lambda job: ""), []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ranks_seen: set[tuple[int, str]] = set()
    while process.poll() is None:
        found = looker.look()
        rendered(frame(tmp_path / "one", found, 24, time.time()))
        ranks_seen |= {(it.rank, it.phase) for it in found.ranks}
        if found.state not in states:
            states.append(found.state)
        time.sleep(0.05)
    assert process.returncode == 0
    found = looker.look()
    assert [state for state in states if state != "finished"] == ["not started", "starting", "running"]
    assert {rank for rank, _ in ranks_seen} == {0, 1}
    assert (found.state, found.step, found.total, found.epoch) == ("finished", 15, 15, 3)
    assert found.ranks == []

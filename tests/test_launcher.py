"""The launcher with real processes; small programs that do not import torch stand in for the training of a rank."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from autodo_dist.errors import AutodoError
from autodo_dist.ports import PORTS, free_port
from launcher import follow, slurm

SUBMIT = Path(__file__).parents[1] / "launcher" / "submit.py"
ALL_GONE_S = 5.0  # the requirement: from a rank's failure to the end of all others

LAUNCHER = """
import sys
from pathlib import Path
from launcher.local import launch
folder, nodes, ranks_per_node, *command = sys.argv[1:]
sys.exit(launch(command, Path(folder), int(nodes), int(ranks_per_node)))
"""
RANK = """
import os, signal, socket, subprocess, sys, time
from pathlib import Path
rank, ranks, folder = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"]), Path(sys.argv[1])

def here(name=f"pid-{rank}", pid=os.getpid()):
    (folder / "part").mkdir(exist_ok=True)
    part = folder / "part" / name
    part.write_text(str(pid))
    part.rename(folder / name)

def await_others():
    while len(list(folder.glob("pid-*"))) < ranks:
        time.sleep(0.01)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path):
    """Start a launcher whose ranks run `program`, in a session of its own as a shell would."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, nodes: int = 1, ranks_per_node: int = 2) -> subprocess.Popen[str]:
        script = tmp_path / "rank.py"
        script.write_text(RANK + program)
        shape = [str(tmp_path), str(nodes), str(ranks_per_node)]
        command = [sys.executable, "-c", LAUNCHER, *shape, sys.executable, str(script), str(tmp_path)]
        launcher = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        launcher.kill()
        launcher.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


def pids(folder: Path, count: int) -> list[int]:
    """The processes of the ranks, once `count` of them have come up."""
    assert wait_for(lambda: len(list(folder.glob("pid-*"))) == count)
    return [int(path.read_text()) for path in folder.glob("pid-*")]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_environment_of_two_by_two_ranks(start: Start, tmp_path: Path):
    launcher = start(
        """
import json
print("said by rank", rank)
(folder / f"environment-{rank}.json").write_text(json.dumps(dict(os.environ)))
""",
        nodes=2,
        ranks_per_node=2,
    )
    out, err = launcher.communicate(timeout=20)
    assert (launcher.returncode, err) == (0, "")
    assert out == "said by rank 0\n"
    assert (tmp_path / "logs/rank-00003.out").read_text().splitlines()[-1] == "said by rank 3"
    seen = [json.loads((tmp_path / f"environment-{rank}.json").read_text()) for rank in range(4)]
    own = ("SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES")
    assert [[int(one[name]) for name in own] for one in seen] == [
        [0, 0, 0, 4, 2],
        [1, 0, 1, 4, 2],
        [2, 1, 0, 4, 2],
        [3, 1, 1, 4, 2],
    ]
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        assert len({one[name] for one in seen}) == 1
    assert seen[0]["MASTER_ADDR"] == "127.0.0.1"
    assert int(seen[0]["MASTER_PORT"]) in PORTS


def test_first_cause_is_shown_though_its_peers_fail_too(start: Start, tmp_path: Path):
    stale = {"time": 0.0, "rank": 2, "host": "h", "kind": "bug", "message": "of an earlier attempt", "traceback": ""}
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors/rank-00002.json").write_text(json.dumps(stale))
    launcher = start(
        """
from autodo_dist.errors import AutodoError
from launcher.job import fail
here()
address = "127.0.0.1", int(os.environ["MASTER_PORT"])
try:
    if rank == 0:
        with socket.create_server(address) as server:
            connection, _ = server.accept()
        (folder / "accepted").touch()
        if not connection.recv(1):
            raise ConnectionError("connection closed by peer")
    if rank == 1:
        while True:
            try:
                connection = socket.create_connection(address)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        while not (folder / "accepted").exists():
            time.sleep(0.01)
        await_others()
        raise AutodoError("picture 7: broken\\nor not a picture")
    time.sleep(60)
except Exception as error:
    fail(error, folder)
""",
        ranks_per_node=3,
    )
    _, err = launcher.communicate(timeout=30)
    ended = time.time()
    assert launcher.returncode == 1
    log = tmp_path / "logs/rank-00001.out"
    assert err.splitlines()[-1] == f"error: rank 1 failed: picture 7: broken or not a picture; its output is in {log}"
    assert log.read_text().splitlines()[-1] == "error: picture 7: broken or not a picture"
    record = json.loads((tmp_path / "errors/rank-00001.json").read_text())
    assert (record["rank"], record["kind"], record["host"]) == (1, "user", socket.gethostname())
    assert "raise AutodoError" in record["traceback"]
    assert ended - record["time"] < ALL_GONE_S
    assert not any(alive(pid) for pid in pids(tmp_path, 3))


@pytest.mark.parametrize(
    ("error", "last_lines"),
    [
        ("AutodoError('data x: no such folder')", ["error: data x: no such folder"]),
        ("ValueError('a bug')", ["ValueError: a bug", "error: rank 0 failed: ValueError: a bug; its output is above"]),
    ],
)
def test_rank_0_has_the_terminal_and_a_user_error_is_said_once(start: Start, error: str, last_lines: list[str]):
    launcher = start(
        f"""
from autodo_dist.errors import AutodoError
from launcher.job import fail
try:
    raise {error}
except Exception as error:
    fail(error, folder)
""",
        ranks_per_node=1,
    )
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 1
    assert err.splitlines()[-len(last_lines) :] == last_lines
    assert ("Traceback" in err) == ("ValueError" in error)


def test_exit_status_alone_is_a_cause(start: Start, tmp_path: Path):
    launcher = start("sys.exit(3) if rank == 1 else time.sleep(60)")
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 1
    assert err == f"error: rank 1 exited with status 3; its output is in {tmp_path / 'logs/rank-00001.out'}\n"


def test_killed_rank_is_named_and_ends_the_others(start: Start, tmp_path: Path):
    launcher = start("here(); time.sleep(60)", nodes=3, ranks_per_node=1)
    processes = pids(tmp_path, 3)
    killed = time.monotonic()
    os.kill(int((tmp_path / "pid-2").read_text()), signal.SIGKILL)
    _, err = launcher.communicate(timeout=20)
    assert time.monotonic() - killed < ALL_GONE_S
    assert launcher.returncode == 1
    assert err.startswith("error: rank 2 was killed by signal 9 (SIGKILL); ")
    assert "memory" in err
    assert len(err.splitlines()) == 1
    assert not any(alive(pid) for pid in processes)


def test_rank_and_helper_that_ignore_sigterm_are_gone_in_time(start: Start, tmp_path: Path):
    launcher = start(
        """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here("pid-helper", helper.pid)
here()
while len(list(folder.glob("pid-*"))) < 3:
    time.sleep(0.01)
if rank == 1:
    (folder / "failed").write_text(str(time.time()))
    sys.exit(1)
time.sleep(60)
"""
    )
    processes = pids(tmp_path, 3)
    _, err = launcher.communicate(timeout=20)
    assert time.time() - float((tmp_path / "failed").read_text()) < ALL_GONE_S
    assert "rank 1 exited with status 1" in err
    assert not any(alive(pid) for pid in processes)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_all_ranks(start: Start, tmp_path: Path, number: int, status: int):
    launcher = start("here(); time.sleep(60)", nodes=2, ranks_per_node=2)
    processes = pids(tmp_path, 4)
    for pid in processes:
        os.kill(pid, signal.SIGINT)  # a rank leaves Ctrl-C to the launcher
    os.killpg(launcher.pid, number)  # as the terminal does: to everything in the foreground
    out, err = launcher.communicate(timeout=ALL_GONE_S)
    assert launcher.returncode == status
    assert err == f"stopped by {number.name}; all ranks have ended\n"
    assert "KeyboardInterrupt" not in out + err + (tmp_path / "logs/rank-00001.out").read_text()
    assert not any(alive(pid) for pid in processes)


def test_killed_launcher_leaves_no_orphan(start: Start, tmp_path: Path):
    launcher = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); here(); time.sleep(60)", ranks_per_node=3)
    processes = pids(tmp_path, 3)
    assert all(alive(pid) for pid in processes)
    launcher.kill()
    assert wait_for(lambda: not any(alive(pid) for pid in processes), ALL_GONE_S)


def test_free_port_skips_taken_ones_and_says_when_there_is_none():
    free = free_port()
    with socket.socket() as first, socket.socket() as second:
        for taken in (first, second):
            taken.bind(("", free_port()))
            taken.listen()
        ports = [first.getsockname()[1], second.getsockname()[1]]
        assert free_port([*ports, free]) == free
        with pytest.raises(AutodoError, match="none can be bound"):
            free_port(ports)


@pytest.fixture
def submit(tmp_path: Path):
    """Run submit.py in an empty folder on a small config; `programs` are put on PATH, which holds no others."""
    (tmp_path / "small.yaml").write_text("data: {root: nowhere}\ntrain: {device: cpu}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()

    def submit(*words: str, **programs: str) -> subprocess.CompletedProcess[str]:
        for name, body in programs.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return subprocess.run(
            [sys.executable, str(SUBMIT), "--config", str(tmp_path / "small.yaml"), *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=tmp_path / "work",
            env=os.environ | {"PATH": str(tmp_path / "bin")},
        )

    return submit


# A snapshot of the code is taken by the machine's own.
PROGRAMS = {name: f'exec {shutil.which(name)} "$@"' for name in ("git", "rsync", "grep", "cut")}
needs_programs = pytest.mark.skipif("None" in "".join(PROGRAMS.values()), reason="make slurm installs git and rsync")
Submit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("executor", "expected"), [("local", "-m launcher.job runs/small/"), ("slurm", "#SBATCH --time=1440\n")]
)
def test_dry_run_prints_everything_and_writes_nothing(submit: Submit, tmp_path: Path, executor: str, expected: str):
    done = submit(
        "--dry-run", "--nodes", "2", "--ranks-per-node=3", "--executor", executor, "--fork", "a@12", "train.epochs=7"
    )
    assert (done.returncode, done.stderr) == (0, "")
    comment = done.stdout.partition("# not submitted")[2].partition("\n")[2].replace("#   ", "")
    settings = yaml.safe_load(comment or done.stdout)
    assert settings["train"]["epochs"] == 7
    assert settings["run"]["fork"] == "a@12"
    shape = {"executor": executor, "nodes": 2, "ranks_per_node": 3}
    assert settings["launch"].items() >= shape.items()
    assert "6 ranks" in done.stdout
    assert expected in done.stdout
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.epoks=3"], "unknown key train.epoks; did you mean train.epochs?"),
        (["--nodes", "0"], "launch.nodes"),
        (["--executor", "slrum"], "launch.executor"),
        (["--ranks-per-node", "3", "train.batch_size=2"], "smaller than the 3 ranks"),
        (["--executor", "slurm"], "--executor local"),
        (["--executor", "slurm", "launch.slurm.ntasks=8"], "set launch.nodes and launch.ranks_per_node instead"),
        (["--executor", "slurm", "--slurm", "time=9"], "set launch.time instead"),
        (["--executor", "slurm", "--time", "long"], "launch.time = 'long'"),
        (["run.root=/proc"], "cannot be written"),
    ],
)
def test_what_the_user_can_mend_is_one_line(submit: Submit, tmp_path: Path, words: list[str], expected: str):
    done = submit(*words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_error_inside_the_job_is_one_line_and_recorded(submit: Submit, tmp_path: Path):
    """The only test here that imports torch: the real job, on a data set that does not exist."""
    done = submit("run.name=there")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: data nowhere: no such folder")
    record = json.loads((tmp_path / "work/runs/there/errors/rank-00000.json").read_text())
    assert (record["kind"], f"error: {record['message']}\n") == ("user", done.stderr)


@needs_programs
def test_slurm_job_is_submitted_as_a_script_and_a_pickle(submit: Submit, tmp_path: Path):
    """Stand-ins for sbatch and srun; a real cluster is another test's matter."""
    words = ["--executor=slurm", "--nodes=2", "--partition=gpu", "--cpus-per-rank=4", "--time=1:30:00"]
    words += ["--slurm", "mail-type=END", "--setup", "module load cuda"]
    done = submit(*words, **PROGRAMS, sbatch="echo Submitted batch job 7", srun="", scontrol="exit 1")
    assert (done.returncode, done.stderr) == (0, "")
    logs = tmp_path / "work/runs/small/submitit"
    for said in ("Slurm job 7", "1.5 h", "runs/small", f"tail -F {logs}/7_0_log.out", "scancel 7"):
        assert said in done.stdout
    script = (logs / "7_submission.sh").read_text()
    for option in (
        "nodes=2",
        "ntasks-per-node=1",
        "partition=gpu",
        "cpus-per-task=4",
        "time=90",
        "mail-type=END",
        "requeue",
    ):
        assert f"#SBATCH --{option}\n" in script
    assert "--kill-on-bad-exit=1 --cpus-per-task=4" in script
    assert script.index("\nmodule load cuda\n") < script.index("\ntrap ")
    job = pickle.loads((logs / "7_submitted.pkl").read_bytes()).function
    assert type(job).__name__ == "Job"
    assert job.settings["data"]["root"] == "nowhere"


@needs_programs
def test_refusal_of_sbatch_is_one_line(submit: Submit):
    programs = PROGRAMS | {
        "sbatch": "echo 'sbatch: error: invalid partition' >&2; exit 1",
        "sinfo": "echo gpu; echo cpu",
    }
    done = submit("--executor=slurm", **programs, srun="")
    assert done.returncode == 1
    assert done.stderr.startswith("error: sbatch refused the job: sbatch: error: invalid partition; ")
    assert "set --partition to one of cpu, gpu" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (90, 90),
        ("90", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("1-12", 36 * 60),
        ("1-12:30", 36 * 60 + 30),
        ("0-0:0:1", 1),
    ],
)
def test_minutes_reads_slurms_time_limits(time: str | int, expected: int):
    assert slurm.minutes(time) == expected


@pytest.mark.parametrize("time", ["", "0", "-5", "1:2:3:4", "UNLIMITED"])
def test_minutes_refuses_what_is_no_limit(time: str):
    with pytest.raises(AutodoError, match=r"launch\.time"):
        slurm.minutes(time)


@pytest.mark.parametrize("classes", [1, 1000, 50_000])
def test_the_newest_metrics_are_read_though_a_line_is_long(tmp_path: Path, classes: int):
    first = {"kind": "task", "step": 20, "epoch": 1.0, "loss": 4.25}
    last = {
        "kind": "evaluation",
        "step": 40,
        "epoch": 2,
        "test_accuracy": 0.5,
        "per_class": dict.fromkeys(range(classes), 0.0),
    }
    metrics = tmp_path / "metrics.jsonl"
    assert follow._newest(metrics) == ""
    metrics.write_text(json.dumps(first))
    assert follow._newest(metrics) == ""  # it is being written
    metrics.write_text(f"{json.dumps(first)}\n")
    assert follow._newest(metrics) == "task, epoch 1.0, step 20: loss 4.25"
    metrics.write_text(f"{json.dumps(first)}\n{json.dumps(last)}\n{{")
    assert follow._newest(metrics) == "evaluation, epoch 2, step 40: test_accuracy 0.5"


def test_submit_does_not_import_torch():
    check = "import sys, launcher.submit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0

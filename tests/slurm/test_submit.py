"""launcher/submit.py and slurm/*.sbatch as a user runs them, on a real Slurm of four nodes.

All of it takes about three minutes on two cores. What costs is that each rank's start imports torch.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import ACCOUNTING_PROGRAMS, Cluster
from conftest import ROOT, require, with_this_code
from PIL import Image
from test_pack_imagenet import devkit, tar_of, train_tars, val_pictures

from autodo_dist import ledger
from autodo_dist.proof.kill import parted, shown

CLASSES, EACH, SIDE = 1000, 12, 64
JOBS = ("imagenet_r18", "imagenet_r50_deepspeed", "digits", "autodo", "autodo-seeds", "pack-imagenet")  # by name
START_S = 300.0  # from a job's submission to the end of its ranks' start and a few steps, beside others
SMALL = [  # a run of seconds, beside data.root, run.root and the kind of device
    "data.image_size=16", "data.crop_padding=1", "train.epochs=1", "train.steps_per_pass=4", "optim.warmup_epochs=0",
    "hyper.start_epoch=0", "launch.cpus_per_rank=1", "train.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_job_left(cluster: Cluster) -> Iterator[None]:
    """Jobs of a test that failed do not hold up the next."""
    yield
    if left := cluster.run("squeue", "--noheader", "--format=%A", f"--name={','.join(JOBS)}").split():
        cluster.run("scancel", *left, check=False)


@pytest.fixture(scope="session")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 1,000 classes: coarse patterns of 64 pixels, twelve of a class to train on and one to test."""
    root, rng = tmp_path_factory.mktemp("thousand"), np.random.default_rng(0)
    for label in range(CLASSES):
        pattern_HWC = rng.integers(40, 216, (4, 4, 3))
        for part, count in (("train", EACH), ("test", 1)):
            folder = root / "pictures" / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for copy in range(count):
                noisy_HWC = (pattern_HWC + rng.integers(-40, 40, pattern_HWC.shape)).astype(np.uint8)
                picture = Image.fromarray(noisy_HWC).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                picture.save(folder / f"{copy}.jpg")
    out = root / "packed"
    subprocess.run(["autodo", "pack", "folder", str(root / "pictures"), str(out)], check=True, capture_output=True)
    shutil.rmtree(root / "pictures")
    return out


def submit(cluster: Cluster, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The user's command, in the checkout's folder."""
    return subprocess.run(
        [sys.executable, "launcher/submit.py", *map(str, words)],
        cwd=ROOT,
        env=cluster.environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@contextmanager
def following(cluster: Cluster, words: Sequence[str], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The user's command with --follow, beside what the block does; it is ended with the block."""
    command = [sys.executable, "launcher/submit.py", *words, "--follow"]
    with (
        out.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=file, stderr=file) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def number(said: str) -> str:
    """The number of the job in what submit.py said."""
    return said.split("submitted Slurm job ")[1].split(",")[0]


def submitted(cluster: Cluster, *words: object) -> str:
    """The number of the job that the user's command submits."""
    done = submit(cluster, *words)
    assert (done.returncode, done.stderr) == (0, "")
    job = number(done.stdout)
    assert f"scancel {job}" in done.stdout
    return job


def step(cluster: Cluster, job: str) -> int:
    """The step that a rank of the job shows, as the name of its process; -1 before its first."""
    found = [-1]
    for pid in (pid for node in cluster.nodes for pid in cluster.processes(node)):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}".encode() in variables:
            found.append(parted(shown(pid))[1])
    return max(found)


def preempt(cluster: Cluster, job: str, after: int) -> None:
    """What Slurm does before it takes a job's nodes away, once the job has made so many steps."""
    cluster.await_(lambda: step(cluster, job) >= after, START_S, f"job {job} at step {after}")
    cluster.run("scancel", "--signal=USR2", job)


def completed(cluster: Cluster, job: str, logs: Sequence[Path]) -> dict[str, str]:
    """Wait for the job's good end; what Slurm says of it. The logs are shown if it comes to another one."""
    found = cluster.await_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=START_S)
    said = "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in logs if log.is_file())
    assert found["JobState"] == "COMPLETED", f"{found}\n{said}"
    return found


def watched(cluster: Cluster, run: Path) -> str:
    """What `autodo watch` shows of a run from where its commands are submitted."""
    command = [sys.executable, "-c", "from autodo_dist.cli import main; main()", "watch", str(run), "--once"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=cluster.environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def causes(run: Path) -> list[str]:
    """How each attempt of a run ended."""
    return [event["cause"] for event in ledger.read(run) if event["event"] == "end"]


def summary(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "summary.json").read_text()))


@pytest.mark.slow(reason="16 starts of a rank; 20 steps of ResNet-18 and 4 of ResNet-50, on four ranks")
def test_the_users_own_commands_are_preempted_and_end_complete(
    cluster: Cluster, thousand: Path, tmp_path: Path
) -> None:
    """Two epochs: 20 steps of ResNet-18, followed to the end, and 4 of ResNet-50, with a hyper step in each.

    Overrides for data, device and steps only: batches are the files' own 256 and 1,024. The network sees the pictures
    of 64 pixels at 32, as two cores take 2.7 s a step of ResNet-18 at 64.
    """
    some = [f"data.root={thousand}", f"data.image_size={SIDE // 2}", "train.device=cpu", f"run.root={tmp_path}"]
    some += [
        "train.epochs=2",
        "train.evaluate_every=2",
        "optim.warmup_epochs=0",
        "hyper.start_epoch=0",
    ]
    r18 = ["--config", "configs/imagenet_r18.yaml", "--nodes", "4", *some, "train.steps_per_pass=10"]
    r50 = ["--config", "configs/imagenet_r50_deepspeed.yaml", "--nodes", "4", *some, "train.steps_per_pass=2"]
    followed = tmp_path / "followed"
    with following(cluster, r18, followed) as process:
        cluster.await_(lambda: "cancel" in followed.read_text(), 60, "submission")
        first = number(followed.read_text())
        cluster.await_(lambda: step(cluster, first) >= 1, START_S, "first step")
        live = watched(cluster, tmp_path / "imagenet_r18")
        preempt(cluster, first, after=12)
        second = submitted(cluster, *r50)
        preempt(cluster, second, after=1)
        cluster.await_(lambda: process.poll() is not None, START_S, "end of what is followed")
    assert "imagenet_r18  running" in live
    assert [line.split()[0] for line in live.splitlines()[-4:]] == ["0", "1", "2", "3"], live
    said = followed.read_text()
    assert process.returncode == 0, said
    for what in ("requeues: 1", "evaluation, epoch 2, step 20: validation_accuracy", "COMPLETED on node[0-3]"):
        assert what in said
    for job, name, kinds in (
        (first, "imagenet_r18", {"task": 20, "evaluation": 20}),
        (second, "imagenet_r50_deepspeed", {"task": 4, "evaluation": 4}),
    ):
        run = tmp_path / name
        found = completed(cluster, job, [run / f"submitit/{job}_{rank}_log.out" for rank in range(4)])
        assert (found["Restarts"], found["NumNodes"]) == ("1", "4")
        assert causes(run) == ["stopped", "finished"]
        assert ledger.goodput(ledger.read(run), 0)["lost_steps"] == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert {row["kind"]: row["step"] for row in rows} == kinds
        assert np.isfinite(summary(run)["test_accuracy_final"])
        results = {path.name for path in (run / "submitit").glob("*_result.pkl")}
        assert results == {f"{job}_{rank}_result.pkl" for rank in range(4)}


def test_an_array_of_seeds_ends_in_a_table(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    words = [
        "--config", "configs/digits.yaml", "--executor", "slurm", "--ranks-per-node", 1, "--runs", 3, "--follow",
        *SMALL, f"data.root={digits}", f"run.root={tmp_path}",
    ]  # fmt: skip
    done = submit(cluster, *words, PYTHONDONTWRITEBYTECODE="")
    assert (done.returncode, done.stderr) == (0, "")
    (code,) = (tmp_path / "digits-seeds").glob("code-*")
    assert list(code.glob("autodo_dist/__pycache__/train.*.pyc"))  # the copy is what ran
    runs = [tmp_path / f"digits-seed{seed}" for seed in range(3)]
    for run in runs:
        assert f"{run.name} (" in done.stdout
    errors = [100 * (1 - summary(run)["test_accuracy_final"]) for run in runs]
    table = done.stdout[done.stdout.index("| 3 of 3 runs finished | mean ± deviation | each |") :]
    mean = f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f} %"
    assert f"| test error, last epoch | {mean} | {', '.join(f'{error:.2f}' for error in errors)} |" in table
    seeds = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert [(each["train"]["seed"], each["data"]["split_seed"]) for each in seeds] == [(0, 0), (1, 1), (2, 2)]
    again = submit(cluster, *words)
    assert again.returncode == 0
    assert again.stdout.count("is finished") == 3
    assert "submitted" not in again.stdout
    assert again.stdout.endswith(table)


@pytest.mark.slow(reason="6 starts of a rank, and Slurm's seconds before it starts a job again")
def test_sbatch_files_run_after_two_variables_are_set(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    """All at once; the training run is preempted once."""
    archives = tmp_path / "archives"
    archives.mkdir()
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train_tars()))
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val_pictures()))
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    variables = {"VENV": sys.prefix, "CONFIG": str(ROOT / "configs/digits.yaml"), "ARCHIVES": str(archives)}
    root = [f"data.root={digits}", f"run.root={tmp_path}"]

    def sbatch(file: str, options: Sequence[str], words: Sequence[str], **more: str) -> tuple[str, Path]:
        log = tmp_path / f"{file}.log"
        command = ["sbatch", "--parsable", f"--output={log}", f"--chdir={ROOT}", *options, str(ROOT / "slurm" / file)]
        return cluster.run(*command, *words, **variables, **more), log

    train, train_log = sbatch("train.sbatch", ["--nodes=2"], [*root, *SMALL, "run.name=plain"])
    array, _ = sbatch("array.sbatch", ["--array=3-4", f"--output={tmp_path}/%a.log"], [*root, *SMALL])
    pack, pack_log = sbatch("pack_imagenet.sbatch", [], ["--workers=1"], OUT=str(tmp_path / "imagenet"))
    preempt(cluster, train, after=2)
    completed(cluster, pack, [pack_log])
    assert "4 classes, 48 samples" in pack_log.read_text()
    for seed in (3, 4):
        completed(cluster, f"{array}_{seed}", [tmp_path / f"{seed}.log"])
        assert summary(tmp_path / f"digits-seed{seed}")
    assert completed(cluster, train, [train_log])["Restarts"] == "1"
    assert causes(tmp_path / "plain") == ["stopped", "finished"]
    started = [event for event in ledger.read(tmp_path / "plain") if event["event"] == "start"]
    assert [event["ranks"] for event in started] == [2, 2]


def test_accounts_and_states_are_those_of_real_accounting(
    digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With slurmdbd and MariaDB: who may not pay is refused, and sacct tells how the job ended."""
    require()
    require(ACCOUNTING_PROGRAMS)
    tmp_path = tmp_path_factory.mktemp("runs")
    words = [
        "--config", "configs/digits.yaml", "--executor", "slurm", "--ranks-per-node", 1, "--follow", *SMALL,
        f"data.root={digits}", f"run.root={tmp_path}",
    ]  # fmt: skip
    with Cluster(tmp_path_factory.mktemp("accounted"), nodes=1, accounting=True) as accounted:
        with_this_code(accounted)
        refused(submit(accounted, *words, "--account", "chemistry"), "Invalid account")
        refused(submit(accounted, *words, "--account=physics", "--qos=gold"), "Invalid qos")
        done = submit(accounted, *words, "--account", "physics", "--qos", "normal")
        assert (done.returncode, done.stderr) == (0, "")
        assert "COMPLETED" in done.stdout
        words = ["--noheader", "--parsable2", "--allocations", "--format=state,exitcode,account,qos"]
        found = accounted.run("sacct", *words, f"--jobs={number(done.stdout)}")
        assert found == "COMPLETED|0:0|physics|normal"


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """It ended with one line on stderr that says this."""
    assert done.returncode == 1, done.stdout
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    for words in expected:
        assert words in done.stderr


def digits_words(digits: Path, root: Path) -> list[str]:
    small = [*SMALL, f"data.root={digits}", f"run.root={root}"]
    return ["--config", "configs/digits.yaml", "--executor", "slurm", "--ranks-per-node", "1", *small]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--partition", "gpu"], "set --partition to one of main, short"),
        (["--nodes", "5"], "set --nodes"),
        (["--partition", "short", "--time", "11"], "set --time"),
        (["--cpus-per-rank", "17"], "lower --cpus-per-rank"),
        (["--gpus-per-node", "1"], "set --gpus-per-node"),
        (["train.device=cuda"], "train.device=cpu"),
        (["--constraint", "a100"], "--constraint"),
        (["--exclude", "node9"], "--exclude"),
        (["--slurm", "colour=red"], "colour"),
        (["--slurm", "nodes=2"], "set launch.nodes instead"),
        (["--slurm", "=2"], "key=value"),
    ],
)
def test_what_slurm_cannot_do_is_one_line_and_leaves_nothing(
    cluster: Cluster, digits: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    refused(submit(cluster, *digits_words(digits, tmp_path), *words), expected)
    cluster.await_(lambda: not cluster.run("squeue", "--noheader", "--name=digits"), 10, "no job in the queue")
    assert not list(tmp_path.rglob("code-*"))


@pytest.mark.parametrize("program", ["git", "rsync"])
def test_without_git_or_rsync_there_is_no_snapshot(
    cluster: Cluster, digits: Path, tmp_path: Path, program: str
) -> None:
    for name in {"sbatch", "srun", "scontrol", "git", "rsync"} - {program}:
        (tmp_path / name).symlink_to(shutil.which(name, path=cluster.environment["PATH"]) or "")
    done = submit(cluster, *digits_words(digits, tmp_path), PATH=str(tmp_path))
    refused(done, f"no {program} on PATH", "apt-get install git rsync")


def test_an_active_run_is_not_submitted_again(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    """Also while its job only waits, and by the local executor."""
    words = digits_words(digits, tmp_path)
    job = submitted(cluster, *words, "--slurm", "hold")
    assert f"queued  PENDING JobHeldUser, job {job}" in watched(cluster, tmp_path / "digits")
    refused(submit(cluster, *words), f"its Slurm job {job} is PENDING", f"scancel {job}")
    refused(submit(cluster, *words, "--executor", "local"), f"its Slurm job {job} is PENDING")
    cluster.run("scancel", job)


@pytest.mark.parametrize("node", ["node0", "node1"])
def test_a_node_that_does_not_see_the_run_folder_is_named(
    cluster: Cluster, digits: Path, tmp_path: Path, node: str
) -> None:
    """On the first node Slurm cannot even write the job's log."""
    (tmp_path / "runs").mkdir()
    cluster.on_node(node, "mount", "-t", "tmpfs", "none", str(tmp_path / "runs"))
    try:
        only = ["--nodes", "2", "--slurm", "nodelist=node0,node1", "--follow"]
        done = submit(cluster, *digits_words(digits, tmp_path / "runs"), *only)
    finally:
        cluster.on_node(node, "umount", str(tmp_path / "runs"))
    assert done.returncode
    (error,) = (line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert node in error
    assert str(tmp_path / "runs") in error

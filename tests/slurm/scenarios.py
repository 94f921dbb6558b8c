"""What the scenarios of test_preemption.py and test_failures.py have in common: a small run as a Slurm job, its ranks,
and its end compared to the bit with that of a run which nothing happened to.

A scenario is a function of a `Stage`. Its seconds are mostly starts of ranks, which import torch, and waits for Slurm;
so several go on side by side (conftest.py), and the summary of the tests says what each took.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster

from autodo_dist import ledger
from autodo_dist.config import Config
from autodo_dist.load_config import check_config
from autodo_dist.proof.compare import compare
from autodo_dist.proof.kill import parted

RANKS = 3
LAST = "node3"  # the node that dies: other jobs keep away from it, or hold its lock
LIMIT_S = 180.0
Event = dict[str, Any]


@dataclass
class Stage:
    """Where a scenario plays. unbroken: the folder of the run that nothing happened to; last_node: who may use LAST."""

    cluster: Cluster
    digits: Path
    root: Path
    unbroken: Future[Path]
    last_node: threading.Lock

    def submit(
        self, name: str, nodes: int = RANKS, exclude: str | None = LAST, setup: Sequence[str] = (), **train: Any
    ) -> Job:
        """The user's command: two epochs of 40 steps and a hyper pass between them, on a rank a node."""
        launch = {"executor": "slurm", "nodes": nodes, "exclude": exclude, "mem": "1500M", "cpus_per_rank": 1}
        settings = check_config(
            {
                "run": {"root": str(self.root), "name": name},
                "data": {
                    **{"root": str(self.digits), "image_size": 16, "crop": "padded"},
                    **{"crop_padding": 1, "flip": False},
                },
                "model": {"name": "convnet"},
                "optim": {"lr": 0.05, "warmup_epochs": 1},
                "train": {"epochs": 2, "batch_size": 32, "steps_per_pass": 40, "log_every": 3, "device": "cpu"} | train,
                "learn": {"augment": "per_sample", "weight": True, "soft_label": True},
                "hyper": {"start_epoch": 1, "way": "separate", "validation_every": 2},
                "checkpoint": {"every_steps": 15, "keep": 9},
                "launch": launch | {"time": "20", "setup": list(setup)},
            },
            "of the test",
        )
        file = settings.run.root / f"{name}.yaml"
        file.write_text(settings.to_yaml())
        out = self.cluster.run(sys.executable, "-m", "launcher.submit", "--config", str(file))
        return Job(self, settings, out.split("submitted Slurm job ")[1].split(",")[0])


@dataclass
class Job:
    """A run as a Slurm job."""

    stage: Stage
    settings: Config
    number: str

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.settings.folder

    def rank(self, rank: int) -> list[int]:
        """The process of a rank of the present start, then its warden's; empty before its program has begun."""
        mine = {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode()}
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if command[0] == sys.executable.encode() and b"submitit.core._submit" in command:
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    found += [pid] * (mine <= set(variables))
        return sorted(found)

    def await_step(self, steps: int) -> list[int]:
        """Wait until all ranks have done so many steps; their processes."""
        ranks: list[int] = []

        def there() -> bool:
            ranks[:] = [pid for rank in range(self.settings.launch.nodes) for pid in self.rank(rank)[:1]]
            return len(ranks) == self.settings.launch.nodes

        self.await_(there, "on its nodes")
        self.await_(lambda: all(parted(comm(pid))[1] >= steps for pid in ranks), f"at step {steps}", pause=0.01)
        return ranks

    def await_state(self, state: str) -> None:
        """Wait until Slurm says so of the job."""
        self.await_(lambda: self.state == state, state, pause=0.5)

    def await_(self, condition: Callable[[], object], what: str, seconds: float = LIMIT_S, pause: float = 0.1) -> None:
        """Wait; AssertionError with the logs if it lasts too long, or the job has come to its end."""
        begun = looked = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - looked > 2 or now - begun > seconds:
                looked, state = now, self.state
                if (state in ("FAILED", "COMPLETED") and not condition()) or now - begun > seconds:
                    raise AssertionError(f"job {self.number} is {state}, not {what}\n{self.logs()}")
            time.sleep(pause)

    @property
    def state(self) -> str:
        """What Slurm says of it."""
        return self.stage.cluster.job(self.number)["JobState"]

    def logs(self) -> str:
        """The ends of what the ranks and the batch script wrote."""
        return "\n".join(f"{it}:\n{it.read_text()[-3000:]}" for it in (self.folder / "submitit").glob("*.out"))

    def log(self, rank: int) -> str:
        """What a rank wrote, over all starts."""
        with suppress(FileNotFoundError):
            return (self.folder / f"submitit/{self.number}_{rank}_log.out").read_text()
        return ""

    def ends(self) -> list[Event]:
        """The ends of its starts so far."""
        return [it for it in ledger.read(self.folder) if it["event"] == "end"]

    def scancel(self, *words: str) -> None:
        """Cancel it, or send a signal."""
        self.stage.cluster.run("scancel", *words, self.number)

    def finish(self, *causes: str) -> list[Event]:
        """Wait for its end; equal to the unbroken run, after these causes. The ends of its starts."""
        self.await_state("COMPLETED")
        assert [it["cause"] for it in self.ends()] == [*causes, "finished"], self.logs()
        found = compare(self.stage.unbroken.result(LIMIT_S), self.folder)
        assert found.differences == ()
        assert found.digests[0] == found.digests[1]
        results = {path.name.split("_")[1] for path in (self.folder / "submitit").glob("*_result.pkl")}
        assert results == {str(rank) for rank in range(RANKS)}  # of the finished start, and no error among them
        return self.ends()


def comm(pid: int) -> str:
    """What a process shows, e.g. `task:12`; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def unbroken(stage: Stage) -> Path:
    """The run that nothing happens to."""
    job = stage.submit("unbroken")
    job.await_state("COMPLETED")
    assert [it["cause"] for it in job.ends()] == ["finished"]
    return job.folder

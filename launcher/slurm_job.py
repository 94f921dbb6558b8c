"""What Slurm says of a run's job, which the run folder names: RUN/slurm.json."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, write_json

ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
_UNSETTLED = ("None", "Priority", "Resources", "PartitionConfig")  # it may say more a moment later
_SETTLE_S = 3.0


@dataclass(frozen=True)
class Answer:
    """One job: its state and the reason for it, its nodes and the first of them, where its script runs, exit status (0
    to 255) and signal, how often it was requeued.
    """

    name: str
    state: str
    reason: str
    nodes: str
    first: str
    exit: int
    signal: int
    restarts: int

    @property
    def ended(self) -> bool:
        """Whether it has come to its end, for good or ill."""
        return self.state in ENDED

    @property
    def status(self) -> int:
        """Exit status as a shell counts it; not 0 unless the job completed."""
        return self.exit or (128 + self.signal if self.signal else int(self.state != "COMPLETED"))


def ask(number: str) -> Answer | None:
    """What the controller knows of a job; None if it has forgotten it, some minutes after its end, or is silent."""
    command = ["scontrol", "--oneliner", "show", "job", number]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found: dict[str, str] = dict(re.findall(r"(\w+)=(\S*)", said))
    if "JobState" not in found:
        return None
    exit_, signal = map(int, found["ExitCode"].split(":"))
    return Answer(
        name=found["JobName"],
        state=found["JobState"],
        reason=found["Reason"],
        nodes=found.get("NodeList", ""),
        first=found.get("BatchHost", ""),
        exit=exit_,
        signal=signal,
        restarts=int(found["Restarts"]),
    )


def record(folder: Path, number: str, name: str, logs: Path) -> None:
    """Note the run's job, its name in the queue, and where its ranks' logs are."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "slurm.json", {"job": number, "name": name, "logs": str(logs)})


def recorded(folder: Path) -> dict[str, str]:
    """What `record` noted of the run's last job; empty if there was none."""
    path = folder / "slurm.json"
    return dict(read_json(path)) if path.is_file() else {}


def refuse_if_queued(folder: Path) -> None:
    """AutodoError if the run's last job waits or runs."""
    last = recorded(folder) if shutil.which("scontrol") else {}
    job = ask(last["job"]) if last else None
    if job and not job.ended and job.name == last["name"]:  # numbers can begin anew
        number = last["job"]
        raise AutodoError(
            f"run {folder}: its Slurm job {number} is {job.state}; wait for it, or cancel it (scancel {number}), or "
            "choose another run.name"
        )


def refuse_if_hopeless(number: str) -> None:
    """Cancel a job that no node of its partition can ever take, and say why. AutodoError then."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        job = ask(number.split("_")[0])
        if job is None or job.state != "PENDING":
            return
        if job.reason not in _UNSETTLED or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if cure := _cure(job.reason):
        subprocess.run(["scancel", number.split("_")[0]], check=False, timeout=60)
        raise AutodoError(f"Slurm job {number} would wait for ever ({job.reason}) and was cancelled: {cure}")


def _cure(reason: str) -> str:
    """What to change so that a job with this reason can run; empty if waiting helps."""
    if reason == "PartitionNodeLimit":
        return "more nodes than the partition has or allows; set --nodes, or --partition (sinfo lists them)"
    if reason == "PartitionTimeLimit":
        return "longer than the partition allows; set --time, or --partition (sinfo -o '%P %l' lists them)"
    if reason == "PartitionConfig":
        return "no node of the partition is that large; lower --cpus-per-rank, --mem, --ranks-per-node or --nodes"
    if "PerJob" in reason or reason == "BadConstraints":
        return "see sacctmgr show qos, and lower --nodes, --time or --gpus-per-node"
    return ""

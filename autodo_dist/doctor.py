"""What this machine lacks: each check is one short function that returns findings, and really tries what it names.

Whatever may hang, crash or print (torch, DALI, DeepSpeed, sums over processes, Slurm) is tried in processes of its
own, under a time limit; none of them outlives its check.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from autodo_dist import nvidia_apex
from autodo_dist.errors import AutodoError
from autodo_dist.ports import PORTS, free_port

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "deepspeed", "submitit", "webdataset")
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"  # there in an editable install only
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line about one subject; `cure` is what to type or change, or empty."""

    subject: str
    status: Literal["ok", "warning", "error"]
    what: str
    cure: str = ""


def examine(root: Path) -> list[Finding]:
    """Every check of this machine, for runs below `root`. Takes 10 to 30 s: it starts real processes."""
    installed, pins = installed_versions(), pinned_versions(REQUIREMENTS)
    torch, gpus = check_torch()
    found = [check_python(), *(check_version(package, installed, pins) for package in PACKAGES), *torch]
    found.append(check_dali("cpu"))
    if gpus:
        found.append(check_dali("gpu"))
    if torch[0].status == "ok":  # else these would say the same again, more slowly
        found.append(check_sum("gloo", 2))
        if gpus:
            found.append(check_sum("nccl", gpus))
        found.append(check_deepspeed(gpus))
    return [
        *found,
        check_apex(),
        *(check_compiler(), check_ports(), check_disk(root), check_shared_memory()),
        *(check_open_files(), check_capacity(), check_slurm()),
    ]


# Python and packages


def check_python() -> Finding:
    what = f"Python {platform.python_version()} on {platform.platform(terse=True)}, {platform.machine()}"
    if sys.version_info < (3, 10):  # noqa: UP036 - a checkout on PYTHONPATH never met pip's own check
        return Finding("python", "error", f"{what}: older than 3.10", "make PYTHON=python3.11 test, or any newer one")
    if platform.system() != "Linux":
        return Finding("python", "error", f"{what}: DALI has wheels for Linux only", "use Linux, WSL or a container")
    return Finding("python", "ok", what)


def installed_versions() -> dict[str, str]:
    """Normalized name -> version of every installed distribution; the first on sys.path wins, as in an import."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        with suppress(Exception):  # a half-removed distribution has no name; what is raised depends on Python
            found.setdefault(re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower(), distribution.version)
    return found


def pinned_versions(requirements: Path) -> dict[str, str]:
    """Name -> version of the lines `name==version` without a marker; empty where the file is absent."""
    if not requirements.is_file():
        return {}
    return dict(re.findall(r"^([\w.-]+)==([^\s;#]+)[ \t]*(?:#.*)?$", requirements.read_text(), re.MULTILINE))


def check_version(package: str, installed: Mapping[str, str], pins: Mapping[str, str]) -> Finding:
    """Compare the installed version with the pinned one; DALI's wheel for another CUDA is found too."""
    pinned, have = _named(package, pins), _named(package, installed)
    if pinned in installed:
        have = pinned
    version, pin = installed.get(have, ""), pins.get(pinned, "")
    cure = f"pip install {pinned}=={pin}" if pin else f"pip install {package}"
    if not version:
        # The DDP engine works without DeepSpeed.
        return Finding(package, "warning" if package == "deepspeed" else "error", "not installed", cure)
    if not pin:
        return Finding(package, "ok", f"{version} (no requirements.txt beside the package to compare with)")
    if have != pinned or version.split("+")[0] != pin:  # 2.14.1+cpu is a build of 2.14.1
        return Finding(package, "warning", f"{have} {version}, tested with {pinned} {pin}", cure)
    return Finding(package, "ok", version)


def _named(package: str, names: Iterable[str]) -> str:
    return next((name for name in names if re.fullmatch(package.rstrip("0123456789") + r"\d*", name)), package)


def check_torch() -> tuple[list[Finding], int]:
    """Findings for torch with torchvision and for the devices, and the number of GPUs that torch can use."""
    answer = python("from autodo_dist import doctor; doctor.try_torch()", 120)
    if not answer.ok:
        return [Finding("torch + torchvision", "error", answer.text, _pip("torch", "torchvision"))], 0
    told = answer.last_json()
    built = f"built for CUDA {told['cuda']}" if told["cuda"] else "built without CUDA"
    torch = Finding("torch + torchvision", "ok", f"imported together and ran, {built}")
    gpus = [f"GPU {index}: {name}, {size / GIB:.0f} GiB" for index, (name, size) in enumerate(told["gpus"])]
    if gpus:
        return [torch, Finding("devices", "ok", "; ".join(gpus))], len(gpus)
    listed = run([["nvidia-smi", "-L"]], 20)
    if listed.ok and listed.text.strip():
        what = f"nvidia-smi lists {listed.text.strip().splitlines()[0]}, but torch ({built}) can use no GPU"
        cure = f"update the NVIDIA driver for CUDA {told['cuda']}" if told["cuda"] else _pip("torch", "torchvision")
        return [torch, Finding("devices", "warning", what, f"unset CUDA_VISIBLE_DEVICES, or {cure}")], 0
    return [torch, Finding("devices", "ok", "CPU only")], 0


def try_torch() -> None:
    """In a process of its own: import both, run an operator of torchvision, tell the devices."""
    import torch
    import torchvision

    # A torchvision built for another torch may import and yet lack its compiled operators.
    kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    assert kept.tolist() == [0]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = [[device.name, device.total_memory] for device in devices] if torch.cuda.is_available() else []
    print(json.dumps({"cuda": torch.version.cuda, "gpus": gpus}))


def check_dali(device: Literal["cpu", "gpu"]) -> Finding:
    """Decode a PNG and a JPEG with a real pipeline."""
    subject = f"DALI on {device.upper()}"
    answer = python(f"from autodo_dist import doctor; doctor.try_dali({device!r})", 120)
    if answer.ok:
        return Finding(subject, "ok", "decoded a PNG and a JPEG")
    cure = "update the NVIDIA driver; or data.device=cpu" if device == "gpu" else _pip("nvidia-dali-cuda130")
    return Finding(subject, "error", answer.text, cure)


def try_dali(device: Literal["cpu", "gpu"]) -> None:
    """In a process of its own: decode pictures made in memory; raises where their colours are wrong."""
    import numpy as np
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def
    from PIL import Image

    picture_HWC = np.full((32, 48, 3), (200, 100, 50), np.uint8)
    files = []
    for kind in ("PNG", "JPEG"):
        with io.BytesIO() as file:
            Image.fromarray(picture_HWC).save(file, kind)
            files.append(np.frombuffer(file.getvalue(), np.uint8))

    def decode() -> Any:
        encoded = fn.external_source(source=lambda: files, batch=True, dtype=types.DALIDataType.UINT8)
        place = "mixed" if device == "gpu" else "cpu"
        return fn.decoders.image(encoded, device=place, output_type=types.DALIImageType.RGB)

    # enable_conditionals rewrites the function's source, as the policies of the loader need it.
    settings: dict[str, Any] = {"batch_size": 2, "num_threads": 1, "enable_conditionals": True}
    settings["device_id"] = 0 if device == "gpu" else None
    (pictures,) = pipeline_def(**settings)(decode)().run()
    for kind, decoded in zip(("PNG", "JPEG"), pictures.as_cpu(), strict=True):
        difference = np.abs(np.asarray(decoded).astype(int) - picture_HWC).max()  # raises where the shapes differ
        if difference > (0 if kind == "PNG" else 4):
            raise ValueError(f"a {kind} was decoded to colours that are off by {difference} of 255")


def check_deepspeed(gpus: int) -> Finding:
    limit, begin = 180, time.monotonic()
    accelerator = {} if gpus else {"DS_ACCELERATOR": "cpu"}
    answer = python("import deepspeed; print(deepspeed.__version__)", limit, **accelerator)
    if answer.ok:
        return Finding("DeepSpeed", "ok", f"imported in {time.monotonic() - begin:.0f} s")
    return Finding("DeepSpeed", "warning", answer.text, f"{_pip('deepspeed')}; DDP works without it")


def check_apex() -> Finding:
    """Tell NVIDIA's apex from PyPI's, by their files: neither is imported."""
    found = nvidia_apex.find()
    if found.kind == "absent":
        return Finding("apex", "ok", f"not installed, and not needed; built from NVIDIA's source: {found.cure}")
    status: dict[str, Literal["ok", "warning", "error"]] = {"nvidia": "ok", "other": "error"}
    return Finding("apex", status.get(found.kind, "warning"), one_line(found.what), found.cure)


def check_compiler() -> Finding:
    absent = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    if absent:
        what = f"{' and '.join(absent)} not on PATH: torch.compile and DeepSpeed's kernels need it"
        return Finding("compiler", "warning", what, "sudo apt-get install build-essential")
    return Finding("compiler", "ok", f"gcc at {shutil.which('gcc')}")


# Processes that talk to each other


def check_sum(backend: Literal["gloo", "nccl"], ranks: int) -> Finding:
    """Sum over real processes of this machine; `nccl` takes one GPU for each."""
    subject, limit = f"{backend} sum", 60 if backend == "gloo" else 120
    try:
        port = free_port()
    except AutodoError as error:
        return Finding(subject, "error", str(error))
    begin = time.monotonic()
    call = "from autodo_dist import doctor; doctor.try_sum({!r}, {}, {}, {}, {})"
    answer = run([_command(call.format(backend, rank, ranks, port, limit), limit) for rank in range(ranks)], limit)
    if answer.ok:
        return Finding(subject, "ok", f"right over {ranks} process(es) in {time.monotonic() - begin:.0f} s")
    if backend == "gloo":
        cure = "export GLOO_SOCKET_IFNAME=lo for one machine, or the name of the cluster's interface (ip -br address)"
    else:
        cure = "look at nvidia-smi; in a container --shm-size=8g; in a virtual machine export NCCL_P2P_DISABLE=1"
    return Finding(subject, "error", answer.text, cure)


def try_sum(backend: str, rank: int, ranks: int, port: int, seconds: float) -> None:
    """One rank, in a process of its own. Every rank must call this: rank 0 gives 1, rank 1 gives 2, both get 3."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    values = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(values)
    wrong = (values != ranks * (ranks + 1) / 2).sum().item()
    dist.destroy_process_group()
    if wrong:
        raise ValueError(f"{wrong:.0f} of 1000 sums are wrong")


def check_ports(ports: range = PORTS, outgoing: Path = Path("/proc/sys/net/ipv4/ip_local_port_range")) -> Finding:
    """Whether ranks find a port to meet at that no outgoing connection is likely to take first."""
    span = f"{ports[0]}..{ports[-1]}"
    try:
        free_port(ports)
    except AutodoError as error:
        return Finding("ports", "error", *str(error).split("; ", 1))
    if outgoing.is_file():
        low, high = (int(word) for word in outgoing.read_text().split())
        if low <= ports[-1] and ports[0] <= high:
            what = f"{span} overlaps the outgoing ports {low}..{high}: the port of a run may be taken before it starts"
            return Finding("ports", "warning", what, 'sudo sysctl -w net.ipv4.ip_local_port_range="32768 60999"')
    return Finding("ports", "ok", f"one of {span} could be bound")


# Disk, memory, limits


def check_disk(root: Path) -> Finding:
    """Really write below `root`, or where it would be made."""
    subject, root = f"disk of {root}", root.absolute()
    place = next(folder for folder in (root, *root.parents) if os.path.exists(folder))  # Path.exists may raise
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(place).free / GIB
    except OSError as error:
        what = f"cannot write in {place}: {error.strerror}"
        return Finding(subject, "error", what, "name another folder: autodo doctor --runs FOLDER, run.root=FOLDER")
    what = f"{free:.0f} GiB free, writable" + ("" if place == root else f"; to be made in {place}")
    if free < 20:
        # 1.28 M soft labels of 1000 float32 and RMSprop's squares of them, twice while one is replaced.
        cure = "digits fit; ImageNet with a soft label per picture takes 10 GB a checkpoint: fewer checkpoint.keep"
        return Finding(subject, "warning", what, cure)
    return Finding(subject, "ok", what)


def check_shared_memory(place: Path = Path("/dev/shm")) -> Finding:
    if not place.is_dir():
        return Finding("shared memory", "warning", f"{place} is absent: NCCL needs it", "mount a tmpfs there")
    usage = shutil.disk_usage(place)
    what = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free in {place}"
    if usage.free < GIB:
        return Finding("shared memory", "warning", what, f"docker run --shm-size=8g; or remove old files in {place}")
    return Finding("shared memory", "ok", what)


def check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 4096:
        return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft}")
    what = f"up to {soft} a process: shards and connections of many ranks may need more"
    if hard == resource.RLIM_INFINITY or hard >= 4096:
        return Finding("open files", "warning", what, f"ulimit -n {65536 if hard < 0 else min(hard, 65536)}")
    return Finding("open files", "warning", what, f"ask for more than {hard} in /etc/security/limits.conf (nofile)")


def check_capacity() -> Finding:
    cores = len(psutil.Process().cpu_affinity() or ()) or psutil.cpu_count() or 1
    memory = psutil.virtual_memory()
    what = f"{cores} cores for us, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < 4 * GIB:
        return Finding("cores, memory", "warning", what, "fewer launch.ranks_per_node: each starts with about 1 GiB")
    return Finding("cores, memory", "ok", what)


def check_slurm() -> Finding:
    tools = ("sbatch", "srun", "scontrol", "sinfo")
    absent = [tool for tool in tools if shutil.which(tool) is None]
    local = "--executor local"
    if len(absent) == len(tools):
        cure = f"for a cluster: sudo apt-get install slurm-wlm; on this machine alone: {local}"
        return Finding("Slurm", "ok", "absent: runs start on this machine alone", cure)
    if absent:
        what = f"{', '.join(absent)} not on PATH"
        return Finding("Slurm", "warning", what, f"sudo apt-get install slurm-wlm; or {local}")
    answer = run([["sinfo", "--noheader", "--format=%P %D node(s)"]], 15)
    if not (answer.ok and answer.text):
        what = f"sinfo: {answer.text or 'no partition'}"
        return Finding("Slurm", "warning", what, f"systemctl status munge slurmctld slurmd; or {local}")
    return Finding("Slurm", "ok", one_line("answers: " + "; ".join(answer.text.splitlines())))


# Processes of their own


@dataclass(frozen=True)
class Answer:
    """What the first command printed, stripped; or, where one failed, why, in one line."""

    ok: bool
    text: str

    def last_json(self) -> Any:
        """The last line: libraries print above it."""
        return json.loads(self.text.splitlines()[-1])


def python(code: str, seconds: int, **environment: str) -> Answer:
    """Run code in a Python of its own."""
    return run([_command(code, seconds)], seconds, **environment)


def run(commands: Sequence[Sequence[str]], seconds: float, **environment: str) -> Answer:
    """Run the commands at once, until all have ended, one has failed or the time is over; none is left running."""
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        try:
            children = [stack.enter_context(_started(command, environment)) for command in commands]
        except OSError as error:
            return Answer(False, f"{error.filename or commands[0][0]}: {error.strerror}")
        while time.monotonic() < deadline:
            for process, _, err in children:
                if process.poll():
                    return Answer(False, _why(process.returncode, _text(err)))
            if all(process.returncode == 0 for process, _, _ in children):
                return Answer(True, _text(children[0][1]))
            time.sleep(0.05)
    return Answer(False, f"no answer within {seconds:g} s")


@contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]]:
    # Files, not pipes: nobody reads while the processes run, and a full pipe would stop them.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | dict(environment),
            start_new_session=True,  # a group of its own, so that its children go with it
        )
        try:
            yield process, out, err
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _command(code: str, seconds: int) -> list[str]:
    # The alarm ends the process in time even where this one was killed and cannot end it.
    return [sys.executable, "-c", f"import signal; signal.alarm({seconds + 5}); {code}"]


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()


def _why(returncode: int, err: str) -> str:
    """The exception of a traceback, else the last line: C++ frames may follow below the exception."""
    lines = [line for line in err.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    end = f"killed by signal {-returncode}" if returncode < 0 else f"ended with status {returncode}"
    return one_line((raised or lines)[-1]) if lines else end


def one_line(text: str, longest: int = 300) -> str:
    """Words of the text in one line, cut at `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _pip(*packages: str) -> str:
    pins = pinned_versions(REQUIREMENTS)
    names = [_named(package, pins) for package in packages]
    return "pip install " + " ".join(f"{name}=={pins[name]}" if name in pins else name for name in names)

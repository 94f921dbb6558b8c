"""`autodo doctor` on this machine, and on broken corners made for it; processes, ports and folders are real."""

from __future__ import annotations

import os
import resource
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from autodo_dist import doctor
from autodo_dist.commands.doctor import doctor as command
from autodo_dist.commands.doctor import exit_status
from autodo_dist.doctor import Finding
from autodo_dist.ports import free_port


@pytest.fixture
def leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a process that the test started, or a child of one, is alive after it."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("AUTODO_TEST_MARK", mark)  # /proc shows it for processes started from now on, not for ours
    yield
    end = time.monotonic() + 3  # a killed process may need a moment
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert marked(mark) == []


def marked(mark: str) -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("AUTODO_TEST_MARK") == mark:
                found.append(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def script(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


@pytest.mark.usefixtures("leaves_nothing")
def test_the_command_shows_every_finding_and_this_machine_has_no_error_but_the_one_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    seen: list[Finding] = []

    def examine(root: Path) -> list[Finding]:
        seen.extend(doctor.examine(root))
        return seen

    monkeypatch.setattr("autodo_dist.commands.doctor.examine", examine)
    app = typer.Typer()
    app.command()(command)
    root = tmp_path / "file" / "runs"
    result = CliRunner().invoke(app, ["--runs", str(root)], env={"COLUMNS": "500"})
    assert result.exit_code == 1, result.output
    rows = [line.split() for line in result.output.splitlines() if line.startswith("│")]
    assert [row[1:5] for row in rows if row[1] == "error"] == [["error", "│", "disk", "of"]]
    assert f"cannot write in {tmp_path / 'file'}: Not a directory" in result.output
    assert "run.root=FOLDER" in result.output
    assert [finding.subject for finding in seen if finding.status == "error"] == [f"disk of {root}"]
    subjects = [finding.subject for finding in seen]
    assert len(set(subjects)) == len(subjects)
    assert {"torch", "devices", "DALI on CPU", "gloo sum", "DeepSpeed", "apex", "ports", "Slurm"} <= set(subjects)
    for finding in seen:
        assert finding.subject in result.output
        assert "\n" not in finding.what + finding.cure
        assert finding.what
        assert finding.status == "ok" or finding.cure, finding


def test_exit_status_is_1_for_errors_only() -> None:
    fine, warning, error = Finding("a", "ok", "x"), Finding("b", "warning", "x", "y"), Finding("c", "error", "x", "y")
    assert exit_status([]) == exit_status([fine, warning]) == 0
    assert exit_status([fine, error, warning]) == 1


# Packages


def test_versions_against_the_pins(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text('# pins\ntorch==0.0.1  # old\nnumpy==1; python_version < "3"\nsubmitit==99\n-e .\n')
    pins = doctor.pinned_versions(requirements)
    assert pins == {"torch": "0.0.1", "submitit": "99"}
    installed = doctor.installed_versions()
    differs = doctor.check_version("torch", installed, pins)
    assert (differs.status, differs.cure) == ("warning", "pip install torch==0.0.1")
    assert installed["torch"] in differs.what
    assert doctor.check_version("torch", {"torch": "0.0.1+cpu"}, pins).status == "ok"
    assert doctor.check_version("submitit", {}, pins) == Finding(
        "submitit", "error", "not installed", "pip install submitit==99"
    )
    assert doctor.check_version("deepspeed", {}, pins).status == "warning"
    assert doctor.pinned_versions(tmp_path / "absent.txt") == {}
    assert doctor.check_version("torch", installed, {}).status == "ok"


def test_dali_wheel_of_another_cuda_is_found_and_differs() -> None:
    pins = {"nvidia-dali-cuda130": "2.4.0"}
    other = doctor.check_version("nvidia-dali-cuda130", {"nvidia-dali-cuda120": "2.4.0"}, pins)
    assert other.status == "warning"
    assert other.what == "nvidia-dali-cuda120 2.4.0, tested with nvidia-dali-cuda130 2.4.0"
    assert other.cure == "pip install nvidia-dali-cuda130==2.4.0"


def test_own_requirements_pin_every_checked_package() -> None:
    assert set(doctor.PACKAGES) <= set(doctor.pinned_versions(doctor.REQUIREMENTS))


def test_half_removed_distribution_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch-1.0.dist-info").mkdir()
    expected = doctor.installed_versions()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.installed_versions() == expected


def put(root: Path, *files: str) -> None:
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise SystemExit('imported')\n")


def test_apex_is_told_apart_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.path", [str(tmp_path)])
        found = doctor.check_apex()
        assert (found.status, found.cure) == ("ok", "")
        assert found.what.startswith("not installed")
    with monkeypatch.context() as patch:
        put(tmp_path / "nvidia", "apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py")
        patch.syspath_prepend(tmp_path / "nvidia")
        found = doctor.check_apex()
        assert (found.status, found.what) == ("ok", f"NVIDIA's, in {tmp_path / 'nvidia' / 'apex'}")
    with monkeypatch.context() as patch:
        put(tmp_path / "bare", "apex/__init__.py", "apex/optimizers/__init__.py")
        patch.syspath_prepend(tmp_path / "bare")
        found = doctor.check_apex()
        assert (found.status, "without its CUDA kernels" in found.what) == ("warning", True)
        assert found.cure.startswith("APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install")
    with monkeypatch.context() as patch:
        put(tmp_path / "pypi", "apex/__init__.py", "apex/forms.py", "apex/lib/__init__.py")
        metadata = tmp_path / "pypi" / "apex-0.9.10.dev0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: Pyramid toolkit\n")
        patch.syspath_prepend(tmp_path / "pypi")
        found = doctor.check_apex()
        assert found.status == "error"
        assert "0.9.10.dev0, Pyramid toolkit" in found.what
        assert found.cure.startswith("pip uninstall apex")
    with monkeypatch.context() as patch:  # the checkout of NVIDIA's source, seen from the folder beside it
        put(tmp_path / "checkout", "apex/setup.py", "apex/apex/optimizers/__init__.py")
        patch.syspath_prepend(tmp_path / "checkout")
        assert doctor.check_apex().status == "warning"


def test_compiler_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_compiler() == Finding(
        "compiler",
        "warning",
        "gcc and g++ not on PATH: torch.compile and DeepSpeed's kernels need it",
        "sudo apt-get install build-essential",
    )


NO_GPU = pytest.mark.skipif(doctor.run([["nvidia-smi", "-L"]], 20).ok, reason="this machine has a GPU")


@NO_GPU
def test_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (torch, devices), gpus = doctor.check_torch()
    assert (torch.status, devices.status, gpus) == ("ok", "warning", 0)
    assert "NVIDIA H200" in devices.what


@NO_GPU
@pytest.mark.usefixtures("leaves_nothing")
def test_gpu_checks_fail_without_a_gpu() -> None:
    for found in (doctor.check_dali("gpu"), doctor.check_sum("nccl", 1)):
        assert found.status == "error"
        assert found.cure
        assert "Error" in found.what


# Processes


@pytest.mark.usefixtures("leaves_nothing")
def test_gloo_failure_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    begin = time.monotonic()
    found = doctor.check_sum("gloo", 2)
    assert found.status == "error"
    assert "absent0" in found.what
    assert "GLOO_SOCKET_IFNAME=lo" in found.cure
    assert time.monotonic() - begin < 40  # below the limit of 60 s


@pytest.mark.usefixtures("leaves_nothing")
def test_run_ends_at_the_limit_and_takes_children_along() -> None:
    begin = time.monotonic()
    answer = doctor.run([["sh", "-c", "sleep 60 & sleep 60"], ["true"]], 0.3)
    assert answer == doctor.Answer(False, "no answer within 0.3 s")
    assert time.monotonic() - begin < 10


@pytest.mark.usefixtures("leaves_nothing")
def test_run_stops_the_rest_when_one_fails() -> None:
    begin = time.monotonic()
    answer = doctor.run([["sleep", "60"], ["sh", "-c", "echo noise; echo 'why not' >&2; exit 3"]], 50)
    assert answer == doctor.Answer(False, "why not")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('noise'); raise ValueError('two\\n  lines')", "ValueError: two"),
        ("import os; os.abort()", "killed by signal 6"),
        ("raise SystemExit(4)", "ended with status 4"),
    ],
)
def test_failures_are_one_line(code: str, text: str) -> None:
    assert doctor.python(code, 30) == doctor.Answer(False, text)


def test_run_of_an_absent_program_and_much_output() -> None:
    assert doctor.run([["/absent/program"]], 5) == doctor.Answer(False, "/absent/program: No such file or directory")
    assert len(doctor.python("print('x' * 1_000_000)", 30).text) == 1_000_000


# Ports


def test_ports_all_bound_or_one_free() -> None:
    held: list[socket.socket] = []
    try:
        start = free_block(3, held)
        found = doctor.check_ports(range(start, start + 3))
        assert (found.status, found.what) == ("error", f"ports {start} to {start + 2}: none can be bound")
        held.pop(1).close()
        assert free_port(range(start, start + 3)) == start + 1
    finally:
        for listener in held:
            listener.close()


def free_block(count: int, held: list[socket.socket]) -> int:
    """First of `count` consecutive ports that we hold from now on."""
    for start in range(12000, 13000, count):
        try:
            for port in range(start, start + count):
                held.append(socket.socket())
                held[-1].bind(("", port))
        except OSError:
            while held:
                held.pop().close()
        else:
            return start
    raise AssertionError("no three consecutive free ports")


def test_ports_that_overlap_outgoing_connections(tmp_path: Path) -> None:
    file = tmp_path / "ip_local_port_range"
    for text, status in [("32768\t60999\n", "ok"), ("1024\t65000\n", "warning"), ("19999\t30000\n", "warning")]:
        file.write_text(text)
        assert doctor.check_ports(outgoing=file).status == status
    assert doctor.check_ports(outgoing=tmp_path / "absent").status == "ok"


# Disk, memory, limits, Slurm


def test_disk_of_an_absent_root_is_that_of_its_nearest_parent(tmp_path: Path) -> None:
    found = doctor.check_disk(tmp_path / "a" / "b")
    assert found.status != "error"
    assert found.what.endswith(f"to be made in {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_cannot_be_written() -> None:
    found = doctor.check_disk(Path("/proc/runs"))  # refuses even the superuser
    assert found.status == "error"
    assert found.what.startswith("cannot write in /proc: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_disk_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in doctor.check_disk(tmp_path / "runs").what


def test_shared_memory_absent(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "shm").status == "warning"


def test_open_files_below_4096() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        found = doctor.check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.status == "warning"
    assert found.cure.startswith("ulimit -n" if hard < 0 or hard >= 4096 else "ask")


def test_slurm_absent_partial_answering_and_failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = doctor.check_slurm()
    assert absent.status == "ok"
    assert "slurm-wlm" in absent.cure
    script(tmp_path, "sinfo", "echo 'gpu* 4 node(s)'; echo 'cpu 2 node(s)'")
    assert doctor.check_slurm().what == "sbatch, srun, scontrol not on PATH"
    for name in ("sbatch", "srun", "scontrol"):
        script(tmp_path, name, "exit 1")
    assert doctor.check_slurm() == Finding("Slurm", "ok", "answers: gpu* 4 node(s); cpu 2 node(s)")
    script(tmp_path, "sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    failing = doctor.check_slurm()
    assert failing.status == "warning"
    assert "Unable to contact slurm controller" in failing.what

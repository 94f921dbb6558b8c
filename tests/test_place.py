"""A rank's place among the others, from the environment that srun or the launcher gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from autodo_dist.errors import AutodoError
from autodo_dist.parallel.comm import Place, host_of, place

TWO_NODES = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}


def with_scontrol(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin")


def test_alone_without_slurm() -> None:
    assert place({}) == Place()


def test_the_first_host_is_the_master(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_scontrol(tmp_path, "[ $3 = 'gpu[03-04]' ] && echo gpu03 && echo gpu04", monkeypatch)
    found = place(TWO_NODES | {"SLURM_JOB_NODELIST": "gpu[03-04]"})
    assert found.master is not None
    assert (found.rank, found.ranks, found.local_rank, found.master[0]) == (3, 4, 1, "gpu03")
    assert place(TWO_NODES | {"SLURM_JOB_NODELIST": "a,b"}).master[0] == "a"  # type: ignore[index]
    nodes = {"SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_JOB_NUM_NODES": "2"}
    assert [host_of(rank, 4, nodes) for rank in range(4)] == ["gpu03", "gpu03", "gpu04", "gpu04"]


@pytest.mark.parametrize("there", [False, True])
def test_a_list_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """In a container there may be no scontrol."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if there:
        with_scontrol(tmp_path, "exit 1", monkeypatch)
    environment = TWO_NODES | {"SLURM_JOB_NODELIST": "gpu[03-04]"}
    with pytest.raises(AutodoError, match=r"'gpu\[03-04\]' cannot be read by scontrol; set MASTER_ADDR"):
        place(environment)
    assert host_of(0, 4, environment) == "a node of gpu[03-04]"
    assert place(environment | {"MASTER_ADDR": "10.0.0.1"}).master[0] == "10.0.0.1"  # type: ignore[index]

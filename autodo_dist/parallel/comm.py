"""Ranks: where this process stands among them, and the few collectives that the project uses.

Environment of a rank, the same under srun and under the local launcher: SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID,
SLURM_JOB_NODELIST, SLURM_JOB_ID; MASTER_ADDR and MASTER_PORT where set, else the first host of the job and a port made
from the job's id. Without SLURM_PROCID the process is alone.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autodo_dist.errors import AutodoError
from autodo_dist.ports import PORTS

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """This process among the ranks of a run, and where they meet; `master` is None for a process alone."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    master: tuple[str, int] | None = None


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read this process's place from its environment. AutodoError names a variable that is missing or no number."""
    if "SLURM_PROCID" not in environment:
        return Place()

    def number(name: str, default: str = "") -> int:
        try:
            return int(environment.get(name, default))
        except ValueError:
            raise AutodoError(
                f"environment: {name} = {environment.get(name)!r} is no number; start ranks with srun or submit.py"
            ) from None

    rank, ranks = number("SLURM_PROCID"), number("SLURM_NTASKS")
    if ranks == 1:
        return Place()
    address = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_JOB_NODELIST", ""))
    port = number("MASTER_PORT", str(PORTS[number("SLURM_JOB_ID", "0") % len(PORTS)]))
    return Place(rank, ranks, number("SLURM_LOCALID"), (address, port))


def _first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list, e.g. gpu[03-06] -> gpu03."""
    if "[" not in nodes:
        return nodes.split(",")[0] or "127.0.0.1"
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if hosts.returncode:
        raise AutodoError(f"environment: SLURM_JOB_NODELIST = {nodes!r} cannot be read by scontrol; set MASTER_ADDR")
    return hosts.stdout.split()[0]


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, with a process group between them. Every method but `main` is a collective: every rank must
    call it, in the same order.

    On two ranks, `ranks.sum(torch.tensor(ranks.rank + 1))` is 3 on both.
    """

    rank: int
    ranks: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # None: the one of all ranks that the run began with

    def twin(self) -> Ranks:
        """The same ranks in a process group of their own, whose collectives may go on beside those of this one."""
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)  # every rank is a member
        return replace(self, group=group)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that writes the run folder."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, as a new tensor of the same shape and type."""
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in the order of ranks, on every rank; ranks may have different numbers of rows."""
        if self.ranks == 1:
            return rows
        counts = [int(count) for count in self._all_gather(torch.tensor([len(rows)], device=self.device))]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:count] for part, count in zip(self._all_gather(padded), counts, strict=True)])

    def _all_gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.ranks)]
        dist.all_gather(parts, value, group=self.group)
        return parts

    def gather(self, value: T) -> list[T]:
        """Every rank's small Python value, in the order of ranks, on every rank."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's small Python value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def exchange(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Send consecutive pieces of `rows` (lengths `sent`, one a rank); what came, in the order of ranks.

        On two ranks, sent = [1, 2] gives rank 0 the first row and rank 1 the other two.
        """
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=self.group)
        return arrived

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.group)


@contextmanager
def process_group(place: Place, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Iterator[Ranks]:
    """Join the ranks: gloo for CPU tensors, NCCL for GPU tensors. Every rank must call this.

    A process alone joins itself, so that there is one way through the code. A collective that waits longer than
    `timeout` raises on every rank.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if place.master is None:
        store: dist.Store = dist.HashStore()
    else:
        address, port = place.master
        if address in ("127.0.0.1", "localhost"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            store = dist.TCPStore(address, port, place.ranks, is_master=place.rank == 0, timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise AutodoError(
                f"rendezvous at {address}:{port}: {str(error).splitlines()[0]}; "
                "set MASTER_PORT to a free port and MASTER_ADDR to a host that every node can reach"
            ) from error
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks, timeout=timeout)
    yield Ranks(place.rank, place.ranks, device)
    # Not after an exception: a rank records why it failed before its peers see a closed connection (launcher/job.py).
    dist.destroy_process_group()

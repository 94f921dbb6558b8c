"""Ranks: where this process stands among them, and the few collectives that the project uses.

Environment of a rank, the same under srun and under the local launcher: SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID,
SLURM_JOB_NODELIST, SLURM_JOB_ID; MASTER_ADDR and MASTER_PORT where set, else the first host of the job and a port made
from the job's id. Without SLURM_PROCID the process is alone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from autodo_dist.errors import AutodoError, OutageError
from autodo_dist.ports import PORTS

T = TypeVar("T")
SAY_S = 30.0  # after which ranks that have not come are named, and again as long after that
COME_S = 600.0  # after which they are waited for no more: a cold file system may take minutes to load torch


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
    address = environment.get("MASTER_ADDR") or _hosts(environment.get("SLURM_JOB_NODELIST", ""))[0]
    port = number("MASTER_PORT", str(PORTS[number("SLURM_JOB_ID", "0") % len(PORTS)]))
    return Place(rank, ranks, number("SLURM_LOCALID"), (address, port))


def _hosts(nodes: str) -> list[str]:
    """The hosts of Slurm's compressed list, e.g. gpu[03-04] -> gpu03, gpu04."""
    if "[" not in nodes:
        return nodes.split(",") if nodes else ["127.0.0.1"]
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:  # a container may have no scontrol
        raise AutodoError(
            f"environment: SLURM_JOB_NODELIST = {nodes!r} cannot be read by scontrol; set MASTER_ADDR"
        ) from error
    return hosts.stdout.split()


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


def meet(rank: int, ranks: int, address: str, port: int) -> dist.TCPStore:
    """The store at which all ranks have met. Every rank must call this.

    Ranks that do not come are named on stderr every SAY_S; OutageError after COME_S. AutodoError for a port that cannot
    be had.
    """
    deadline = time.monotonic() + COME_S
    while True:
        try:
            store = dist.TCPStore(
                address, port, is_master=rank == 0, timeout=timedelta(seconds=SAY_S), wait_for_workers=False
            )
            break
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            reason = str(error).splitlines()[0]
            if rank == 0:
                raise AutodoError(
                    f"rendezvous at {address}:{port}: {reason}; "
                    "set MASTER_PORT to a free port and MASTER_ADDR to a host that every node can reach"
                ) from error
            complain([0], rank, ranks, deadline, f"{address}:{port} cannot be reached ({reason})")
    store.set(f"here/{rank}", socket.gethostname())
    everyone = [f"here/{other}" for other in range(ranks)]
    while True:
        try:
            store.wait(everyone, timedelta(seconds=SAY_S))
            return store
        except dist.DistStoreError:
            missing = [other for other, name in enumerate(everyone) if not store.check([name])]
            complain(missing, rank, ranks, deadline, f"{ranks - len(missing)} are at {address}:{port}")
        except dist.DistNetworkError as error:
            raise OutageError(f"rendezvous at {address}:{port}: rank 0 is gone; its log tells why") from error


def complain(missing: list[int], rank: int, ranks: int, deadline: float, what: str) -> None:
    """Say which ranks have not come, and where they should run; OutageError once the deadline has passed."""
    if not missing:
        return
    first = missing[0]
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    text = f"rendezvous: rank {first} of {ranks}{more} has not come, on {host_of(first, ranks)}; {what}"
    if time.monotonic() > deadline:
        raise OutageError(f"{text}; see its log, and whether that node is up")
    if rank in (0, min(set(range(ranks)) - set(missing))):
        print(f"{text}; waiting on", file=sys.stderr, flush=True)


def host_of(rank: int, ranks: int, environment: Mapping[str, str] = os.environ) -> str:
    """The host on which a rank should run, if ranks are dealt out node by node, as srun does by default."""
    nodes, number = environment.get("SLURM_JOB_NODELIST", ""), int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    try:
        hosts = _hosts(nodes)
    except AutodoError:
        return f"a node of {nodes}"
    return hosts[min(rank // -(-ranks // number), len(hosts) - 1)]


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
        store = meet(place.rank, place.ranks, address, port)
        store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks, timeout=timeout)
    yield Ranks(place.rank, place.ranks, device)
    # Not after an exception: a rank records why it failed before its peers see a closed connection (launcher/job.py).
    dist.destroy_process_group()

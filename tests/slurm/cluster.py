"""A real Slurm of several nodes on this machine: slurmctld, a slurmd a node, munge, all below one folder.

    with Cluster(folder) as cluster:                       # ready after one or two seconds; needs root
        cluster.run("sbatch", "--wrap", "hostname")        # PATH, SLURM_CONF and so on as the clients need them

Ports and job numbers are drawn, so that clusters can run side by side (a job's number gives its ranks' port).
A node is a mount namespace: in it the nodes' names resolve to 127.0.0.1, and by it `kill` finds what runs on the node.
Nothing outlives `stop` but the folder. `python tests/slurm/cluster.py FOLDER` runs one until Ctrl-C, to try things out.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from autodo_dist.ports import free_port

APT = "slurm-wlm munge rsync git"  # slurm-wlm: slurmctld, slurmd and the clients
APT_ACCOUNTING = "slurmdbd mariadb-server"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "rsync", "git", "unshare", "nsenter")
ACCOUNTING_PROGRAMS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db")
PORTS = range(20_000, 30_000)  # above those of the ranks, below those of outgoing connections
ENDS = (signal.SIGINT, signal.SIGTERM)
HIDDEN = ("SLURM", "SBATCH", "SQUEUE", "SINFO", "SRUN", "SUBMITIT")

CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
FirstJobId={first_job}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerNode=1000
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
MinJobAge=86400
SlurmctldTimeout=30
SlurmdTimeout={down_after}
KillWait=5
KillOnBadExit=0
UnkillableStepTimeout=60
MessageTimeout=10
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldDebug=info
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdDebug=info
SlurmdParameters=config_overrides
{accounting}
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes={names} MaxTime=10 State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=16000 State=UNKNOWN"

# submitit asks sacct; without accounting the answer is in slurmctld's memory.
SACCT = """\
#!/bin/bash
while (($#)); do [ "$1" = -j ] && ids+=${ids:+,}$2 && shift; shift; done
echo 'JobID|State|NodeList'
squeue --noheader --states=all --format='%i|%T|%N' --jobs="$ids" 2>/dev/null || true
"""

DBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={folder}/log/slurmdbd
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=root
StoragePass=none
"""


def missing(programs: tuple[str, ...] = PROGRAMS) -> str:
    """What keeps a cluster from running here, with the cure; empty if nothing does."""
    lacking = [name for name in programs if shutil.which(name, path=_path()) is None]
    if lacking:
        packages = APT if programs is PROGRAMS else APT_ACCOUNTING
        return f"no {', '.join(lacking)}; apt-get install --no-install-recommends {packages}"
    return "" if os.geteuid() == 0 else "a cluster of several nodes on one machine needs root (mount namespaces)"


class Cluster:
    """Slurm of nodes node0, node1, …; `down_after`: seconds without a word after which a node is taken as down.

    With `accounting` a job needs an account, and there is one: physics, qos normal.
    """

    def __init__(self, folder: Path, nodes: int = 4, down_after: int = 10, accounting: bool = False) -> None:
        """Nothing starts before `start`. `folder` must be new, and its path short: a socket's has 107 characters."""
        self.folder, self.accounting, self._down_after = folder, accounting, down_after
        self.nodes = [f"node{number}" for number in range(nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        ours = {key: value for key, value in os.environ.items() if not key.startswith(HIDDEN)}
        # Gloo would take the interface that the machine's own name leads to.
        self.environment: dict[str, str] = ours | {
            "PATH": f"{folder}/bin:{_path()}",
            "SLURM_CONF": f"{folder}/slurm.conf",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def __enter__(self) -> Cluster:
        """Start; what came up is stopped again if the rest does not."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """From nothing to nodes that run a job. RuntimeError names the log of what does not come up."""
        self._write()
        self._munge()
        if self.accounting:
            self._database()
        self._daemon("slurmctld", "slurmctld", "-D")
        for name in self.nodes:
            self.start_node(name)
        self.await_(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), 60, "nodes")
        self.run("srun", f"--nodes={len(self.nodes)}", "--mem=1", "--job-name=selftest", "true", timeout=60)

    def stop(self) -> None:
        """End every job, then every process that was started, by its number."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired, RuntimeError):
                self.run("scancel", "--user=root", "--full", check=False, timeout=10)
                self.await_(lambda: not self.run("squeue", "--noheader", check=False, timeout=5), 15, "end of jobs")
        for name in self.nodes:
            self.kill_node(name)
        for daemon in reversed(list(self._daemons.values())):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def run(self, *command: str, check: bool = True, timeout: float = 120, **variables: str) -> str:
        """A command with the cluster's environment: its standard output. RuntimeError with both outputs if it fails."""
        done = subprocess.run(
            command,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """State of each node, e.g. idle, allocated, down*."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False)
        return dict(line.split() for line in lines.splitlines())

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job: JobState, ExitCode, Restarts, Reason, NodeList and so on."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_state(self, number: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Wait until the job is in one of the states; what `job` says then."""
        self.await_(lambda: self.job(number)["JobState"] in states, seconds, f"job {number} {' or '.join(states)}")
        return self.job(number)

    def await_(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until the condition holds; RuntimeError after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            for name, daemon in self._daemons.items():
                if daemon.poll() not in (None, -signal.SIGKILL):
                    raise RuntimeError(f"{name} ended with {daemon.returncode}: {self._log(name).read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not within {seconds} s; logs in {self.folder / 'log'}")
            time.sleep(0.1)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, in a new mount namespace where all nodes' names resolve."""
        bind = f"mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -N {name}"
        self._daemon(name, "unshare", "--mount", "--propagation=private", "sh", "-c", bind)

    def kill_node(self, name: str) -> None:
        """What pulling the plug does: SIGKILL to the node's slurmd, step daemons and tasks."""
        for pid in self.processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if daemon := self._daemons.pop(name, None):
            daemon.wait()

    def processes(self, name: str) -> list[int]:
        """Everything that runs on a node, its slurmd first."""
        if name not in self._daemons or self._daemons[name].poll() is not None:
            return []
        slurmd = self._daemons[name].pid
        there, here = _namespace(slurmd), _namespace(os.getpid())
        if there == here:  # unshare has not come to it yet
            return [slurmd]
        others = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
        return [slurmd, *(pid for pid in others if pid != slurmd and _namespace(pid) == there)]

    def on_node(self, name: str, *command: str) -> None:
        """Run a command in the node's mount namespace, e.g. to hide a folder under an empty file system."""
        self.run("nsenter", f"--target={self._daemons[name].pid}", "--mount", *command)

    def _write(self) -> None:
        for part in ("bin", "log", "state", *self.nodes):
            (self.folder / part).mkdir(parents=True)
        host, ports = socket.gethostname().split(".")[0], _ports(len(self.nodes) + 3)
        self._dbd_port, self._sql_port, *ports = ports
        accounting = "AccountingStorageType=accounting_storage/none"
        if self.accounting:
            accounting = (
                "AccountingStorageType=accounting_storage/slurmdbd\n"
                f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={self._dbd_port}\n"
                f"AccountingStoragePass={self.folder}/munge.socket\n"  # so it is called
                "AccountingStorageEnforce=associations,qos"
            )
        text = CONF.format(
            name="autodo",
            host=host,
            folder=self.folder,
            port=ports.pop(),
            first_job=random.randrange(1000, 60_000_000),
            down_after=self._down_after,
            accounting=accounting,
            names=",".join(self.nodes),
            nodes="\n".join(
                NODE.format(name=name, host=host, port=port) for name, port in zip(self.nodes, ports, strict=True)
            ),
        )
        (self.folder / "slurm.conf").write_text(text)
        names = "".join(f"127.0.0.1 {name}\n" for name in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        if not self.accounting:
            (self.folder / "bin/sacct").write_text(SACCT)
            (self.folder / "bin/sacct").chmod(0o755)
        # The folder of pytest is its user's alone; slurmd and munge want a way through.
        self.folder.chmod(0o755)

    def _munge(self) -> None:
        key, socket_ = self.folder / "munge.key", self.folder / "munge.socket"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": key, "socket": socket_, "pid-file": self.folder / "munge.pid"}
        files |= {"seed-file": self.folder / "munge.seed", "log-file": self.folder / "log/munged.log"}
        options = [f"--{option}={file}" for option, file in files.items()]
        # --force: it would not lie in a folder of pytest's, through which other users have no way.
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=4", *options)
        self.await_(lambda: self.run("munge", "--no-input", f"--socket={socket_}", check=False), 20, "munge")

    def _database(self) -> None:
        """MariaDB and slurmdbd. The cluster is added before slurmctld starts: both would make its tables."""
        data = self.folder / "mysql"
        self.run(
            "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
            "--auth-root-authentication-method=normal",
        )  # fmt: skip
        self._daemon(
            "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-grant-tables",
            f"--socket={self.folder}/mysql.socket", "--bind-address=127.0.0.1", f"--port={self._sql_port}",
            "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        self.await_(lambda: _listens(self._sql_port), 30, "mariadbd")
        conf = self.folder / "slurmdbd.conf"
        conf.touch(0o600)
        host = socket.gethostname().split(".")[0]
        conf.write_text(DBD.format(folder=self.folder, host=host, port=self._dbd_port, database=self._sql_port))
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self.await_(lambda: _listens(self._dbd_port), 30, "slurmdbd")
        for words in ("cluster autodo", "account physics", "user root account=physics"):
            self.run("sacctmgr", "--immediate", "add", *words.split(), timeout=60)

    def _daemon(self, name: str, *command: str) -> None:
        with self._log(name).open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours; `stop` ends the daemons in their order
            )

    def _log(self, name: str) -> Path:
        return self.folder / "log" / name


def _path(environment: Mapping[str, str] = os.environ) -> str:
    return f"{environment['PATH']}:/usr/sbin:/sbin"


def _ports(count: int) -> list[int]:
    """Different free ports. Two clusters that start at the same moment draw the same one once in a thousand times."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port(PORTS))
    return list(found)


def _namespace(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt")
    return ""


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def main() -> None:
    """Run a cluster until Ctrl-C, or SIGTERM."""
    with Cluster(Path(sys.argv[1]).absolute(), accounting="--accounting" in sys.argv) as cluster:
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf PATH={cluster.folder}/bin:$PATH GLOO_SOCKET_IFNAME=lo")
        print(cluster.run("sinfo", "--Node", "--long"), flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        signal.sigwait(ENDS)


if __name__ == "__main__":
    main()

"""The cluster of these tests is a real one: jobs over four nodes, a node that dies, two clusters side by side."""

from __future__ import annotations

from pathlib import Path

from cluster import Cluster


def test_a_job_runs_on_four_nodes_whose_names_resolve(cluster: Cluster) -> None:
    said = cluster.run("srun", "--nodes=4", "--mem=1", "sh", "-c", "getent ahostsv4 $SLURMD_NODENAME | head -1")
    assert [line.split()[0] for line in said.splitlines()] == ["127.0.0.1"] * 4


def test_a_dead_node_ends_its_tasks_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    wrap = f"srun sh -c 'touch {tmp_path}/$SLURMD_NODENAME; sleep 300'"
    job = cluster.run("sbatch", "--parsable", "--nodes=4", "--mem=1", f"--output={tmp_path}/log", f"--wrap={wrap}")
    cluster.await_(lambda: len(list(tmp_path.glob("node*"))) == 4, 20, "tasks")
    assert len(cluster.processes("node2")) > 2
    cluster.kill_node("node2")
    assert cluster.processes("node2") == []
    cluster.run("scancel", job)
    cluster.start_node("node2")
    cluster.await_(lambda: set(cluster.states().values()) == {"idle"}, 60, "four idle nodes")


def test_another_cluster_beside_it_knows_nothing_of_it(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.run("sbatch", "--parsable", "--mem=1", "--output=/dev/null", "--hold", "--wrap=true")
    with Cluster(tmp_path / "second", nodes=1) as second:
        assert second.states() == {"node0": "idle"}
        assert second.run("squeue", "--noheader") == ""
    assert job in cluster.run("squeue", "--noheader")
    cluster.run("scancel", job)

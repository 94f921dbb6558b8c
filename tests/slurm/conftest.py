"""The project's own Slurm for the tests of this folder (cluster.py: what it is, how to try it by hand).

    def test_it(cluster: Cluster, tmp_path: Path) -> None:
        done = cluster.run("python", "launcher/submit.py", …)   # RuntimeError if it fails; the cluster's environment
        cluster.await_state(job, "COMPLETED")                   # asks scontrol; `cluster.job(job)` gives its fields
        cluster.kill_node("node2"); cluster.start_node("node2") # a node that dies, and comes back

One cluster serves the whole session: a test ends its jobs, and starts again each node that it killed. For your own
subprocesses: `cluster.environment`. Without Slurm the tests are skipped with the apt line, or fail where
AUTODO_REQUIRE_SLURM=1 is set.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster import PROGRAMS, Cluster, missing
from scenarios import Stage, unbroken

Scenario = Callable[[Stage], None]
ROOT = Path(__file__).parents[2]


def require(programs: tuple[str, ...] = PROGRAMS) -> None:
    """Skip the test where these are not installed, or fail it where they must be."""
    why = missing(programs)
    if why and os.environ.get("AUTODO_REQUIRE_SLURM") == "1":
        pytest.fail(f"AUTODO_REQUIRE_SLURM=1: {why}")
    if why:
        pytest.skip(f"Slurm: {why}")


def with_this_code(cluster: Cluster) -> Cluster:
    """Have the cluster's jobs find this checkout's code, whatever is installed."""
    python = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    cluster.environment["PYTHONPATH"] = python
    return cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes, node0 to node3, of sixteen CPUs each by name; partitions main and short (10 minutes at most)."""
    require()
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield with_this_code(cluster)


AT_ONCE = 3  # scenarios; each has three ranks
TOOK: dict[str, float] = {}  # seconds by scenario


@pytest.fixture(scope="session")
def side_by_side(
    request: pytest.FixtureRequest, cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Scenario], None]]:
    """Waits for the end of a scenario (scenarios.py). All that were chosen are played, AT_ONCE side by side."""
    chosen = [item.callspec.params.get("scenario") for item in request.session.items if hasattr(item, "callspec")]
    root = tmp_path_factory.mktemp("scenarios")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        stage = Stage(cluster, digits, root, Future(), threading.Lock())
        futures = {it: pool.submit(play, it, stage) for it in [alone, *filter(None, chosen)]}
        yield lambda scenario: futures[scenario].result()
        pool.shutdown(cancel_futures=True)


def alone(stage: Stage) -> None:
    """The run that nothing happens to, for the others to compare theirs with."""
    try:
        stage.unbroken.set_result(unbroken(stage))
    except BaseException as error:
        stage.unbroken.set_exception(error)


def play(scenario: Scenario, stage: Stage) -> None:
    """Play a scenario, and note its seconds."""
    begun = time.monotonic()
    scenario(stage)
    TOOK[scenario.__name__] = time.monotonic() - begun


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what each scenario took, beside the others."""
    if TOOK:
        said = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in TOOK.items())
        terminalreporter.write_line(f"Slurm scenarios, {AT_ONCE} at once: {said}")

"""Fixtures that many tests share: packed digits, and a pool of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RankPool

# Tensors are small here, and cores shared with ranks and other workers: a second thread would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The console scripts of the environment that runs the tests.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where torch finds none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """A run that failed in this process keeps its process group, as a rank must; the next test needs none."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data, packed by the command."""
    root = tmp_path_factory.mktemp("data") / "digits"
    subprocess.run(["autodo", "pack", "digits", str(root)], check=True, capture_output=True)
    return root

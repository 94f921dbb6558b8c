"""Fixtures that many tests share: packed digits, and a pool of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RankPool

# The console scripts of the environment that runs the tests.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


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

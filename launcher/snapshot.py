"""The code of a Slurm job, as it was when the job was submitted: later edits do not reach a job that waits or goes on.

A checkout is copied to RUN/code-…: the files that git knows, with changes that are not committed. Installed packages
(no git) do not change under a job and are used where they are.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from submitit.helpers import RsyncSnapshot

from autodo_dist.errors import AutodoError, one_line

ROOT = Path(__file__).resolve().parent.parent
START = "launcher/in_snapshot.py"


def take(folder: Path) -> Path | None:
    """Copy this checkout to a new folder below `folder`; None where the code is an installed package.

    AutodoError if git or rsync is missing or fails.
    """
    if not (ROOT / ".git").exists():
        return None
    if missing := [program for program in ("git", "rsync") if shutil.which(program) is None]:
        raise AutodoError(
            f"snapshot of {ROOT}: no {' and no '.join(missing)} on PATH; install them (apt-get install git rsync), "
            "or install the project as a package"
        )
    snapshot = folder.absolute() / time.strftime("code-%Y%m%d-%H%M%S")
    try:
        # With its last commit, so that a run can say which one it is.
        _git("clone", "--quiet", "--depth=1", f"file://{ROOT}", str(snapshot))
        with RsyncSnapshot(snapshot, ROOT):
            pass
    except subprocess.CalledProcessError as error:
        shutil.rmtree(snapshot, ignore_errors=True)
        said = one_line(error.stderr) if error.stderr else f"{error.cmd[0]} ended with status {error.returncode}"
        raise AutodoError(f"snapshot of {ROOT}: {said}; mend the checkout (git status)") from error
    if unknown := _git("ls-files", "--others", "--exclude-standard", "--", "autodo_dist", "launcher").split():
        print(f"warning: not in the job's copy of the code, as git does not know them: {', '.join(unknown)}")
    return snapshot


def python(snapshot: Path | None) -> str:
    """The shell command in place of `python` that runs the snapshot's code."""
    words = [sys.executable] if snapshot is None else [sys.executable, "-u", str(snapshot / START)]
    return shlex.join(words)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

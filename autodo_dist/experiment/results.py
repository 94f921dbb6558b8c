"""Results of trials: a JSON object a line, appended whole and for good; and who is at work on which.

    docs/results/NAME.jsonl          a line for every finished trial; of two lines for one, the last counts
    docs/results/NAME.0.jsonl …      lines of the tasks of a Slurm array, read together with it
    docs/results/.NAME.jsonl.claims  while runners are at work: a file that each job's process holds a lock on

Locks are flock's: they end with the process that holds them, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from autodo_dist.errors import AutodoError
from autodo_dist.experiment.plan import Budget, Key, Trial


class Line(BaseModel):
    """What came of a trial. Errors are in % of the test part; None where there is nothing to know.

    epochs: trained in all; settings: words over the experiment's config. data: checksum of the packed data set, 16
    digits. best_test_error: of the epoch that is best on test. auroc: of wrong train labels by the learnt score; right:
    share of train samples whose suggested label is the true one. seconds: of training, without start and evaluations.
    flops: of all task and hyper steps. curve: epochs and test error of each evaluation, of forks and their sources.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    experiment: str
    method: str
    cell: str
    seed: int
    budget: Budget
    epochs: int
    settings: tuple[str, ...]
    rival: str = ""
    options: dict[str, float] = {}
    digest: str
    data: str
    commit: str | None
    test_error: float
    best_test_error: float
    auroc: float | None = None
    right: float | None = None
    seconds: float
    flops: float
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def key(self) -> Key:
        """What names the trial in an experiment."""
        return self.method, self.cell, self.seed, self.budget


@dataclass(frozen=True)
class Standing:
    """Which trials are done, by their lines; which have only lines of other settings, or of another data set; which
    have none.
    """

    done: dict[Key, Line]
    other: list[Trial]
    missing: list[Trial]


def standing(trials: Sequence[Trial], lines: Iterable[Line], data: Mapping[str, str]) -> Standing:
    """What the lines say of the trials. data: checksum of each data.root; of one that is not there any will do."""
    known: dict[tuple[str, Key], list[Line]] = {}
    for line in lines:
        known.setdefault((line.experiment, line.key), []).insert(0, line)  # the newest first
    done, other, missing = dict[Key, Line](), list[Trial](), list[Trial]()
    for trial in trials:
        its = [line for line in known.get((trial.experiment, trial.key), ()) if line.digest == trial.digest]
        wanted = data.get(trial.config.data.root)
        if fitting := [line for line in its if wanted in (None, line.data)]:
            done[trial.key] = fitting[0]
        else:
            (other if (trial.experiment, trial.key) in known else missing).append(trial)
    return Standing(done, other, missing)


def read_all(results: Path) -> list[Line]:
    """The lines of a results file and of its Slurm tasks' files. AutodoError for one that is no result."""
    task = re.compile(re.escape(results.stem) + r"\.(\d+)" + re.escape(results.suffix))
    tasks = sorted((int(found[1]), path) for path in results.parent.glob("*") if (found := task.fullmatch(path.name)))
    return [line for path in (results, *(path for _, path in tasks)) for line in read(path)]


def read(file: Path) -> list[Line]:
    """The lines of a file, but for a last one that is broken: it is being written, or its writer was killed."""
    try:
        *whole, _ = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AutodoError(f"results {file}: cannot be read ({error.strerror})") from error
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            found.append(Line.model_validate_json(line))
        except ValidationError as error:
            fault = error.errors()[0]
            what = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ")[:120]
            raise AutodoError(f"results {file}, line {number}: no result ({what}); delete that line") from error
    return found


def append(file: Path, line: Line) -> None:
    """Add a line, whole and on the disk; what a killed writer left of another is cut off before."""
    with _locked(file) as handle:
        _mend(handle)
        data = line.model_dump_json(exclude_defaults=True).encode() + b"\n"
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)


def mend(file: Path) -> bool:
    """Cut off a last line that is broken, or end one that lacks no more than that; whether there was any."""
    if not file.is_file():
        return False
    with _locked(file) as handle:
        return _mend(handle)


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """The file, opened for appending, with its lock held. AutodoError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)
    except OSError as error:
        raise AutodoError(f"results {file}: cannot be written ({error.strerror}); set --results") from error


def _mend(handle: int) -> bool:
    size = os.lseek(handle, 0, os.SEEK_END)
    end = os.pread(handle, size, 0)
    start = end.rfind(b"\n") + 1
    if start == size:
        return False
    try:
        Line.model_validate_json(end[start:])
    except ValidationError:
        os.ftruncate(handle, start)
    else:
        os.write(handle, b"\n")
    return True


@contextmanager
def claimed(results: Path, name: str) -> Iterator[bool]:
    """Whether this process has the job of that name for the block: no other process has it then.

    AutodoError if the file system has no locks.
    """
    path = _claims(results) / f"{name}.lock"
    try:
        handle = _claim(path)
    except OSError as error:
        raise AutodoError(f"{path}: cannot be locked ({error.strerror}); set --results elsewhere") from error
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


def _claim(path: Path) -> int | None:
    """The lock's file, with the lock held; None if another process holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the last runner to end removed the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # its holder removed it in between


def forget_claims(results: Path) -> None:
    """Remove the files of claims that nobody holds, as killed processes leave them, and their folder if it is empty."""
    with suppress(OSError):
        for path in _claims(results).glob("*.lock"):
            with claimed(results, path.stem):
                pass
        _claims(results).rmdir()


def _claims(results: Path) -> Path:
    return results.with_name(f".{results.name}.claims")

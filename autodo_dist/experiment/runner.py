"""An experiment's trials made on this machine: those that are not done, or this task's share of them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from autodo_dist.data.manifest import read_manifest
from autodo_dist.experiment import pool, results
from autodo_dist.experiment.plan import Experiment, Key, Trial, jobs, plan
from autodo_dist.experiment.results import Line, Standing
from autodo_dist.experiment.worker import Place, Said
from autodo_dist.run_folder import git_commit


@dataclass(frozen=True)
class Request:
    """What is asked for. extra, seeds: as `plan` takes them; share: (k, n) for the k-th of n tasks, from 0.

    processes: that make trials at the same time.
    """

    experiment: Experiment
    extra: tuple[str, ...]
    seeds: int | None
    results: Path
    root: Path
    processes: int
    keep: bool = False
    share: tuple[int, int] | None = None

    @property
    def file(self) -> Path:
        """Where results are written to."""
        return self.results if self.share is None else task_file(self.results, self.share[0])


@dataclass
class Tally:
    """How many trials came to what."""

    total: int
    counts: dict[str, int] = field(default_factory=dict)

    def say(self, said: Said) -> None:
        """Count what became of a trial, and tell."""
        if said.kind == "begun":
            return
        self.counts[said.kind] = self.counts.get(said.kind, 0) + 1
        if said.kind == "failed":
            _tell(f"failed: {said.trial}: {said.text}")
        elif said.line is not None:
            line = said.line
            _tell(f"{self.counts['done']} of {self.total}: {said.trial}: {line.test_error:.2f} %, {line.seconds:.1f} s")

    @property
    def failed(self) -> int:
        """Trials that failed."""
        return self.counts.get("failed", 0)


def task_file(file: Path, task: int) -> Path:
    """Where a task of an array writes its results: NAME.K.jsonl."""
    return file.with_name(f"{file.stem}.{task}{file.suffix}")


def run(request: Request) -> Tally:
    """Make what is not done, and say on stderr what was found and what becomes of each trial.

    AutodoError for what is wrong with the experiment, before any trial is made.
    """
    trials = plan(request.experiment, request.extra, request.seeds)
    if request.share is not None:
        trials = share(trials, *request.share)
    data = checksums(trials)
    results.mend(request.file)
    found = results.standing(trials, results.read_all(request.results), data)
    todo = [job for job in jobs(trials) if any(trial.key not in found.done for trial in job)]
    check_rivals([trial for job in todo for trial in job])
    _tell(f"{request.experiment.name}: {describe(found)}")
    tally = Tally(len(found.other) + len(found.missing))
    if not todo:
        return tally
    commit = git_commit(besides=request.results.parent)
    place = Place(request.root, request.results, request.file, request.keep, data, commit)
    try:
        pool.run(todo, place, request.processes, tally.say)
    finally:
        results.forget_claims(request.results)
        _remove_if_empty(request.root)
    if elsewhere := tally.counts.get("elsewhere"):
        _tell(f"{elsewhere} trials are another runner's, which is at work on them")
    return tally


def share(trials: Sequence[Trial], task: int, tasks: int) -> list[Trial]:
    """Every tasks-th job from number `task` on, so that each task has its part of every cell and seed."""
    return [trial for job in jobs(trials)[task::tasks] for trial in job]


def checksums(trials: Sequence[Trial]) -> dict[str, str]:
    """16 digits of the checksum of each packed data set, by data.root."""
    return {root: read_manifest(root).checksum[:16] for root in {trial.config.data.root for trial in trials}}


def check_rivals(trials: Sequence[Trial]) -> None:
    """AutodoError for a rival that there is not, or an option or value that it does not take."""
    wanted = {(trial.rival, tuple(trial.options.items())) for trial in trials if trial.rival}
    if wanted:
        from autodo_dist.experiment import rivals  # imports torch

        for name, options in sorted(wanted):
            rivals.choose(name, dict(options))


def describe(found: Standing) -> str:
    """What is done and what is to do, in a line."""
    todo = len(found.other) + len(found.missing)
    text = f"{len(found.done)} of {len(found.done) + todo} trials found, {todo} to do"
    other = f", {len(found.other)} of them made with other settings or data before, and now again"
    return text + (other if found.other else "")


def newest(request: Request) -> Mapping[Key, Line]:
    """The lines of the trials as experiment and data sets are now; those of any data set where it is not here."""
    trials = plan(request.experiment, request.extra, request.seeds)
    here = [trial for trial in trials if (Path(trial.config.data.root) / "manifest.json").is_file()]
    return results.standing(trials, results.read_all(request.results), checksums(here)).done


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt for the block, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

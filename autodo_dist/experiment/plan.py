"""What an experiment is: a yaml file of methods and cells (data settings), and the trainings that they make.

A trial is one training: a method in a cell, with a seed, under a budget. Its digest names the settings that its numbers
depend on, so that a trial which is done is known again (results.py).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator

from autodo_dist.config import FREE_AT_FORK, FREE_AT_RESUME, Config, Section, differences, settings, short
from autodo_dist.errors import AutodoError, one_line
from autodo_dist.load_config import load_config

Budget = Literal["epochs", "flops"]
Key = tuple[str, str, int, Budget]  # method, cell, seed, budget
Words = tuple[str, ...]

# Where a run is and what it writes. run.fork is in a digest as the trial forked, data.split as what the file holds.
_NOT_NUMBERS = (*FREE_AT_RESUME, "run.fork")


class Fork(Section):
    method: str = Field(description="the method whose run is forked; it learns nothing")
    epoch: int = Field(ge=1, description="E: epochs of that run before the fork")


class Method(Section):
    settings: Words = Field((), description="settings of the trainer, key=value, over those of experiment and cell")
    ours: bool = Field(False, description="the method that the others are compared with; one")
    rival: str = Field("", description="a loop of autodo_dist/experiment/rivals in the trainer's place; empty: none")
    options: dict[str, float] = Field({}, description="options of the rival")
    fork: Fork | None = Field(None, description="start from a run of another method, after some epochs")

    @model_validator(mode="after")
    def _one_kind(self) -> Method:
        if self.rival and (self.fork or self.ours):
            raise ValueError("a rival is neither ours nor a fork; leave out one of them")
        if self.fork and self.ours:
            raise ValueError("a fork is not ours; leave out one of them")
        if self.options and not self.rival:
            raise ValueError("options are a rival's; name it by rival, or leave them out")
        return self


class Experiment(Section):
    name: str = Field(pattern=r"^[\w.-]+$", description="names results and run folders")
    config: Path = Field(description="settings that all runs share; relative to this file")
    settings: Words = Field((), description="key=value, over that file")
    seeds: int = Field(ge=1, description="seeds 0 to this, less one: of split, distortion, start weights and order")
    cells: Annotated[dict[str, Words], Field(min_length=1)] = Field(description="data settings by name")
    methods: Annotated[dict[str, Method], Field(min_length=1)] = Field(description="by name")
    budgets: tuple[Budget, ...] = Field(
        ("epochs",), min_length=1, description="epochs: as set; flops: epochs scaled so that FLOPs equal ours"
    )
    best_epoch: bool = Field(False, description="show the best epoch on test, too, as the paper's tables do")

    @model_validator(mode="after")
    def _one_is_ours(self) -> Experiment:
        ours = [name for name, method in self.methods.items() if method.ours]
        if len(ours) != 1:
            raise ValueError(f"{len(ours)} methods are ours ({', '.join(ours) or 'none'}); set ours: true for one")
        for name, method in self.methods.items():
            source = self.methods.get(method.fork.method) if method.fork else None
            if method.fork and "epochs" not in self.budgets:
                raise ValueError(f"methods.{name}.fork: forks have the epochs as set; add epochs to budgets")
            if method.fork and (source is None or source.rival or source.fork):
                raise ValueError(f"methods.{name}.fork.method = {method.fork.method!r}: not a trainer's run among them")
        return self

    @property
    def ours(self) -> str:
        """The method that is compared."""
        return next(name for name, method in self.methods.items() if method.ours)

    @property
    def rivals(self) -> list[str]:
        """The methods that ours is compared with; its own forks are not among them."""
        return [name for name, method in self.methods.items() if not method.ours and method.fork is None]


@dataclass(frozen=True)
class Trial:
    """One training. config: its settings at the epochs as set; ours: those of our method in the same cell and seed.

    source, epoch: the trial that a fork starts from, and after how many epochs.
    """

    experiment: str
    method: str
    cell: str
    seed: int
    budget: Budget
    words: Words
    config: Config
    ours: Config
    rival: str = ""
    options: Mapping[str, float] = field(default_factory=dict)
    source: Trial | None = None
    epoch: int = 0

    @property
    def key(self) -> Key:
        """What names it in an experiment."""
        return self.method, self.cell, self.seed, self.budget

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for all that its numbers depend on, but for code and pictures."""
        facts: dict[str, Any] = {"settings": numbers(self.config)}
        if files := {name: _sha256(file) for name, file in _files(self.config).items()}:
            facts |= {"files": files}
        if self.rival:
            facts |= {"rival": self.rival, "options": dict(self.options)}
        if self.source is not None:
            facts |= {"fork": [self.source.digest, self.epoch]}
        if self.budget == "flops":
            facts |= {"flops": numbers(self.ours)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Of its run folder and log: readable, and no other trial's."""
        which = hashlib.sha256(json.dumps([*self.key, self.digest]).encode()).hexdigest()[:8]
        words = [self.method, self.cell, f"seed{self.seed}", *(["flops"] if self.budget == "flops" else [])]
        return "-".join([*(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.") for word in words), which])

    def __str__(self) -> str:
        same = ", same FLOPs" if self.budget == "flops" else ""
        return f"{self.method}; {self.cell}; seed {self.seed}{same}"


def read_experiment(file: Path) -> Experiment:
    """The experiment that a yaml file describes; AutodoError with one line for what is wrong there."""
    if not file.is_file():
        raise AutodoError(f"experiment {file}: no such file; see configs/experiments")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, OSError) as error:
        raise AutodoError(f"experiment {file}: {one_line(error)}; mend the yaml") from error
    try:
        found = Experiment.model_validate(tree)
    except ValidationError as error:
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise AutodoError(f"experiment {file}: {_explain(error.errors()[0])}{more}") from error
    return found.model_copy(update={"config": file.parent / found.config})


def _explain(error: Any) -> str:
    """One fault of a file, in words."""
    place = ".".join(map(str, error["loc"]))
    known = [name for section in (Experiment, Method, Fork) for name in section.model_fields]
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key {place}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
    if error["type"] == "missing":
        return f"{place} is missing; see configs/experiments"
    said = error["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    return f"{place}: {said}" if error["type"] == "value_error" else f"{place} = {short(repr(error['input']))}: {said}"


def plan(experiment: Experiment, extra: Sequence[str] = (), seeds: int | None = None) -> list[Trial]:
    """Every trial, seed by seed, so that a table of half of them compares like with like.

    extra: settings over all others; seeds: in place of the file's. AutodoError names method and cell of settings that
    are not right.
    """
    cells = {
        cell: {method: _config(experiment, cell, method, extra) for method in experiment.methods}
        for cell in experiment.cells
    }
    return [
        trial
        for seed in range(experiment.seeds if seeds is None else seeds)
        for cell, configs in cells.items()
        for trial in _trials(experiment, cell, seed, configs, extra)
    ]


def _trials(
    experiment: Experiment, cell: str, seed: int, configs: Mapping[str, Config], extra: Sequence[str]
) -> Iterator[Trial]:
    """The trials of a cell and a seed, in the order of the methods, those of the epochs as set first."""
    methods, found = experiment.methods, dict[str, Trial]()
    for name in sorted(methods, key=lambda name: methods[name].fork is not None):  # a source before its forks
        method, fork = methods[name], methods[name].fork
        trial = Trial(
            experiment=experiment.name,
            method=name,
            cell=cell,
            seed=seed,
            budget="epochs",
            words=_words(experiment, cell, name, extra),
            config=seeded(configs[name], seed),
            ours=seeded(configs[experiment.ours], seed),
            rival=method.rival,
            options=method.options,
        )
        found[name] = trial if fork is None else _forked(trial, found[fork.method], fork.epoch)
    for name in methods:
        if "epochs" in experiment.budgets or name == experiment.ours:
            yield found[name]
    if "flops" in experiment.budgets:
        yield from (replace(found[name], budget="flops") for name in experiment.rivals)


def _forked(trial: Trial, source: Trial, epoch: int) -> Trial:
    """The trial as a fork. AutodoError if it cannot be one of that run."""
    what = f"experiment {trial.experiment}, methods.{trial.method}.fork"
    if source.config.learn.anything:
        raise AutodoError(f"{what}: {source.method} learns hyperparameters itself; fork a method that learns none")
    if changed := differences(source.config, trial.config, FREE_AT_FORK):
        raise AutodoError(f"{what}: other settings than {source.method}'s ({'; '.join(changed)}); take those")
    if epoch >= trial.config.train.epochs:
        raise AutodoError(f"{what}: epoch = {epoch}: not below train.epochs = {trial.config.train.epochs}; lower it")
    return replace(trial, source=source, epoch=epoch)


def _words(experiment: Experiment, cell: str, method: str, extra: Sequence[str]) -> Words:
    """The settings over the experiment's config, from the general to the particular."""
    return (*experiment.settings, *experiment.cells[cell], *experiment.methods[method].settings, *extra)


def _config(experiment: Experiment, cell: str, method: str, extra: Sequence[str]) -> Config:
    """The settings of a method in a cell, for one rank with one thread."""
    try:
        config = load_config(experiment.config, _words(experiment, cell, method, extra))
    except AutodoError as error:
        raise AutodoError(f"experiment {experiment.name}: {method!r} in {cell!r}: {error}") from error
    if config.run.fork:
        raise AutodoError(f"experiment {experiment.name}: {method!r}: run.fork is set by fork: {{method, epoch}}")
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"threads": 1}),
            "train": config.train.model_copy(update={"threads": 1}),
            "launch": config.launch.model_copy(update={"executor": "local", "nodes": 1, "ranks_per_node": 1}),
        }
    )


def seeded(config: Config, seed: int) -> Config:
    """The settings with that seed: of start weights and order, and of split and distortion unless a file gives them."""
    data = config.data if config.data.split is not None else config.data.model_copy(update={"split_seed": seed})
    return config.model_copy(update={"data": data, "train": config.train.model_copy(update={"seed": seed})})


def numbers(config: Config) -> dict[str, Any]:
    """The settings that a run's numbers depend on and that differ from the defaults, by dotted name.

    Those at their defaults are left out, so that a setting which is new changes no digest.
    """
    tree, found = config.model_dump(mode="json"), dict[str, Any]()
    for name, about in settings().items():
        value: Any = functools.reduce(getattr, name.split("."), config)
        if value != about.default and not any(f"{name}.".startswith(f"{free}.") for free in _NOT_NUMBERS):
            found[name] = functools.reduce(lambda part, key: part[key], name.split("."), tree)
    return found


def _files(config: Config) -> dict[str, Path]:
    """Files beside the data set that a run's numbers depend on, by setting."""
    named = {"data.split": config.data.split, "model.init_from": config.model.init_from}
    return {name: Path(file) for name, file in named.items() if file is not None}


@functools.cache
def _sha256(file: Path) -> str:
    """Of what the file holds. AutodoError if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise AutodoError(f"{file}: cannot be read ({error.strerror}); mend data.split or model.init_from") from error


def jobs(trials: Sequence[Trial]) -> list[tuple[Trial, ...]]:
    """The trials that one process makes one after another: a run and its forks, or a single one; the source first."""
    found: dict[Key, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.key if trial.source is None else trial.source.key, []).append(trial)
    return [tuple(sorted(job, key=lambda trial: trial.epoch)) for job in found.values()]

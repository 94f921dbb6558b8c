"""Experiments: the plan, results that outlast kills, the table against numpy, and whole ones on worker processes."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from stub_workers import hold_claim, killed_at_the_second, line_of, sleeping
from typer.testing import CliRunner

from autodo_dist import run_folder
from autodo_dist.cli import app
from autodo_dist.config import Config
from autodo_dist.errors import AutodoError
from autodo_dist.experiment import pool, results, runner, table, worker
from autodo_dist.experiment.plan import Experiment, Trial, jobs, numbers, plan, read_experiment
from autodo_dist.experiment.results import Line
from autodo_dist.experiment.rivals import loop
from autodo_dist.experiment.runner import Request
from autodo_dist.experiment.worker import Place, Said

ROOT = Path(__file__).parent.parent
PLAIN = ["learn.augment=none", "learn.weight=false", "learn.soft_label=false"]
SHORT = [
    *("data.image_size=16", "data.crop_padding=1", "train.epochs=2", "train.steps_per_pass=3"),
    *("optim.warmup_epochs=1", "hyper.start_epoch=1", "hyper.terms=2"),
]


def tree(**changes: Any) -> dict[str, Any]:
    """Ours and a plain run in one cell, two seeds of two epochs."""
    return {
        "name": "small",
        "config": str(ROOT / "configs/digits.yaml"),
        "settings": SHORT,
        "seeds": 2,
        "cells": {"IR 10": ["data.imbalance_ratio=10"]},
        "methods": {"autodo": {"ours": True}, "plain": {"settings": PLAIN}},
    } | changes


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(tree(**changes), sort_keys=False, allow_unicode=True))
    return file


def experiment(folder: Path, **changes: Any) -> Experiment:
    return read_experiment(write(folder, **changes))


def trials(folder: Path, **changes: Any) -> list[Trial]:
    return plan(experiment(folder, **changes))


# The plan


def test_trials_come_seed_by_seed_with_the_particular_over_the_general(tmp_path: Path) -> None:
    cells = {"A": ["data.label_noise=0.2"], "B": ["data.label_noise=0.3", "train.batch_size=32"]}
    methods = {"m": {"ours": True, "settings": ["train.batch_size=16"]}, "n": {"settings": PLAIN}}
    settings = [*SHORT, "data.label_noise=0.1", "train.threads=3", "launch.nodes=4"]
    found = trials(tmp_path, settings=settings, cells=cells, methods=methods)
    assert [trial.key for trial in found] == [
        (method, cell, seed, "epochs") for seed in (0, 1) for cell in "AB" for method in "mn"
    ]
    configs = {trial.key[:3]: trial.config for trial in found}
    assert [configs["n", cell, 0].data.label_noise for cell in "AB"] == [0.2, 0.3]
    assert [configs[method, "B", 0].train.batch_size for method in "mn"] == [16, 32]
    for (_, _, seed), config in configs.items():
        assert (config.data.split_seed, config.train.seed) == (seed, seed)
        assert (config.train.threads, config.launch.nodes, config.launch.ranks_per_node) == (1, 1, 1)
    assert {trial.ours.train.batch_size for trial in found} == {16}
    assert plan(experiment(tmp_path), seeds=1) == plan(experiment(tmp_path))[:2]
    assert plan(experiment(tmp_path), ["train.epochs=7"])[1].config.train.epochs == 7


def test_the_flops_budget_is_for_all_but_ours_and_forks(tmp_path: Path) -> None:
    fork = {"settings": ["learn.weight=true"], "fork": {"method": "plain", "epoch": 1}}
    methods = tree()["methods"] | {"fork": {"settings": PLAIN} | fork}
    found = trials(tmp_path, seeds=1, methods=methods, budgets=["epochs", "flops"])
    assert [trial.key[::3] for trial in found] == [
        *(("autodo", "epochs"), ("plain", "epochs"), ("fork", "epochs"), ("plain", "flops"))
    ]
    assert [trial.key[::3] for trial in trials(tmp_path, seeds=1, budgets=["flops"])] == [
        *(("autodo", "epochs"), ("plain", "flops"))
    ]
    assert [[trial.method for trial in job] for job in jobs(found)] == [["autodo"], ["plain", "fork"], ["plain"]]
    assert found[2].source == found[1]


def test_a_digest_is_of_all_that_numbers_depend_on_and_of_nothing_else(tmp_path: Path) -> None:
    base = trials(tmp_path)[1]

    def digest(*words: str, **changes: Any) -> str:
        return trials(tmp_path, settings=[*SHORT, *words], **changes)[1].digest

    same = ["run.root=elsewhere", "checkpoint.keep=9", "data.root=copy", "train.log_every=3", "launch.nodes=2"]
    assert digest(*same) == base.digest
    assert digest("train.threads=2") == base.digest  # a worker has one
    others = [digest(word) for word in ("optim.lr=0.2", "data.flip=true", "train.evaluate_every=2", "data.crop=whole")]
    others += [trials(tmp_path)[3].digest, digest(cells={"other name": ["data.imbalance_ratio=11"]})]
    others += [replace(base, rival="elr").digest, replace(base, rival="elr", options={"momentum": 0.9}).digest]
    flops = replace(base, budget="flops")
    others += [flops.digest, replace(flops, ours=base.config).digest]
    fork = replace(base, source=base, epoch=1)
    others += [fork.digest, replace(fork, epoch=2).digest]
    assert len({base.digest, *others}) == 1 + len(others)
    assert digest(cells={"other name": ["data.imbalance_ratio=10"]}) == base.digest


def test_a_digest_is_of_what_a_split_file_holds(tmp_path: Path) -> None:
    def digest_of(file: Path) -> str:
        cells = {"c": [f"data.split={file}", "data.imbalance_ratio=1", "data.label_noise=0"]}
        return trials(tmp_path, cells=cells)[1].digest

    files = {tmp_path / name: text for name, text in (("a", "one"), ("b", "one"), ("c", "two"))}
    for file, text in files.items():
        file.write_text(text)
    one, same, other = map(digest_of, files)
    assert one == same != other
    with pytest.raises(AutodoError, match=r"/none: cannot be read \(No such file or directory\); mend data.split"):
        digest_of(tmp_path / "none")


def test_settings_at_their_defaults_are_not_in_a_digest(tmp_path: Path) -> None:
    """So a setting that is new changes none."""
    found = numbers(trials(tmp_path)[1].config)
    assert (found["train.epochs"], found["data.imbalance_ratio"]) == (2, 10)
    assert not {"optim.momentum", "train.label_smoothing", "data.root", "run.name", "learn.weight"} & found.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 3}, r"small.yaml: unknown key sedes; did you mean seeds\?"),
        ({"seeds": 0}, "seeds = 0: input should be greater than or equal to 1"),
        ({"name": "a/b"}, "name = 'a/b'"),
        ({"cells": {}}, "cells = {}"),
        ({"methods": {"plain": {}}}, "0 methods are ours"),
        ({"methods": {"a": {"ours": True, "seting": []}}}, r"unknown key methods.a.seting; did you mean settings\?"),
        ({"methods": {"a": {"ours": True, "rival": "elr"}}}, "methods.a: a rival is neither ours nor a fork"),
        ({"methods": {"a": {"ours": True, "options": {"x": 1}}}}, "methods.a: options are a rival's"),
        ({"settings": ["train.epoch=3"]}, r"'autodo' in 'IR 10': config .*unknown key train.epoch; did you mean train"),
        ({"settings": [*SHORT, "run.fork=a@1"]}, "run.fork is set by fork"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AutodoError, match=message) as caught:
        trials(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fork", "settings", "message"),
    [
        ({"method": "plan", "epoch": 1}, PLAIN, "methods.fork.fork.method = 'plan': not a trainer's run among them"),
        ({"method": "autodo", "epoch": 1}, [], "autodo learns hyperparameters itself"),
        ({"method": "plain", "epoch": 2}, [], "epoch = 2: not below train.epochs = 2"),
        ({"method": "plain", "epoch": 1}, ["optim.lr=0.3"], r"other settings than plain's \(optim.lr: 0.05 -> 0.3\)"),
    ],
)
def test_what_cannot_be_forked_is_refused(
    tmp_path: Path, fork: dict[str, Any], settings: list[str], message: str
) -> None:
    with pytest.raises(AutodoError, match=message):
        trials(tmp_path, methods=tree()["methods"] | {"fork": {"fork": fork, "settings": settings}})


@pytest.mark.parametrize(
    ("rival", "options", "message"),
    [
        ("erl", {}, r"rival 'erl' is unknown; did you mean elr\?"),
        ("elr", {"momentun": 0.5}, r"elr: unknown option momentun; did you mean momentum\?"),
        ("elr", {"momentum": 2}, "elr: momentum = 2: not at least 0 and below 1"),
    ],
)
def test_a_wrong_rival_or_option_is_refused_before_anything_runs(
    tmp_path: Path, rival: str, options: dict[str, float], message: str
) -> None:
    methods = tree()["methods"] | {"ELR": {"settings": PLAIN, "rival": rival, "options": options}}
    with pytest.raises(AutodoError, match=message):
        runner.check_rivals(trials(tmp_path, methods=methods))


# Results


def test_what_a_killed_writer_left_is_cut_off_or_ended(tmp_path: Path) -> None:
    """Wherever the write of a last line was broken off."""
    first, second, third = (line_of(trial) for trial in trials(tmp_path)[:3])
    whole, cut, file = first.model_dump_json() + "\n", second.model_dump_json(), tmp_path / "lines.jsonl"
    for length in range(1, len(cut) + 1):
        file.write_text(whole + cut[:length])
        assert results.read(file) == [first]
        results.append(file, third)
        expected = [first, second, third] if length == len(cut) else [first, third]
        assert results.read(file) == expected, length
    assert not results.mend(file)
    file.write_text(whole + cut)
    assert results.mend(file)
    assert results.read(file) == [first, second]


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    line = line_of(trials(tmp_path)[0]).model_dump_json()
    file.write_text(f"{line}\n<<<<<<< HEAD\n{line}\n")
    with pytest.raises(AutodoError, match=r"lines.jsonl, line 2: no result \(Invalid JSON"):
        results.read(file)


def test_a_trial_is_done_by_its_last_line_of_the_same_settings_and_data(tmp_path: Path) -> None:
    one, two, three, four = trials(tmp_path)
    lines = [
        *(line_of(one, test_error=1.0), line_of(one, test_error=2.0), line_of(one, test_error=3.0, digest="other")),
        *(line_of(two, digest="other"), line_of(three, data="f" * 16), line_of(three, experiment="another")),
    ]
    found = results.standing([one, two, three, four], lines, {one.config.data.root: "0123456789abcdef"})
    assert {key: line.test_error for key, line in found.done.items()} == {one.key: 2.0}
    assert (found.other, found.missing) == ([two, three], [four])
    assert runner.describe(found) == (
        "1 of 4 trials found, 3 to do, 2 of them made with other settings or data before, and now again"
    )
    assert results.standing([one, two, three, four], lines, {}).done.keys() == {one.key, three.key}
    there = {one.config.data.root: "f" * 16}
    assert results.standing([one], [line_of(one, data="f" * 16), line_of(one)], there).done[one.key].data == "f" * 16


def test_lines_of_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    file, trial = tmp_path / "lines.jsonl", trials(tmp_path)[0]

    def write_many(writer: int) -> None:
        for number in range(25):
            results.append(file, line_of(trial, seed=100 * writer + number))

    threads = [threading.Thread(target=write_many, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line.seed for line in results.read(file)) == [100 * w + n for w in range(4) for n in range(25)]


def test_a_claim_is_one_processs_and_ends_with_it(tmp_path: Path) -> None:
    file, ready = tmp_path / "lines.jsonl", tmp_path / "ready"
    process = multiprocessing.get_context("spawn").Process(target=hold_claim, args=(str(file), "job", str(ready)))
    process.start()
    try:
        wait_for(lambda: ready.exists() and ready.read_text() == "True")
        with results.claimed(file, "job") as mine, results.claimed(file, "other") as free:
            assert (mine, free) == (False, True)
        results.forget_claims(file)
        assert [path.name for path in (tmp_path / ".lines.jsonl.claims").iterdir()] == ["job.lock"]
    finally:
        process.kill()
        process.join()
    with results.claimed(file, "job") as mine:
        assert mine
    results.forget_claims(file)
    assert not (tmp_path / ".lines.jsonl.claims").exists()


def test_files_of_slurm_tasks_are_read_together_with_the_main_one(tmp_path: Path) -> None:
    file, lines = tmp_path / "a.b.jsonl", [line_of(trial) for trial in trials(tmp_path)]
    for number, place in enumerate((file, runner.task_file(file, 2), runner.task_file(file, 10))):
        results.append(place, lines[number])
    results.append(tmp_path / "a.jsonl", lines[3])
    results.append(tmp_path / "a.b.jsonl.1", lines[3])
    assert runner.task_file(file, 2).name == "a.b.2.jsonl"
    assert results.read_all(file) == lines[:3]


def test_results_are_no_change_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a result does not spoil the commit of the next."""
    package, lines = tmp_path / "package", tmp_path / "docs/results"
    package.mkdir()
    lines.mkdir(parents=True)
    (package / "code.py").write_text("one")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(run_folder, "__file__", str(package / "run_folder.py"))
    commit = run_folder.git_commit()
    assert commit is not None
    assert len(commit) == 40
    (lines / "new.jsonl").write_text("line")
    assert run_folder.git_commit() == f"{commit}+changes"
    assert run_folder.git_commit(besides=lines) == run_folder.git_commit(besides=tmp_path / "docs") == commit
    assert run_folder.git_commit(besides=tmp_path) == f"{commit}+changes"
    (package / "code.py").write_text("two")
    assert run_folder.git_commit(besides=lines) == f"{commit}+changes"


# Workers


def wait_for(condition: Any, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def place(folder: Path) -> Place:
    return Place(folder / "runs", folder / "lines.jsonl", folder / "lines.jsonl", False, {}, None)


class Made:
    """In place of measure.py: notes what is trained and deleted, and makes results up, but for one method."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        from autodo_dist.experiment import measure

        self.did: list[str] = []

        def made(trial: Trial, *_: Any) -> Line:
            self.did.append(f"made {trial.method}")
            if error is not None and trial.method == "plain":
                raise error
            return line_of(trial)

        monkeypatch.setattr(measure, "measure", made)
        monkeypatch.setattr(
            measure, "train_source", lambda trial, first, _: self.did.append(f"source {trial.method} from {first}")
        )
        monkeypatch.setattr(measure, "forget", lambda trial, _: self.did.append(f"forgot {trial.method}"))


def with_forks(folder: Path) -> list[Trial]:
    """A plain run and two forks of it, of one seed."""
    forks = {f"E{epoch}": {"fork": {"method": "plain", "epoch": epoch}} for epoch in (2, 1)}
    each = experiment(folder, seeds=1, settings=[*SHORT, "train.epochs=3"], methods=tree()["methods"] | forks)
    return list(jobs(plan(each))[1])


def known(folder: Path, trials: list[Trial]) -> Place:
    """A place that knows the data set of the trials."""
    return replace(place(folder), data={trials[0].config.data.root: "0123456789abcdef"})


def test_a_run_is_kept_for_its_forks_and_made_again_where_one_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, made = with_forks(tmp_path), Made(monkeypatch)
    assert [trial.method for trial in job] == ["plain", "E1", "E2"]
    results.append(tmp_path / "lines.jsonl", line_of(job[1]))
    said = [(it.kind, it.trial.method) for it in worker.make(tuple(job), known(tmp_path, job))]
    assert said == [("found", "E1"), ("begun", "plain"), ("done", "plain"), ("begun", "E2"), ("done", "E2")]
    source = "source plain from 1"
    assert made.did == [source, "made plain", source, "made E2", "forgot E2", "forgot plain"]
    (tmp_path / "lines.jsonl").write_text(line_of(job[0]).model_dump_json() + "\n")
    made.did.clear()
    assert [it.kind for it in worker.make(tuple(job[:2]), known(tmp_path, job))] == ["found", "begun", "done"]
    assert made.did == [source, "made E1", "forgot E1", "forgot plain"]


def test_the_same_training_is_not_made_again_for_equal_flops(digits: Path, tmp_path: Path) -> None:
    """Label smoothing costs nothing, so its epochs are those as set; of the clean part alone there are more."""
    from autodo_dist.experiment.measure import as_at_equal_epochs

    methods = {
        "plain": {"settings": PLAIN, "ours": True},
        "smooth": {"settings": [*PLAIN, "train.label_smoothing=0.1"]},
        "clean": {"settings": [*PLAIN, "data.train_on=clean"]},
    }
    settings = [*(word for word in SHORT if "steps" not in word), f"data.root={digits}"]
    each = trials(tmp_path, seeds=1, settings=settings, methods=methods, budgets=["epochs", "flops"])
    found = {trial.key[::3]: trial for trial in each}
    lines, data = [line_of(trial) for trial in each if trial.budget == "epochs"], line_of(each[0]).data
    smooth = found["smooth", "flops"]
    line = as_at_equal_epochs(smooth, lines, data)
    assert line == line_of(found["smooth", "epochs"], budget="flops", digest=smooth.digest)
    assert as_at_equal_epochs(smooth, lines, "another") is None
    assert as_at_equal_epochs(smooth, [line_of(found["plain", "epochs"])], data) is None
    assert as_at_equal_epochs(found["smooth", "epochs"], lines, data) is None
    assert as_at_equal_epochs(found["clean", "flops"], lines, data) is None


@pytest.mark.parametrize("error", [AutodoError("x is y"), ValueError("of ours")])
def test_what_follows_a_failure_in_a_job_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """And after an error that is no user's the process ends."""
    job, user = with_forks(tmp_path), isinstance(error, AutodoError)
    Made(monkeypatch, error)
    first, *rest = [it for it in worker.make(tuple(job), known(tmp_path, job)) if it.kind != "begun"]
    log = tmp_path / "runs" / f"{job[0].name}.log"
    assert (first.kind, first.bug) == ("failed", not user)
    assert first.text == (f"x is y; see {log}" if user else f"ValueError: of ours; see {log}")
    assert [(it.kind, it.text, it.bug) for it in rest] == 2 * [("failed", worker.NOT_TRIED, False)]
    assert results.read(tmp_path / "lines.jsonl") == []
    assert "Traceback" in log.read_text()


def test_results_that_cannot_be_read_fail_the_whole_job(tmp_path: Path) -> None:
    job = with_forks(tmp_path)
    (tmp_path / "lines.jsonl").write_text("no line\n")
    said = list(worker.make(tuple(job), known(tmp_path, job)))
    assert [(it.kind, it.trial.method) for it in said] == [("failed", method) for method in ("plain", "E1", "E2")]
    assert "lines.jsonl, line 1: no result" in said[0].text
    assert {it.text for it in said[1:]} == {worker.NOT_TRIED}


def test_a_process_that_dies_takes_its_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "serve", killed_at_the_second)
    four, said = trials(tmp_path), list[Said]()
    pool.run([(four[0],), tuple(four[1:])], place(tmp_path), 1, said.append)
    assert [(it.kind, it.trial.key) for it in said if it.kind != "begun"] == [
        *(("done", four[0].key), ("done", four[1].key), ("failed", four[2].key), ("failed", four[3].key))
    ]
    assert said[-2].text == (
        "its process was killed by SIGKILL, perhaps as memory ran out: set fewer --jobs; see its log"
    )
    assert said[-1].text == "not tried, as a trial before it failed"


def test_no_process_is_left_when_a_run_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "serve", sleeping)
    before = set(psutil.Process().children())

    def interrupted(connections: list[Any]) -> None:
        assert len(set(psutil.Process().children()) - before) >= 2
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run([(trial,) for trial in trials(tmp_path)], place(tmp_path), 2, lambda said: None)
    assert set(psutil.Process().children()) <= before


# The table


def many(folder: Path) -> tuple[Experiment, dict[Any, Line]]:
    """An experiment of 5 seeds, 2 cells and 2 budgets, with results drawn at random."""
    methods = tree()["methods"] | {"other": {"settings": [*PLAIN, "optim.lr=0.1"]}}
    cells = {"A": ["data.label_noise=0.2"], "B": ["data.label_noise=0.3"]}
    each = experiment(folder, seeds=5, methods=methods, cells=cells, budgets=["epochs", "flops"])
    random = np.random.default_rng(0)
    lines = {
        trial.key: line_of(
            trial,
            test_error=float(random.normal(10 + 4 * (trial.method == "plain"), 1)),
            seconds=float(random.uniform(1, 2)),
            flops=float(random.uniform(1e9, 2e9)),
            auroc=float(random.uniform()) if trial.method == "autodo" else None,
        )
        for trial in plan(each)
    }
    return each, lines


def test_figures_of_the_table_are_numpys(tmp_path: Path) -> None:
    each, lines = many(tmp_path)

    def column(name: str, method: str, cell: str, budget: str) -> Any:
        return np.array([getattr(lines[method, cell, seed, budget], name) for seed in range(5)])  # type: ignore[index]

    for cell in each.cells:
        for budget in ("epochs", "flops"):
            rows = {row.method: row for row in table.rows(each, lines, cell, budget)}
            assert list(rows) == ["autodo", "plain", "other"]
            for method, row in rows.items():
                own = "epochs" if method == "autodo" else budget
                ours, error = column("test_error", "autodo", cell, "epochs"), column("test_error", method, cell, own)
                assert row.error is not None
                assert (row.error.mean, row.error.std) == pytest.approx((error.mean(), error.std(ddof=1)))
                for name, value in (("seconds", row.seconds), ("flops", row.flops)):
                    ratio = column(name, method, cell, own) / column(name, "autodo", cell, "epochs")
                    assert value == pytest.approx(np.median(ratio))
                if method == "autodo":
                    assert row.difference is None
                    assert row.auroc == pytest.approx(column("auroc", method, cell, own).mean())
                    continue
                pairs = ours - error
                assert row.difference is not None
                standard_error = pairs.std(ddof=1) / np.sqrt(5)
                assert (row.difference.mean, row.difference.error) == pytest.approx((pairs.mean(), standard_error))
                assert row.difference.beyond == (abs(pairs.mean()) > 2 * standard_error)
            differences = [rows[name].difference for name in ("plain", "other")]
            largest = max(it.mean for it in differences if it is not None)
            same = ", same FLOPs" if budget == "flops" else ""
            found = [it for it in table.figures(each, lines, 5) if it["name"].startswith(f"small, {cell}{same}:")]
            assert (found[0]["value"], found[0]["bar"]) == (pytest.approx(largest), "< 0")
            assert (found[0]["holds"], found[0]["unit"]) == (bool(largest < 0), "%")
            assert found[1]["value"] == sum(it is not None and it.beyond and it.mean < 0 for it in differences)


def test_the_table_says_what_is_missing(tmp_path: Path) -> None:
    """Pairs are of seeds that both have; nothing holds while a trial is missing."""
    each, lines = many(tmp_path)
    del lines["plain", "A", 0, "epochs"]
    del lines["autodo", "A", 4, "epochs"]
    rows = {row.method: row for row in table.rows(each, lines, "A", "epochs")}
    pairs = [
        lines["autodo", "A", seed, "epochs"].test_error - lines["plain", "A", seed, "epochs"].test_error
        for seed in (1, 2, 3)
    ]
    assert rows["plain"].difference is not None
    assert (rows["plain"].difference.mean, rows["plain"].difference.n) == (pytest.approx(np.mean(pairs)), 3)
    shown = table.markdown(each, lines, 5)
    assert "| plain (4 of 5 seeds) |" in shown
    bars = {it["name"].partition(":")[0]: it for it in table.figures(each, lines, 5) if it["bar"]}
    assert (bars["small, A"]["complete"], bars["small, A"]["holds"]) == (False, False)
    assert bars["small, B"]["complete"]
    assert "(0 of 5 seeds)" in table.markdown(each, {}, 5)
    assert table.figures(each, {}, 5) == []


def test_a_table_in_words(tmp_path: Path) -> None:
    each = experiment(tmp_path)
    autodo0, plain0, autodo1, plain1 = plan(each)
    lines = {
        autodo0.key: line_of(autodo0, test_error=5.0, auroc=0.9, right=0.75),
        plain0.key: line_of(plain0, test_error=7.0, seconds=1.0, flops=5e8),
        autodo1.key: line_of(autodo1, test_error=6.0, auroc=0.8, right=0.85),
        plain1.key: line_of(plain1, test_error=9.0, seconds=1.5, flops=5e8),
    }
    assert table.markdown(each, lines, 2).splitlines() == [
        "| IR 10: test error of the last epoch, 2 seeds | % | autodo - it | beyond 2 SE | wrong labels, AUROC "
        "| right suggestions | time | FLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| autodo | 5.50 ± 0.71 |  |  | 0.850 | 80.0% | 1.00 | 1.00 |",
        "| plain | 8.00 ± 1.41 | -2.50 ± 0.50 | better |  |  | 0.62 | 0.50 |",
    ]


def test_a_table_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("a\n<!-- small -->\nold\n<!-- /small -->\n<!-- other -->\n<!-- /other -->\n")
    table.insert(file, "small", "new \\1")
    table.insert(file, "other", "its")
    assert file.read_text() == "a\n<!-- small -->\nnew \\1\n<!-- /small -->\n<!-- other -->\nits\n<!-- /other -->\n"
    with pytest.raises(AutodoError, match=r"page.md: 0 pairs of marks <!-- third --> and <!-- /third --> there"):
        table.check_marks(file, "third")


# Whole experiments


def command(file: Path, folder: Path, *words: str) -> list[str]:
    places = ["--results", str(folder / "lines.jsonl"), "--root", str(folder / "runs")]
    return ["experiment", str(file), *places, *words]


def test_a_whole_experiment(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, a fork, and one that fails, with two seeds; called again, it finds what is done."""
    methods = tree()["methods"] | {
        "fork": {"fork": {"method": "plain", "epoch": 1}},
        "broken": {"settings": [*PLAIN, "train.batch_size=9000"]},
    }
    settings = [*SHORT, f"data.root={digits}"]
    file, lines = write(tmp_path, settings=settings, methods=methods), tmp_path / "lines.jsonl"
    said = CliRunner().invoke(app, command(file, tmp_path, "--jobs", "2"))
    assert said.exit_code == 1, said.output
    assert said.stderr.startswith("small: 0 of 8 trials found, 8 to do\n")
    failed = [line for line in said.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    for line in failed:
        assert line.startswith("failed: broken; IR 10; seed ")
        assert ": train.batch_size = 9000: more than the " in line
        assert "Traceback" in Path(line.rpartition("; see ")[2]).read_text()
    found = {(line.method, line.seed): line for line in results.read(lines)}
    assert sorted(found) == [(method, seed) for method in ("autodo", "fork", "plain") for seed in (0, 1)]
    assert "| fork | " in said.stdout
    for line in found.values():
        assert line.epochs == 2
        assert line.seconds > 0
        assert (line.auroc is None) == (line.method == "plain") == (line.right is None)
    assert [epoch for epoch, _ in found["plain", 0].curve] == [1, 2]
    assert [epoch for epoch, _ in found["fork", 0].curve] == [2]
    assert found["autodo", 0].curve == ()
    assert {path.name.partition("-")[0] for path in (tmp_path / "runs").iterdir()} == {"broken"}
    assert not list(tmp_path.glob(".*"))

    monkeypatch.setattr(pool, "run", None)
    del methods["broken"]
    again = CliRunner().invoke(app, command(write(tmp_path, settings=settings, methods=methods), tmp_path))
    assert (again.exit_code, again.stderr) == (0, "small: 6 of 6 trials found, 0 to do\n")
    each = experiment(tmp_path, settings=settings, methods=methods)
    check_against_runs_made_here(found, each, tmp_path / "here", monkeypatch)


def check_against_runs_made_here(
    found: dict[Any, Line], each: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors of trials with seed 1 are those of runs by the trainer alone, and the fork's those of `run.fork`; so
    are operations, as they are counted in every step.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from autodo_dist import train as trainer

    counts: list[tuple[str, float]] = []

    def counted(name: str) -> None:
        step = getattr(trainer, name)

        def call(*args: Any, **words: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                came = step(*args, **words)
            counts.append((name, float(counter.get_total_flops())))
            return came

        monkeypatch.setattr(trainer, name, call)

    def run(trial: Trial, **settings: Any) -> tuple[float, list[tuple[str, float]]]:
        update = {"run": {"root": folder, "name": trial.method} | settings, "checkpoint": {"keep": 9}}
        config = Config.model_validate(trial.config.model_dump() | update)
        counts.clear()
        trainer.train(config)
        summary = json.loads((config.folder / "summary.json").read_text())
        return 100 * (1 - float(summary["test_accuracy_final"])), list(counts)

    for name in ("task_step", "shared_step", "renew_validation"):
        counted(name)
    of_seed_1 = {trial.method: trial for trial in plan(each) if trial.seed == 1}
    made = {method: run(of_seed_1[method]) for method in ("autodo", "plain")}
    made["fork"] = run(of_seed_1["fork"], fork=f"{folder / 'plain'}@3")
    assert [name for name, _ in made["plain"][1]] == 6 * ["task_step"]
    assert [name for name, _ in made["fork"][1]] == 3 * ["renew_validation", "shared_step"]
    auroc, right = by_the_list(folder / "autodo/labels.csv", Path(of_seed_1["autodo"].config.data.root))
    assert found["autodo", 1].auroc == pytest.approx(auroc, abs=0.02)  # six digits there make ties
    assert found["autodo", 1].right == pytest.approx(right)
    for method, (error, steps) in made.items():
        before = made["plain"][1][:3] if method == "fork" else []
        assert found[method, 1].test_error == pytest.approx(error, abs=1e-5)
        assert found[method, 1].flops == sum(count for _, count in (*before, *steps))


def by_the_list(file: Path, digits: Path) -> tuple[float, float]:
    """AUROC of wrong labels and share of right suggestions, from a run's labels.csv and the packed labels."""
    from sklearn.metrics import roc_auc_score

    from autodo_dist.data.manifest import read_manifest

    manifest = read_manifest(digits)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    true = [manifest.classes[manifest.label_N[int(row["id"])]] for row in rows]
    wrong = [row["given_label"] != label for row, label in zip(rows, true, strict=True)]
    # Of steps_per_pass the model has seen a part of the pictures; of the others the learnt label is all there is.
    right = [(row["suggested_label"] or row["learnt_label"]) == label for row, label in zip(rows, true, strict=True)]
    assert 0 < sum(wrong) < len(rows)
    return float(roc_auc_score(wrong, [float(row["score"]) for row in rows])), sum(right) / len(rows)


def test_two_runners_on_one_file_share_the_work(digits: Path, tmp_path: Path) -> None:
    """Neither makes a trial of the other's; no line is mixed."""
    each = experiment(tmp_path, settings=[*SHORT, f"data.root={digits}"])
    tallies = []

    def make(number: int) -> None:
        root = tmp_path / f"runs{number}"
        tallies.append(runner.run(Request(each, (), None, tmp_path / "lines.jsonl", root, 1)))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = results.read(tmp_path / "lines.jsonl")
    assert sorted(line.key for line in lines) == sorted(trial.key for trial in plan(each))
    assert sum(tally.counts.get("done", 0) for tally in tallies) == 4
    assert all(tally.counts.keys() <= {"done", "found", "elsewhere"} for tally in tallies)
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_keeps_finished_lines_and_leaves_no_process(digits: Path, tmp_path: Path) -> None:
    file = write(tmp_path, settings=[*SHORT, f"data.root={digits}"], seeds=500)
    lines, start = tmp_path / "lines.jsonl", [sys.executable, "-c", "from autodo_dist.cli import main; main()"]
    process = subprocess.Popen(
        [*start, *command(file, tmp_path, "--jobs", "2")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        wait_for(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 2)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        asked = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - asked < 30
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "stopped; the same command goes on, what is finished is kept"
    assert not psutil.wait_procs(family, timeout=10)[1]
    kept, told = len(results.read(lines)), [line for line in said.splitlines() if " of 1000: " in line]
    assert lines.read_bytes().endswith(b"\n")
    assert kept >= max(2, len(told))
    assert not list(tmp_path.glob(".*"))


def shipped() -> list[Path]:
    return sorted((ROOT / "configs/experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_what_configs_holds_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    each = read_experiment(path)
    assert each.name == path.stem
    found = plan(each, seeds=2)
    per_cell = len(each.methods) + len(each.rivals) * ("flops" in each.budgets)
    assert len({trial.key for trial in found}) == len(found) == 2 * len(each.cells) * per_cell
    runner.check_rivals(found)
    for trial in found:
        if trial.rival:
            loop.check(trial.config)
    assert len({trial.digest for trial in found}) == len(found)

"""`autodo labels`: the file that the run wrote, truth that is not looked at, and splits with corrected labels."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_autodo import learning
from test_train import run_train
from typer.testing import CliRunner

from autodo_dist import build_data
from autodo_dist.build_data import build_split
from autodo_dist.cli import app
from autodo_dist.data.manifest import Manifest, read_manifest
from autodo_dist.data.split_file import read_split
from autodo_dist.errors import AutodoError
from autodo_dist.label_errors import measures
from autodo_dist.learnt import open_source
from autodo_dist.load_config import check_config
from autodo_dist.predictions import NAME
from autodo_dist.run_folder import read_config


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def tree(digits: Path, folder: Path, split: Path) -> dict[str, Any]:
    """A short run on that split."""
    made = learning(digits, folder, data__image_size=16, learn__augment="none", train__threads=1)
    for name in ("imbalance_ratio", "label_noise"):
        del made["data"][name]
    made["data"]["split"] = str(split)
    return made


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a split file with wrong labels."""
    folder = tmp_path_factory.mktemp("labels")
    call("split", digits, folder / "noisy.split", "--noise-rate", 0.2, "--ratio", 4)
    return run_train(tree(digits, folder, folder / "noisy.split"))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be spoilt."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_the_command_writes_what_the_run_wrote(copy: Path) -> None:
    """From the predictions that the run kept, and, without them, from a pass of its own, which it keeps."""
    written = (copy / "labels.csv").read_bytes()
    kept = (copy / NAME).read_bytes()
    (copy / "labels.csv").unlink()
    call("labels", copy)
    assert (copy / "labels.csv").read_bytes() == written
    (copy / NAME).unlink()
    call("labels", copy, "--out", copy / "again.csv")
    assert (copy / "again.csv").read_bytes() == written
    assert (copy / NAME).read_bytes() == kept


def test_a_run_under_way_and_an_earlier_step(copy: Path) -> None:
    """Of step 5, before any hyper step, everything learnt is as it starts, and the predictions are that step's own."""
    for name in ("summary.json", "labels.csv", NAME):
        (copy / name).unlink()
    *_, before, newest = sorted((copy / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    said = call("labels", copy)
    assert said.splitlines()[0].endswith(f"step {int(before.name.removeprefix('step-'))}")
    kept = (copy / NAME).read_bytes()
    call("labels", copy, "--step", 5)
    early, now = lines(copy / "labels-5.csv"), lines(copy / "labels.csv")
    assert {row["weight"] for row in early} == {"1"}
    assert {row["learnt_probability"] for row in early} == {"0.91"}
    assert all(row["learnt_label"] == row["given_label"] for row in early)
    assert [row["id"] for row in early] == [row["id"] for row in now]
    assert [row["suggested_probability"] for row in early] != [row["suggested_probability"] for row in now]
    assert (copy / NAME).read_bytes() == kept


def test_tables_alone(copy: Path) -> None:
    call("labels", copy, "--no-predict", "--out", copy / "first.csv")
    assert (copy / "first.csv").read_bytes() == (copy / "labels.csv").read_bytes()  # the run has predictions
    (copy / NAME).unlink()
    call("labels", copy, "--no-predict", "--out", copy / "tables.csv")
    rows = lines(copy / "tables.csv")
    assert {row["suggested_label"] + row["suggested_probability"] for row in rows} == {""}
    source = open_source(copy)
    soft_NC = source.layout.split(source.reader.whole("hyper.rows.value").double())["soft_logit"].softmax(1).numpy()
    given_N = source.split.label_N[source.split.train]
    own_N = soft_NC[np.arange(len(given_N)), given_N]
    np.testing.assert_allclose([float(row["score"]) for row in rows], 1 - own_N, rtol=1e-4)
    assert not (copy / NAME).exists()


def given_predictions(run: Path) -> list[float]:
    """p(y) of every train sample, as the run keeps it."""
    kept: list[float] = load_file(run / NAME)["given_N"].tolist()
    return kept


def test_the_score_is_that_of_the_columns(run: Path) -> None:
    """Where the learnt label is the given one, its probability is in the file."""
    rows = zip(lines(run / "labels.csv"), given_predictions(run), strict=True)
    known = [(row, p) for row, p in rows if row["given_label"] == row["learnt_label"]]
    assert len(known) > 50
    for row, p in known:
        assert float(row["score"]) == pytest.approx(1 - p * float(row["learnt_probability"]), abs=2e-6)


def poisoned(manifest: Manifest) -> Manifest:
    """The data set with other true labels of the packed train part."""
    label_N = manifest.label_N.copy()
    train = np.flatnonzero(manifest.part_N == 0)
    label_N[train] = np.random.default_rng(1).permutation(label_N[train])
    return replace(manifest, label_N=label_N)


def test_the_truth_is_not_looked_at(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With shuffled true labels under the same given ones, the pass, the table and the file are the same to the bit."""
    written, kept = (copy / "labels.csv").read_bytes(), (copy / NAME).read_bytes()
    (copy / NAME).unlink()
    true = call("labels", copy, "--out", copy / "true.csv")
    (copy / NAME).unlink()
    read = build_data.read_data
    monkeypatch.setattr(build_data, "read_data", lambda *words: poisoned(read(*words)))
    false = call("labels", copy, "--out", copy / "false.csv")
    assert (copy / "true.csv").read_bytes() == (copy / "false.csv").read_bytes() == written
    assert (copy / NAME).read_bytes() == kept
    assert true.splitlines()[-1] != false.splitlines()[-1]  # only what is said of the truth differs
    assert true.splitlines()[1:11] == false.splitlines()[1:11]


def test_what_is_said_of_the_truth(run: Path, copy: Path) -> None:
    manifest, rows = read_manifest(read_config(run).data.root), lines(run / "labels.csv")
    true = [manifest.classes[manifest.label_N[int(row["id"])]] for row in rows]
    wrong = np.array([row["given_label"] != name for row, name in zip(rows, true, strict=True)])
    said = call("labels", copy).splitlines()
    expected = measures(np.array([float(row["score"]) for row in rows]), wrong)
    found = dict(re.findall(r"(\w[\w ]+) ([\d.]+)", said[-1]))
    assert {name.replace(" ", "_"): float(value) for name, value in found.items()} == pytest.approx(expected, abs=2e-4)
    right = [
        np.mean([row[f"{word}_label"] == name for row, name in zip(rows, true, strict=True)])
        for word in ("given", "learnt", "suggested")
    ]
    shares = ", ".join(
        f"{word} {share:.2%}" for word, share in zip(("given", "learnt", "suggested"), right, strict=True)
    )
    assert said[-2] == f"the true labels are known: {wrong.sum()} of {len(wrong)} are wrong; right are {shares}"
    order = sorted(rows, key=lambda row: -float(row["score"]))
    assert said[1].split()[2] == order[0]["id"] + ":"
    assert len(said) == 1 + 10 + 2


def test_without_wrong_labels_nothing_is_said_of_the_truth(digits: Path, tmp_path: Path) -> None:
    call("split", digits, tmp_path / "clean.split", "--ratio", 10)
    folder = run_train(tree(digits, tmp_path, tmp_path / "clean.split") | {"learn": {"augment": "shared"}})
    said = call("labels", folder).splitlines()
    assert len(said) == 11
    rows = lines(folder / "labels.csv")
    assert {row["weight"] + row["learnt_label"] + row["learnt_probability"] for row in rows} == {""}
    np.testing.assert_allclose(
        [float(row["score"]) for row in rows], 1 - np.array(given_predictions(folder)), atol=2e-6
    )


# --- corrected splits


def corrected(run: Path, ticks: list[str], out: Path) -> str:
    file = out.with_suffix(".csv")
    file.write_text("\n".join(ticks) + "\n")
    return call("labels", run, "--apply", file, "--split-out", out)


def test_ticks_become_a_split_that_a_run_takes(run: Path, digits: Path, tmp_path: Path) -> None:
    rows = lines(run / "labels.csv")
    manifest = read_manifest(digits)
    ticked = {row["id"]: row for row in rows[3:60:7]}
    new = {id_: str((int(row["given_label"]) + 3) % 10) for id_, row in ticked.items()}
    gone = list(new)[2]
    new[gone] = ""
    ticks = ["id,key,given_label,new_label"]
    ticks += [f"{id_},{row['key']},{row['given_label']},{new[id_]}" for id_, row in ticked.items()]
    said = corrected(run, ticks, tmp_path / "new.split")
    assert f"{len(new) - 1} labels changed, 1 samples left out" in said
    before, after = read_split(read_config(run).data.split, manifest), read_split(tmp_path / "new.split", manifest)
    expected_N = before.label_N.copy()
    for id_, label in new.items():
        expected_N[int(id_)] = int(label) if label else manifest.label_N[int(id_)]
    assert np.array_equal(after.label_N, expected_N)
    assert after.train.tolist() == [id_ for id_ in before.train.tolist() if id_ != int(gone)]
    assert np.array_equal(after.validation, before.validation)
    assert np.array_equal(after.test, before.test)
    made = json.loads((tmp_path / "new.split").read_bytes().partition(b"\n")[0])["made"]
    assert made["corrected"]["run"] == "run"
    settings = tree(digits, tmp_path, tmp_path / "new.split")
    settings["run"]["name"] = "next"
    rerun = lines(run_train(settings) / "labels.csv")
    assert {row["id"]: row["given_label"] for row in rerun if row["id"] in new} == {
        id_: label for id_, label in new.items() if label
    }


def test_keys_alone_and_the_same_bytes_again(run: Path, tmp_path: Path) -> None:
    row = lines(run / "labels.csv")[5]
    ticks = ["new_label,note,key", f"{row['given_label']},looked at,{row['key']}"]
    assert "0 labels changed, 0 samples left out" in corrected(run, ticks, tmp_path / "a.split")
    assert "with the same bytes" in corrected(run, ticks, tmp_path / "a.split")


def test_the_split_of_a_run_whose_settings_drew_it(digits: Path, tmp_path: Path) -> None:
    settings = learning(digits, tmp_path, data__image_size=16)
    config = check_config(settings, "test")
    before = build_split(config, read_manifest(digits))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    id_ = int(before.train[4])
    corrected(folder, ["id,new_label", f"{id_},7"], tmp_path / "new.split")
    after = read_split(tmp_path / "new.split", read_manifest(digits))
    assert after.label_N[id_] == 7
    assert np.array_equal(np.delete(after.label_N, id_), np.delete(before.label_N, id_))
    assert np.array_equal(after.train, before.train)


@pytest.mark.parametrize(
    ("ticks", "message"),
    [
        (["id,label", "ID,3"], "begins with 'id,label'; it must have new_label, and id or key"),
        (["new_label", "3"], "it must have new_label, and id or key"),
        (["id,new_label", "99999,3"], "'99999' is no sample of"),
        (["id,new_label", "x,3"], "'x' is no sample of"),
        (["key,new_label", "no-such,3"], "'no-such' is no sample of"),
        (["id,new_label", "ID,ten"], "'ten' is no class (0, 1, 2, 3, 4, …)"),
        (["id,new_label", "ID,3", "ID,3"], "is there twice (and 1 more); mend or remove that line"),
        (["id,new_label", "VALID,3"], "is not in the train part, whose labels alone are given"),
        (["id,key,new_label", "ID,OTHER,3"], "is not the sample 'OTHER'"),
        (["id,given_label,new_label", "ID,nine,3"], "in this run, not 'nine'"),
        (["id,new_label", "ID"], "cannot be read as CSV"),
    ],
)
def test_bad_ticks_are_one_line(run: Path, digits: Path, tmp_path: Path, ticks: list[str], message: str) -> None:
    split = read_split(read_config(run).data.split, read_manifest(digits))
    key = read_manifest(digits).keys[int(split.train[1])].as_py()
    names = {"VALID": str(split.validation[0]), "OTHER": key, "ID": str(split.train[0])}
    for word, value in names.items():
        ticks = [line.replace(word, value) for line in ticks]
        message = message.replace(word, value)
    with pytest.raises(AutodoError, match=re.escape(message)) as caught:
        corrected(run, ticks, tmp_path / "new.split")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new.split").exists()


def test_a_class_that_nothing_is_left_of(run: Path, digits: Path, tmp_path: Path) -> None:
    manifest = read_manifest(digits)
    split = read_split(read_config(run).data.split, manifest)
    ticks = [f"{id_}," for id_ in split.train if manifest.label_N[id_] == 9]
    with pytest.raises(AutodoError, match="leaves class 9 without a train sample"):
        corrected(run, ["id,new_label", *ticks], tmp_path / "new.split")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--apply", "ticks.csv"], "give both, what to correct and where the split goes"),
        (["--split-out", "new.split"], "give both"),
        (["--apply", "t.csv", "--split-out", "s", "--step", "5"], "leave out --step and --out"),
        (["--apply", "/none.csv", "--split-out", "s"], "cannot be read as CSV"),
        (["--out", "/no/such/labels.csv"], "--out /no/such/labels.csv: cannot be written (No such file or directory)"),
        (["--step", "99"], "no checkpoint of step 99"),
    ],
)
def test_bad_words_are_one_line(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(AutodoError, match=re.escape(message)) as caught:
        call("labels", run, *words)
    assert "\n" not in str(caught.value)

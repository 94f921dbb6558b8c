"""Settings: what is wrong, where and how to mend it, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autodo_dist.config import Config, differences, settings
from autodo_dist.config_checks import remarks
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config, load_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text("data: {root: somewhere}\ntrain: {epochs: 7}\n")
    return path


def test_overrides_lie_over_the_file_and_defaults_below(file: Path) -> None:
    config = load_config(
        file, ["optim.lr=0.5", "data.mean=[0.1,0.2,0.3]", "run.name=123", "checkpoint.every_steps=null"]
    )
    assert (config.train.epochs, config.optim.lr, config.data.mean) == (7, 0.5, (0.1, 0.2, 0.3))
    assert (config.run.name, config.checkpoint.every_steps, config.train.batch_size) == ("123", None, 256)
    assert config.folder == Path("runs/123")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
        ("lr=3", "unknown key lr; did you mean"),
        ("trian.epochs=3", "unknown key trian; did you mean train?"),
        ("zzz.qqq=3", "unknown key zzz; `autodo settings` lists all"),
        ("optim.lr=abc", "optim.lr = 'abc': input should be a valid number"),
        ("optim.lr=-1", "optim.lr = -1: input should be greater than 0"),
        ("train.epochs=2.5", "train.epochs = 2.5: input should be a valid integer"),
        ("data.crop=round", "data.crop = 'round': input should be 'resized', 'padded' or 'whole'"),
        ("data.mean=[1,2]", "data.mean"),
        ("data=5", "data = 5"),
        ("data.crop_area=[0.5,0.1]", "data.crop_area = [0.5, 0.1]: value error, the smallest share comes first"),
        ("data.crop_area=[0,1]", "data.crop_area"),
        ("data.std=[0,1,1]", "data.std"),
        ("optim.lr=.inf", "optim.lr = inf: input should be a finite number"),
        ("train.epochs=true", "epochs is a number, not true"),
        ("train.epochs=???", "??? is no value"),
        ("train.epochs", "not of the form key=value"),
        ("data.root=${nowhere}", "nowhere"),
    ],
)
def test_a_bad_word_is_one_clear_line(file: Path, word: str, message: str) -> None:
    with pytest.raises(AutodoError) as caught:
        load_config(file, [word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "just words", "data: [", "- 1\n- 2\n", "train: {epochs: 3}"])
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(AutodoError, match=r"bad\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AutodoError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_every_setting_says_what_it_means() -> None:
    assert all(setting.description for setting in settings().values())


def test_differences_leave_out_what_changes_no_number() -> None:
    old = check_config({"data": {"root": "a"}}, "old")
    new: Config = check_config(
        {"data": {"root": "b", "threads": 9}, "launch": {"nodes": 4}, "optim": {"lr": 0.2}, "checkpoint": {"keep": 5}},
        "new",
    )
    assert differences(old, new) == ["optim.lr: 0.1 -> 0.2"]


def test_a_recipe_lies_under_what_is_given() -> None:
    """Above it what compat sets, above that the file; what it set is written out, and a resume compares that."""
    data = {"root": "data"}
    ours = check_config({"recipe": "autodo", "data": data, "hyper": {"lr": 0.5}}, "test")
    assert ours.learn.weight
    assert ours.learn.soft_label
    assert (ours.learn.clean_folds, ours.train.logit_adjustment) == (10, 1.0)
    assert (ours.hyper.lr, ours.hyper.solver, ours.learn.ensembling) == (0.5, "identity", 0.7)
    paper = check_config({"recipe": "paper", "compat": "autodo2021", "data": data}, "test")
    assert (paper.learn.augment, paper.learn.smoothing, paper.learn.clean_folds) == ("per_sample", 0.05, 0)
    assert paper.hyper.way == "separate"
    assert check_config(yaml.safe_load(ours.to_yaml()), "test") == ours
    spelt_out = yaml.safe_load(ours.to_yaml()) | {"recipe": None}
    assert differences(check_config(spelt_out, "test"), ours) == []
    with pytest.raises(AutodoError, match="recipe = 'ours'"):
        check_config({"recipe": "ours", "data": data}, "test")


def test_what_may_not_be_as_it_was_meant_is_said() -> None:
    root = Path(__file__).resolve().parents[1]
    assert remarks(load_config(root / "configs/digits.yaml", ["recipe=autodo"])) == [
        "learn.augment = per_sample is set, and not shared as in recipe: autodo",
        "hyper.terms = 50 is not read: hyper.solver = identity",
        "hyper.power_iterations = 10 is not read: hyper.solver = identity",
    ]
    for name in ("digits", "imagenet_r18", "imagenet_r18_paper", "imagenet_r50_deepspeed"):
        assert not remarks(load_config(root / f"configs/{name}.yaml", ["data.root=somewhere"]))

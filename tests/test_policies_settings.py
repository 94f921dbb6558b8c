"""Settings of policies: what is wrong in one line, and what a run folder keeps of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from autodo_dist import config, run_folder
from autodo_dist.data.policies import OPERATIONS, make_choice
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config, load_config


def test_the_config_knows_the_same_operations() -> None:
    assert get_args(config.Operation) == OPERATIONS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text("data: {root: somewhere}\n")
    return path


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.policy=randaugmnet", "; did you mean randaugment? (fixed augmentation"),
        ("data.policy=autoaugment_svnh", "; did you mean autoaugment_svhn?"),
        ("data.policy=custom", "data.policy = custom: custom and data.sub_policies belong together"),
        ("data.policy_strength=31", "data.policy_strength = 31: input should be less than or equal to 30"),
        ("data.policy_strength=-1", "data.policy_strength = -1"),
        ("data.policy_operations=0", "data.policy_operations = 0: input should be greater than or equal to 1"),
        ("data.erase=cutuot", "; did you mean cutout?"),
        ("data.erase_area=0", "data.erase_area = 0: input should be greater than 0"),
        ("data.erase_probability=1.5", "data.erase_probability = 1.5"),
        ("data.policy_strength=7", "data.policy_strength = 7: changes nothing here"),
        ("data.erase_area=0.5", "data.erase_area = 0.5: changes nothing here"),
        ("data.most_dropped=0.5", "data.most_dropped = 0.5: changes nothing here"),
        ("data.root=http://me:secret@host/data", "a password would be written into the run folder"),
        ("data.root=ftp://host/data", "unknown scheme ftp://"),
        ("data.sub_policies=[[[rotate,0.5,3]]]", "data.policy = none: custom and data.sub_policies belong together"),
    ],
)
def test_a_bad_setting_is_one_clear_line(file: Path, word: str, message: str) -> None:
    with pytest.raises(AutodoError) as caught:
        load_config(file, [word])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no JSON file that can be read ([Errno 2] No such file"),
        ("[[", "no JSON file that can be read (Expecting value"),
        ("[]", "custom and data.sub_policies belong together"),
        ("[[]]", "data.sub_policies.0 = []: tuple should have at least 1 item"),
        ("{}", "data.sub_policies = {}: input should be a valid tuple"),
        ('"policy.json"', "data.sub_policies = 'policy.json': input should be a valid tuple"),
        ('[[["rotat", 0.5, 3]]]', "data.sub_policies.0.0.0 = 'rotat': input should be 'identity'"),
        ('[[["rotat", 0.5, 3]]]', "; did you mean rotate?"),
        ('[[["Rotate", 0.5, 3]]]', "; did you mean rotate?"),
        ('[[["invert", 0.5, null], ["rotate", 1.5, 3]]]', "data.sub_policies.0.1.1 = 1.5: input should be less"),
        ('[[["rotate", true, 3]]]', "data.sub_policies.0.0.1 = True: input should be a valid number"),
        ('[[["rotate", NaN, 3]]]', "data.sub_policies.0.0.1 = nan: input should be a finite number"),
        ('[[["rotate", 0.5, 10]]]', "data.sub_policies.0.0.2 = 10: input should be less than or equal to 9"),
        ('[[["rotate", 0.5]]]', "data.sub_policies.0.0.2"),
        ('[["rotate", 0.5, 3]]', "data.sub_policies.0.0 = 'rotate': input should be a valid tuple"),
    ],
)
def test_a_bad_file_is_one_clear_line(file: Path, text: str | None, message: str) -> None:
    path = file.with_name("policy.json")
    if text is not None:
        path.write_text(text)
    with pytest.raises(AutodoError) as caught:
        load_config(file, ["data.policy=custom", f"data.sub_policies={path}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_level_that_is_missing_is_named() -> None:
    with pytest.raises(AutodoError, match=r"data.sub_policies.1.0: rotate has no level; give it one from 0 to 9"):
        make_choice("custom", 2, 9, [[("invert", 1.0, None)], [("rotate", 1.0, None)]], 64)


def test_the_run_folder_keeps_what_a_file_held(file: Path) -> None:
    """Another content of the same file is another run."""
    path = file.with_name("policy.json")
    path.write_text(json.dumps([[["rotate", 0.5, 3], ["invert", 1, None]], [["color", 0.1, 4.5]]]))
    words = ["data.policy=custom", f"data.sub_policies={path}", f"run.root={file.parent}"]
    first = load_config(file, words)
    first.folder.mkdir()
    (first.folder / "config.yaml").write_text(first.to_yaml())
    assert run_folder.read_config(first.folder) == first
    run_folder.check_same_run(load_config(file, words), "")
    path.write_text(json.dumps([[["rotate", 0.5, 4]]]))
    with pytest.raises(AutodoError, match=r"other settings \(data.sub_policies: \(\(\('rotate', 0.5, 3.0\)"):
        run_folder.check_same_run(load_config(file, words), "")


def test_another_policy_is_another_run() -> None:
    changed = {"policy": "randaugment", "policy_operations": 3, "policy_strength": 5, "erase": "cutout"}
    changed |= {"erase_area": 0.1, "erase_probability": 0.3}
    old, new = (check_config({"data": {"root": "a"} | more}, "") for more in ({}, changed))
    assert [line.split(":")[0] for line in config.differences(old, new)] == [f"data.{name}" for name in changed]

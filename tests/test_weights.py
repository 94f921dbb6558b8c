"""Start weights from a file: by whose names, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_checkpoint import CPU
from test_checkpoint_command import said
from test_train import run_train, settings
from torchvision.models import get_model

from autodo_dist.build import build_classifier
from autodo_dist.errors import AutodoError
from autodo_dist.load_config import check_config
from autodo_dist.models import Classifier, build_model
from autodo_dist.weights import load_weights


def by_own_names(model: Classifier) -> dict[str, torch.Tensor]:
    names = model.own_names()
    return {names[name]: value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "module."])
def test_torchvisions_weights(tmp_path: Path, wrap: str) -> None:
    """As torchvision's and timm's training programs store them, too."""
    torch.manual_seed(5)
    state = get_model("resnet18", num_classes=7).state_dict()
    stored: Any = {f"module.{name}": value for name, value in state.items()} if wrap == "module." else dict(state)
    torch.save({wrap: stored, "epoch": 3} if wrap in ("model", "state_dict") else stored, tmp_path / "weights.pth")
    model = build_model("resnet18", 7, seed=0)
    load_weights(model, tmp_path / "weights.pth")
    found = by_own_names(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_timms_weights_and_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = timm.create_model("convnext_atto", num_classes=7).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    model = build_model("timm/convnext_atto", 7, seed=0)
    load_weights(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(by_own_names(model)[name], value) for name, value in state.items())


def test_a_head_for_other_classes_starts_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = get_model("resnet18", num_classes=1000).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model, fresh = build_model("resnet18", 7, seed=0), build_model("resnet18", 7, seed=0)
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model.head.weight, fresh.head.weight)
    assert torch.equal(model.encoder.conv1.weight, state["conv1.weight"])
    assert "its head is for 1000 classes, not 7" in caplog.text


def test_an_auxiliary_head_is_left_out(tmp_path: Path) -> None:
    torch.save(get_model("googlenet", num_classes=7, init_weights=False).state_dict(), tmp_path / "weights.pth")
    load_weights(build_model("googlenet", 7, seed=0), tmp_path / "weights.pth")


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.save, (torch.zeros(1), str(self.marker))


def test_what_is_refused(tmp_path: Path) -> None:
    model = build_model("resnet18", 7, seed=0)
    state = get_model("resnet18", num_classes=7).state_dict()
    files: dict[str, Any] = {
        "1 tensors are missing, e.g. bn1.bias": {name: it for name, it in state.items() if name != "bn1.bias"},
        "1 tensors are too many, e.g. more": state | {"more": torch.zeros(1)},
        "1 tensors are of another shape, e.g. conv1.weight": state | {"conv1.weight": torch.zeros(1)},
        "holds no tensors by name": [1, 2],
    }
    for words, content in files.items():
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(AutodoError, match=words) as caught:
            load_weights(model, tmp_path / "weights.pth")
        assert "\n" not in str(caught.value)
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    (tmp_path / "cut.safetensors").write_bytes(b"{")
    for name in ("hostile.pth", "cut.safetensors", "absent.pth", "absent.safetensors"):
        with pytest.raises(AutodoError, match=f"{name}: cannot be read") as caught:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_an_export_is_a_start_and_is_not_asked_for_at_a_resume(digits: Path, tmp_path: Path) -> None:
    """A run that learns nothing ends with the weights that the first run exported."""
    first = run_train(settings(digits, tmp_path / "first", train__epochs=1, optim__warmup_epochs=0))
    said("export", first, tmp_path / "start.safetensors")
    changes = {"model__init_from": str(tmp_path / "start.safetensors"), "optim__lr": 1e-30}
    tree = settings(digits, tmp_path / "second", train__epochs=1, optim__warmup_epochs=0, **changes)
    second = run_train(tree)
    said("export", second, tmp_path / "end.safetensors")
    config = check_config(tree, "test")
    start, end = (build_classifier(config, 10, CPU) for _ in range(2))
    load_weights(start, tmp_path / "start.safetensors")
    load_weights(end, tmp_path / "end.safetensors")
    for one, other in zip(start.parameters(), end.parameters(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "start.safetensors").unlink()
    (second / "summary.json").unlink()
    run_train(tree)


def test_pictures_that_a_model_does_not_take_are_named(digits: Path, tmp_path: Path) -> None:
    config = check_config(settings(digits, tmp_path, model__name="inception_v3"), "test")
    words = r"'inception_v3': does not take pictures of 16 x 16 pixels .*set data\.image_size"
    with pytest.raises(AutodoError, match=words):
        build_classifier(config, 10, CPU)

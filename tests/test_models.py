"""Models and schedule."""

from __future__ import annotations

import copy
import sys
from unittest.mock import patch

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

from autodo_dist.errors import AutodoError
from autodo_dist.method.schedule import warmup_cosine
from autodo_dist.models import build_model, split_head


def test_a_network_without_a_final_linear_layer_is_refused() -> None:
    with pytest.raises(AutodoError, match="ends in AdaptiveAvgPool2d, not in a linear layer"):
        build_model("squeezenet1_1", 10, 0)


@pytest.mark.parametrize("name", ["convnet", "resnet18", "resnet50", "vgg11", "mobilenet_v3_small"])
def test_encoder_and_head_without_relu(name: str) -> None:
    model = build_model(name, 7, seed=1)
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert any(isinstance(module, nn.CELU) for module in model.modules())
    features, logits = model(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert torch.equal(model.head(features), logits)
    assert model.head.out_features == 7


def test_a_resnet_is_torchvisions_but_for_the_activation() -> None:
    ours = build_model("resnet18", 7, seed=3)
    torch.manual_seed(3)
    theirs = get_model("resnet18", num_classes=7)
    for child in theirs.modules():
        for name, activation in child.named_children():
            if isinstance(activation, nn.ReLU):
                setattr(child, name, nn.CELU())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images)[1], theirs.eval()(images))


def test_start_weights_come_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (build_model("convnet", 10, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_the_convnets_gradient_is_continuous() -> None:
    """What the implicit function theorem asks of the loss: no jump of the derivative where a unit switches on."""
    model = build_model("convnet", 3, seed=0).double()
    image, step = torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def gradient(at: float) -> torch.Tensor:
        x = (image + at * step).requires_grad_()
        return torch.autograd.grad(model(x)[1].square().sum(), x)[0]

    # CELU's second derivative jumps, so the gradient is Lipschitz: differences fall with the step.
    coarse, fine = (gradient(0.0) - gradient(1e-6)).norm(), (gradient(0.0) - gradient(1e-8)).norm()
    assert fine < coarse / 20


@pytest.mark.parametrize(
    ("name", "parameters"), [("wrn_28_10", 36_479_194), ("wrn_16_4", 2_748_890), ("wrn_40_2", 2_243_546)]
)
def test_wide_resnets_are_as_large_as_published(name: str, parameters: int) -> None:
    """36.5, 2.7 and 2.2 million with ten classes (Zagoruyko & Komodakis, tables 2 to 5)."""
    with torch.device("meta"):
        model = build_model(name, 10, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_wide_resnet_halves_the_picture_twice_and_starts_as_it_should() -> None:
    model = build_model("wrn_10_2", 7, 0)
    found = {}
    model.encoder.group3_0.register_forward_hook(lambda module, inputs, output: found.update(group=output))
    model(torch.randn(2, 3, 32, 32))
    assert found["group"].shape == (2, 128, 8, 8)
    deviation = model.encoder.group3_0.conv2.weight.std().item()
    assert deviation == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.01)  # He et al. 2015, by the outputs


@pytest.mark.parametrize("name", ["wrn_27_10", "wrn_4_1", "wrn_28_0", "wrn_28"])
def test_wide_resnets_that_cannot_be(name: str) -> None:
    with pytest.raises(AutodoError, match=r"6n \+ 4, e\.g\. wrn_28_10|choose wrn_28_10"):
        build_model(name, 10, 0)


def swap_modules(network: nn.Module) -> nn.Module:
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.CELU(inplace=child.inplace))
    return network


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 96), ("densenet121", 64)])
def test_calls_of_relu_are_replaced_too(name: str, side: int) -> None:
    """Against the same weights with F.relu itself replaced while the network runs; in training and evaluation."""
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = swap_modules(get_model(name, num_classes=7, **options))
    ours = split_head(copy.deepcopy(network), name)
    assert {ours.own_names()[key] for key in ours.state_dict()} == set(network.state_dict())
    images = torch.randn(2, 3, side, side)
    for training in (True, False):
        torch.manual_seed(0)  # dropout
        with patch.object(F, "relu", F.celu):
            expected = network.train(training)(images)
        torch.manual_seed(0)
        assert torch.equal(ours.train(training)(images)[1], expected)


@pytest.mark.parametrize("name", ["resnet26d", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timms_models_are_theirs_but_for_the_activation(name: str) -> None:
    """Layers behind the head, a head inside a module, a fixed size of pictures, an activation that is not ReLU."""
    ours = build_model(f"timm/{name}", 7, seed=3, image_size=64).eval()
    torch.manual_seed(3)
    sized: dict[str, int] = {"img_size": 64} if name.startswith("vit") else {}
    theirs = swap_modules(timm.create_model(name, num_classes=7, **sized)).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images)[1], theirs(images))
    assert {ours.own_names()[key] for key in ours.state_dict()} == set(theirs.state_dict())


def test_timms_models_that_cannot_be() -> None:
    with pytest.raises(AutodoError, match="ends in tuple, not in a linear layer"):
        build_model("timm/deit_tiny_distilled_patch16_224", 10, 0)
    with pytest.raises(AutodoError, match="unknown to timm; choose timm/resnet26d"):
        build_model("timm/resnet26dd", 10, 0)
    with (
        patch.dict(sys.modules, {"timm": None}),
        pytest.raises(AutodoError, match="timm is not installed; pip"),
    ):
        build_model("timm/resnet26d", 10, 0)


def test_a_transformer_is_made_for_the_size_of_the_pictures() -> None:
    assert build_model("vit_b_32", 5, 0, image_size=64)(torch.zeros(1, 3, 64, 64))[1].shape == (1, 5)
    with pytest.raises(AutodoError, match=r"vit_b_32.*indivisible by patch size.*set data\.image_size"):
        build_model("vit_b_32", 5, 0, image_size=65)
    with pytest.raises(AutodoError, match=r"maxvit_t.*not divisible.*set data\.image_size"):
        build_model("maxvit_t", 5, 0, image_size=64)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(AutodoError, match="choose resnet18 or"):
        build_model("resnet17", 10, 0)


def test_warmup_cosine_against_torch() -> None:
    """PyTorch's own LinearLR followed by CosineAnnealingLR."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[5])
    for step in range(20):
        expected = optimizer.param_groups[0]["lr"]
        assert warmup_cosine(step, peak=0.3, warmup=5, total=20) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        both.step()


def test_without_warmup_the_first_step_is_the_peak() -> None:
    assert warmup_cosine(0, peak=0.3, warmup=0, total=10) == 0.3
    assert warmup_cosine(10, peak=0.3, warmup=0, total=10) == pytest.approx(0.0)

"""Models and schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from autodo_dist.errors import AutodoError
from autodo_dist.method.schedule import warmup_cosine
from autodo_dist.models import build_model


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

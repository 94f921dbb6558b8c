"""Classifiers as an encoder and one linear head, with ReLU replaced by CELU.

AutoDO differentiates through the last linear layer alone, and the implicit function theorem needs a loss with
continuous derivatives: hence the split, and CELU (Barron 2017), which is C¹ where ReLU is not.
"""

from __future__ import annotations

import difflib

import torch
from torch import nn
from torchvision import models as torchvision_models

from autodo_dist.errors import AutodoError


class Classifier(nn.Module):
    """features_BD = encoder(images_BCHW), logits_BC = head(features_BD); `head` is the last linear layer."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of a batch of normalised pictures."""
        features_BD = self.encoder(images_BCHW)
        return features_BD, self.head(features_BD)


def build_model(name: str, classes: int, seed: int) -> Classifier:
    """A freshly initialised classifier; start weights depend on `seed` alone.

    `convnet` is for 28 to 32 px; any other name is torchvision's. AutodoError for a name that it does not know, or a
    network that does not end in a linear layer.
    """
    known = torchvision_models.list_models(module=torchvision_models)
    if name != "convnet" and name not in known:
        near = difflib.get_close_matches(name, ["convnet", *known], n=3)
        raise AutodoError(f"model.name = {name!r} is unknown; choose {' or '.join(near) or 'convnet or resnet18'}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "convnet":
            return Classifier(_convnet(128), nn.Linear(128, classes))
        return split_head(torchvision_models.get_model(name, num_classes=classes), name)


def split_head(network: nn.Module, name: str) -> Classifier:
    """Part a network into encoder and last linear layer. AutodoError if its last layer is another."""
    path, head = list(network.named_modules())[-1]
    if not isinstance(head, nn.Linear):
        raise AutodoError(
            f"model.name = {name!r}: ends in {type(head).__name__}, not in a linear layer, through which AutoDO "
            "differentiates; choose another, e.g. resnet18"
        )
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return Classifier(relu_to_celu(network), head)


def relu_to_celu(module: nn.Module) -> nn.Module:
    """Replace every nn.ReLU below `module` by nn.CELU, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.CELU(inplace=child.inplace))
        else:
            relu_to_celu(child)
    return module


def _convnet(features: int) -> nn.Module:
    """Four 3×3 convolutions. GroupNorm: its training does not depend on the number of ranks. Average pooling: C¹."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.CELU(inplace=True)]

    return nn.Sequential(
        *block(3, 32),
        nn.AvgPool2d(2),
        *block(32, 64),
        nn.AvgPool2d(2),
        *block(64, features),
        nn.AvgPool2d(2),
        *block(features, features),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )

"""Wide ResNets for small pictures (Zagoruyko & Komodakis, BMVC 2016): the networks of AutoDO's CIFAR and SVHN tables.

torchvision's wide_resnet50_2 is another family: ImageNet's bottleneck network with wider layers.
"""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
from torch import nn

NAME = re.compile(r"wrn_(\d+)_(\d+)", re.ASCII)


class Block(nn.Module):
    """Pre-activation residual block: x + conv(act(norm(conv(act(norm(x)))))).

    Where the width or the resolution changes, the shortcut is a 1×1 convolution of the activated input, as in the
    authors' code.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.activation = nn.ReLU(inplace=True)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """B × inputs × H × W -> B × outputs × H/stride × W/stride."""
        active = self.activation(self.norm1(x_BCHW))
        kept = x_BCHW if self.shortcut is None else self.shortcut(active)
        changed: torch.Tensor = self.conv2(self.activation(self.norm2(self.conv1(active))))
        return kept + changed


def wide_resnet(depth: int, width: int, classes: int) -> nn.Module:
    """WRN-depth-width; depth = 6n + 4, three groups of n blocks with 16, 32 and 64 times `width` channels."""
    channels, blocks = (16 * width, 32 * width, 64 * width), (depth - 4) // 6
    layers: list[tuple[str, nn.Module]] = [("stem", nn.Conv2d(3, 16, 3, padding=1, bias=False))]
    inputs = 16
    for number, outputs in enumerate(channels, start=1):
        for k in range(blocks):
            stride = 2 if number > 1 and k == 0 else 1
            layers.append((f"group{number}_{k}", Block(inputs, outputs, stride)))
            inputs = outputs
    layers += [("norm", nn.BatchNorm2d(inputs)), ("activation", nn.ReLU(inplace=True))]
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(inputs, classes))]
    network = nn.Sequential(OrderedDict(layers))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network

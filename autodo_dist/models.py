"""Classifiers as an encoder and one linear head, with ReLU replaced by CELU.

AutoDO differentiates through the last linear layer alone, and the implicit function theorem needs a loss with
continuous derivatives: hence the split, and CELU (Barron 2017), which is C¹ where ReLU is not.

    convnet            ours, for 28 to 32 px
    wrn_DEPTH_WIDTH    Wide ResNets for small pictures, e.g. wrn_28_10
    resnet18, …        any classifier of torchvision that ends in a linear layer
    timm/NAME          any such one of timm, where that is installed
"""

from __future__ import annotations

import contextlib
import difflib
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision import models as torchvision_models

from autodo_dist.errors import AutodoError
from autodo_dist.wide_resnet import NAME as WIDE_RESNET
from autodo_dist.wide_resnet import wide_resnet

# What torchvision's builders want to know beside the number of classes.
NO_AUXILIARY = {"aux_logits": False, "init_weights": True}  # their loss has more than one head
RELUS = (F.relu, torch.relu)


class Classifier(nn.Module):
    """features_BD = encoder(images_BCHW), logits_BC = head(features_BD); `head` is the last linear layer.

    head_path: its name in the network that was parted, where that is somebody else's; see `own_names`. autocast: the
    type in which the encoder computes where torch deems it safe; None: that of the weights, which the head always has.
    memory_format: of the pictures, which those of the weights should have too.
    """

    autocast: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def __init__(self, encoder: nn.Module, head: nn.Linear, head_path: str | None = None) -> None:
        super().__init__()
        self.encoder, self.head, self.head_path = encoder, head, head_path

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of a batch of normalised pictures."""
        images_BCHW = images_BCHW.contiguous(memory_format=self.memory_format)
        narrow = self.autocast is not None  # the meta device, on which plans are made, knows no autocast
        with torch.autocast(images_BCHW.device.type, self.autocast) if narrow else contextlib.nullcontext():
            features_BD = self.encoder(images_BCHW)
        features_BD = features_BD.to(self.head.weight.dtype)
        return features_BD, self.head(features_BD)

    def own_names(self) -> dict[str, str]:
        """The names in our state_dict -> those in the state_dict of the network that was parted."""
        names = self.state_dict().keys()
        if self.head_path is None:
            return {name: name for name in names}
        parts = (name.partition(".") for name in names)
        return {
            f"{part}.{rest}": rest if part == "encoder" else f"{self.head_path}.{rest}".lstrip(".")
            for part, _, rest in parts
        }


def build_model(name: str, classes: int, seed: int, image_size: int = 224) -> Classifier:
    """A freshly initialised classifier; start weights depend on `seed` alone.

    image_size: side of the pictures, which transformers are made for. AutodoError for a name that is not known, or a
    network that does not end in a linear layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "convnet":
            return Classifier(_convnet(128), nn.Linear(128, classes))
        if found := WIDE_RESNET.fullmatch(name):
            depth, width = map(int, found.groups())
            if depth < 10 or (depth - 4) % 6 or width < 1:
                raise AutodoError(f"model.name = {name!r}: the depth of a Wide ResNet is 6n + 4, e.g. wrn_28_10")
            return split_head(wide_resnet(depth, width, classes), name)
        if name.startswith("timm/"):
            return split_head(_timm(name, classes, image_size), name)
        return split_head(_torchvision(name, classes, image_size), name)


def _torchvision(name: str, classes: int, image_size: int) -> nn.Module:
    known = torchvision_models.list_models(module=torchvision_models)
    if name not in known:
        near = difflib.get_close_matches(name, ["convnet", "wrn_28_10", *known], n=3)
        raise AutodoError(f"model.name = {name!r} is unknown; choose {' or '.join(near) or 'convnet or resnet18'}")
    options: dict[str, Any] = {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        options |= NO_AUXILIARY
    elif name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    try:
        network: nn.Module = torchvision_models.get_model(name, **options)
    except (ValueError, AssertionError) as error:
        raise AutodoError(f"model.name = {name!r}: {' '.join(str(error).split())}; set data.image_size") from error
    return network


def _timm(name: str, classes: int, image_size: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise AutodoError(f"model.name = {name!r}: timm is not installed; pip install timm") from error
    wanted = name.removeprefix("timm/")
    if not timm.is_model(wanted):
        near = difflib.get_close_matches(wanted, timm.list_models(), n=3)
        known = " or timm/".join(near) or "resnet50d"
        raise AutodoError(f"model.name = {name!r} is unknown to timm; choose timm/{known}")
    options: dict[str, Any] = {"num_classes": classes}
    if timm.get_pretrained_cfg_value(wanted, "fixed_input_size"):
        options["img_size"] = image_size
    network: nn.Module = timm.create_model(wanted, pretrained=False, **options)
    return network


def split_head(network: nn.Module, name: str) -> Classifier:
    """Part a network into encoder and last linear layer. AutodoError if its last layer is another."""
    path, head = list(network.named_modules())[-1]
    ask: Any = getattr(network, "get_classifier", None)
    if ask is not None:  # timm knows, and has layers behind it that do nothing
        head = ask()
        path = next((path for path, module in network.named_modules() if module is head), "")
    if not isinstance(head, nn.Linear):
        raise AutodoError(
            f"model.name = {name!r}: ends in {type(head).__name__}, not in a linear layer, through which AutoDO "
            "differentiates; choose another, e.g. resnet18"
        )
    network = relu_to_celu(network)
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return Classifier(network, head, path)


def relu_to_celu(network: nn.Module) -> nn.Module:
    """Replace every ReLU of a network by CELU, in place where it can be: modules first, then calls of F.relu.

    The calls are found and replaced by torch.fx (googlenet, inception_v3 and the densenets have some). A network that
    fx cannot trace keeps them.
    """
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.CELU(inplace=child.inplace))
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # whatever its forward does not accept a stand-in for
        return network
    calls = [node for node in traced.graph.nodes if node.op == "call_function" and node.target in RELUS]
    for node in calls:
        node.target = F.celu
        node.args, node.kwargs = node.args[:1], {"inplace": bool(node.kwargs.get("inplace", False))}
    traced.recompile()
    return traced if calls else network


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

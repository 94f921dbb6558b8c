"""Start weights from a file: an export of ours, or weights that torchvision or timm published.

Those were trained with ReLU and now meet CELU, so they are a start for training and not a finished model.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from autodo_dist.errors import AutodoError
from autodo_dist.models import Classifier

log = logging.getLogger(__name__)
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # further heads of googlenet and inception_v3, which ours do not have
WRAPPERS = ("model", "state_dict")  # where training programs put the weights in their checkpoints


def load_weights(model: Classifier, path: Path) -> None:
    """Fill `model` from a file with the names that the network has at home; types are converted.

    A head for another number of classes is left as it is, with a warning. AutodoError if the file cannot be read, or
    its tensors are not those of the model otherwise.
    """
    found = read_weights(path)
    names, ours = model.own_names(), model.state_dict()
    head = {names["head.weight"], names.get("head.bias", "")}
    if names["head.weight"] in found and found[names["head.weight"]].shape != ours["head.weight"].shape:
        log.warning(
            "model.init_from %s: its head is for %d classes, not %d; the head starts afresh",
            path,
            len(found[names["head.weight"]]),
            model.head.out_features,
        )
        found = {name: value for name, value in found.items() if name not in head}
        names = {name: other for name, other in names.items() if other not in head}
    wrong = [name for name, other in names.items() if other in found and found[other].shape != ours[name].shape]
    missing = [other for other in names.values() if other not in found]
    spare = [name for name in found.keys() - set(names.values()) if not name.startswith(AUXILIARY)]
    for what, those in (
        ("of another shape", [names[it] for it in wrong]),
        ("missing", missing),
        ("too many", spare),
    ):
        if those:
            raise AutodoError(
                f"model.init_from = {path}: {len(those)} tensors are {what}, e.g. {sorted(those)[0]}; "
                "take weights of the network that model.name says"
            )
    model.load_state_dict({name: found[other] for name, other in names.items()}, strict=False)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of one that torch.save wrote, read without running what it holds."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AutodoError(f"model.init_from = {path}: cannot be read ({reason}); name another file") from None
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise AutodoError(f"model.init_from = {path}: holds no tensors by name; take a state_dict")
    return {str(name).removeprefix("module."): value for name, value in found.items()}

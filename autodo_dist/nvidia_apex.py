"""What `import apex` would find: NVIDIA's package with fused optimizers, or another; and those optimizers.

PyPI's `apex` is a toolkit for Pyramid. NVIDIA's is on no package index: it is built from its source, and without
APEX_CUDA_EXT it comes without the kernels (its extension module amp_C) that its optimizers need.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autodo_dist.errors import AutodoError

if TYPE_CHECKING:
    import torch

# The head of its default branch in August 2026 (https://github.com/NVIDIA/apex/issues/2024). It leaves the C++ standard
# to torch, whose headers want C++20 since 2.13 (https://github.com/NVIDIA/apex/pull/2006); release 25.09 is older.
COMMIT = "9e3568a6f90fbc1996a06f8f9e99310bdaf2253a"
BUILD = (
    f"APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex@{COMMIT}"
)
CLASSES = {"sgd": "FusedSGD", "adamw": "FusedAdam", "lamb": "FusedLAMB"}


@dataclass(frozen=True)
class Apex:
    """What is there, in one line, and what to type to have NVIDIA's with its kernels."""

    kind: Literal["nvidia", "no_kernels", "absent", "folder", "other"]
    what: str
    cure: str = ""


def find() -> Apex:
    """Tell NVIDIA's apex from others by its files: nothing is imported."""
    spec = find_spec("apex")
    if spec is None:
        return Apex("absent", "apex is not installed", BUILD)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    place = folders[0] if folders else spec.origin
    if any((folder / "optimizers" / "__init__.py").is_file() for folder in folders):
        if find_spec("amp_C") is not None:
            return Apex("nvidia", f"NVIDIA's, in {place}")
        return Apex("no_kernels", f"NVIDIA's, in {place}, built without its CUDA kernels (no module amp_C)", BUILD)
    if spec.origin is None:
        what = f"{place} is a folder, no package, yet `import apex` finds it"
        return Apex("folder", what, "run from another folder, or install it from there")
    try:
        known = metadata.metadata("apex")
        kind = ", ".join(known[key] for key in ("Version", "Summary") if key in known)
    except metadata.PackageNotFoundError:
        kind = "without optimizers"
    what = " ".join(f"{place} is another project ({kind}), not NVIDIA's".split())
    return Apex("other", what, f"pip uninstall apex; NVIDIA's: {BUILD}")


def optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """NVIDIA's class for sgd, adamw or lamb. AutodoError if it is not there or has no GPU to run on."""
    asked, found = "optim.implementation = apex", find()
    if found.kind != "nvidia":
        raise AutodoError(f"{asked}: {found.what}; {found.cure}; or set optim.implementation=torch")
    import torch  # before the extension, which links to its libraries

    if not torch.cuda.is_available():
        raise AutodoError(f"{asked}: torch finds no GPU, and its kernels need one; set optim.implementation=torch")
    try:
        importlib.import_module("amp_C")
        made: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module("apex.optimizers"), CLASSES[name])
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise AutodoError(
            f"{asked}: {found.what}, cannot be imported ({why}); build it for this torch: {BUILD}"
        ) from error
    return made

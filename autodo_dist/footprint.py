"""What a network needs for a picture, found without a GPU: its steps are made on PyTorch's meta device.

There tensors have shapes but no numbers, so any batch takes no memory and a fraction of a second. Operations are those
of torch's FLOP counter (products and convolutions); memory is the most that is alive at once, counted by storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from autodo_dist.method.hypergrad import Pictures, Rows, augmented, frozen
from autodo_dist.models import Classifier, build_model
from autodo_dist.plan import Footprint, Line

META = torch.device("meta")
FEWEST = 2  # BatchNorm over a 1 × 1 map cannot train on one picture


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors made under it that are alive; `peak` is their most. Those of `known` do not count."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, result)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measure(
    name: str, classes: int, image_size: int, pictures: int, dtype: torch.dtype, augment: Pictures | None, factors: bool
) -> Footprint:
    """The footprint of network `name` on square pictures, exact at a rank's batch of `pictures` (2 or more).

    augment: what learnt augmentation does to pictures, None where none is learnt; seven operations stand for all.
    factors: whether λ^A takes the gradients of the task step's own backward (hyper.solver = fisher).
    """
    with META:
        model = build_model(name, classes, 0, image_size).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    small, large = (max(FEWEST, count) for count in (pictures, 2 * pictures))
    steps: dict[str, Callable[[torch.Tensor], None]] = {
        "task": lambda images: task(model, images, augment, learnt=False, factors=False),
        "hyper": lambda images: hyper(model, images, augment),
        "shared": lambda images: task(model, images, augment, learnt=augment is not None, factors=factors),
        "validation": lambda images: hyper(model, images, None),
    }
    flops, alive = {}, {}
    for step, make in steps.items():
        model.train(step in ("task", "shared"))
        flops[step], low = count(model, make, small, image_size, dtype)
        _, high = count(model, make, large, image_size, dtype)
        each = (high - low) / (large - small)
        alive[step] = Line(low - each * small, each)
    return Footprint(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        buffers=tuple(buffer.nbytes for buffer in model.buffers()),
        features=model.head.in_features,
        flops=flops,
        alive=alive,
    )


def count(
    model: Classifier, make: Callable[[torch.Tensor], None], pictures: int, side: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Operations for a picture, and the most bytes alive, of a step on that many pictures."""
    images = torch.empty(pictures, 3, side, side, dtype=dtype, device=META)
    known = [images, *model.parameters(), *model.buffers()]
    known += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with FlopCounterMode(display=False) as flops, Alive(known) as alive:
        make(images)
    return flops.get_total_flops() / pictures, float(alive.peak)


def task(model: Classifier, images: torch.Tensor, augment: Pictures | None, *, learnt: bool, factors: bool) -> None:
    """Forward and backward of a task step; `learnt`: with the gates as leaves, as the shared way has them."""
    moved, leaves = warped(images, augment, learnt)
    features, logits = model(moved)
    if leaves and not factors:
        torch.autograd.grad(features, leaves, grad_outputs=torch.empty_like(features), retain_graph=True)
    logits.sum().backward()


def hyper(model: Classifier, images: torch.Tensor, augment: Pictures | None) -> None:
    """Forward of a hyper step with frozen weights, and the backward through activations where λ^A is learnt."""
    moved, leaves = warped(images, augment, augment is not None)
    with torch.set_grad_enabled(bool(leaves)):
        features = frozen(model.encoder)(moved)
        model.head(features.detach())
    if leaves:
        torch.autograd.grad(features, leaves, grad_outputs=torch.empty_like(features))


def warped(images: torch.Tensor, augment: Pictures | None, learnt: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pictures under learnt operations, and the leaves of their gates and magnitudes."""
    if augment is None:
        return images, []
    logits, draws = torch.empty(7, dtype=images.dtype, device=META), torch.empty(len(images), 14, device=META)
    rows, leaves = Rows(logits, logits).with_leaves(len(images))
    with torch.set_grad_enabled(learnt):
        return augmented(images, rows, draws, augment), leaves if learnt else []

"""Pictures through DALI: on a GPU all of it, on the CPU the decoding (torchvision_pixels.py does the rest there)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types

from autodo_dist.data import dali_operations
from autodo_dist.data.decode import Decoder, Pipeline
from autodo_dist.data.order import Crop
from autodo_dist.data.pixels import Finish, Pictures
from autodo_dist.data.shards import Encoded
from autodo_dist.errors import DecodeError

SHARES: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": True, "normalized_shape": True}


class Batches:
    """A DALI pipeline that decodes up to `most` pictures, with so many threads; `gpu` is the index of the one that
    decodes, None: the CPU does.

    Headers are parsed first, in a pipeline of their own: where one does not parse among pictures that are being
    decoded, DALI 2.4 may crash, as it goes on decoding the others into memory that it has given back. A picture that
    parses and then does not decode is an exception, as it should be (283 of 283 broken batches).
    """

    def __init__(
        self,
        graph: Callable[..., Any],
        *arguments: Any,
        most: int,
        threads: int,
        gpu: int | None,
        enable_conditionals: bool = False,
    ) -> None:
        self._headers = Pipeline(_headers, most=most, threads=threads, gpu=None)
        self._pictures = Pipeline(
            graph, *arguments, most=most, threads=threads, gpu=gpu, enable_conditionals=enable_conditionals
        )
        self._alone = Decoder()

    def run(self, encoded: list[Encoded], **feed: Any) -> Any:
        """The output for a batch, valid until the next run. DecodeError if a picture does not decode."""
        self._headers.run(encoded=encoded)
        return self._pictures.run(encoded=encoded, **feed)

    def fault(self, encoded: Encoded) -> str | None:
        """See Pixels. DALI does not say which picture of a batch it could not decode, so each is tried alone."""
        try:
            self._alone.shape(encoded.tobytes())
        except DecodeError as why:
            return str(why)
        return None


class DaliPixels:
    """Pixels through DALI alone; see Batches."""

    def __init__(self, finish: Finish, most: int, threads: int, gpu: int | None) -> None:
        on_gpu, conditional = gpu is not None, finish.operations > 0
        self._batches = Batches(
            _graph, finish, on_gpu, most=most, threads=threads, gpu=gpu, enable_conditionals=conditional
        )
        self._finish, self.fault = finish, self._batches.fault

    def decode(self, pictures: Pictures) -> torch.Tensor:
        """See Pixels."""
        images = self._batches.run(pictures.encoded, **_inputs(pictures, self._finish))
        # Outputs live in DALI's own buffers until its next run.
        return torch.from_dlpack(images.as_tensor()).clone()


class DaliWindows:
    """Windows through DALI on the CPU; see Batches."""

    def __init__(self, crop: Crop, most: int, threads: int) -> None:
        self._batches = Batches(_windows, crop, False, most=most, threads=threads, gpu=None)
        self.fault = self._batches.fault

    def decode(self, pictures: Pictures) -> Sequence[torch.Tensor] | torch.Tensor:
        """See Windows."""
        found = self._batches.run(pictures.encoded, origin=pictures.origin_B2, size=pictures.size_B2)
        if found.is_dense_tensor():
            return torch.from_dlpack(found.as_tensor()).permute(0, 3, 1, 2)
        return [torch.from_dlpack(found[at]).permute(2, 0, 1) for at in range(len(pictures))]


def _headers() -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.peek_image_shape(encoded)


def _inputs(pictures: Pictures, finish: Finish) -> dict[str, Any]:
    """What the graph takes from outside beside the encoded pictures, by name."""
    found: dict[str, Any] = {"origin": pictures.origin_B2, "size": pictures.size_B2, "flip": pictures.flip_B}
    if finish.operations and pictures.drawn:
        found |= {"operation": pictures.drawn.operation_BK, "strength": pictures.drawn.strength_BK}
    if finish.erases and pictures.drawn:
        found["erased"] = pictures.drawn.erased_B4.astype(np.float32)
    return found


def _windows(crop: Crop, gpu: bool) -> Any:
    """The windows of a batch; where they may reach outside, which the decoder cannot cut, of the whole pictures."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    origin, size = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("origin", "size"))
    device = "mixed" if gpu else "cpu"
    if crop.kind != "padded":
        return fn.decoders.image_slice(encoded, origin, size, device=device, output_type=types.RGB, **SHARES)
    whole = fn.decoders.image(encoded, device=device, output_type=types.RGB)
    return fn.slice(whole, origin, size, out_of_bounds_policy="pad", fill_values=0, **SHARES)


def _graph(finish: Finish, gpu: bool) -> Any:
    """What DALI does to a batch."""
    crop = finish.crop
    images = _windows(crop, gpu)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    images = fn.resize(images, size=[crop.image_size, crop.image_size], antialias=True)
    if finish.operations:
        images, flip = _augmented(fn.flip(images, horizontal=flip), finish.operations), 0
    images = fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mirror=flip,
        mean=[255 * value for value in finish.mean],
        std=[255 * value for value in finish.std],
    )
    return _erased(images) if finish.erases else images


def _augmented(images: Any, operations: int) -> Any:
    """Pictures under so many operations of a policy, one after another."""
    operation = fn.external_source(name="operation", dtype=types.INT32, ndim=1)
    strength = fn.external_source(name="strength", dtype=types.FLOAT, ndim=1)
    for at in range(operations):
        images = dali_operations.apply(images, operation[at], strength[at])
    return images


def _erased(images: Any) -> Any:
    """Normalised pictures (C × H × W) with their rectangles set to 0, the mean."""
    erased = fn.external_source(name="erased", dtype=types.FLOAT, ndim=1)
    return fn.erase(images, anchor=erased[0:2], shape=erased[2:4], axis_names="HW", fill_value=0)

"""Pictures through DALI, on the CPU or the GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types

from autodo_dist.data.decode import SYNCHRONOUS, Decoder, reason
from autodo_dist.data.pixels import DecodeError, Finish, Pictures
from autodo_dist.data.shards import Encoded
from autodo_dist.errors import AutodoError


class DaliPixels:
    """Pixels through one DALI pipeline of at most `most` pictures, with so many threads; `gpu` is the index of the one
    that decodes, None: the CPU does.
    """

    def __init__(self, finish: Finish, most: int, threads: int, gpu: int | None) -> None:
        self._build = functools.partial(
            pipeline_def(_graph), finish, gpu, batch_size=most, num_threads=threads, device_id=gpu, **SYNCHRONOUS
        )

    @functools.cached_property
    def _pipeline(self) -> Any:
        """DALI's threads and buffers, made when the first pass begins."""
        pipeline = self._build()
        pipeline.build()
        return pipeline

    def decode(self, pictures: Pictures) -> torch.Tensor:
        """See Pixels."""
        try:
            (images,) = self._pipeline.run(
                encoded=pictures.encoded, origin=pictures.origin_B2, size=pictures.size_B2, flip=pictures.flip_B
            )
        except RuntimeError as error:
            del self._pipeline  # DALI gives up a pipeline that has failed
            raise DecodeError(f"DALI failed: {reason(error)}") from error
        # Outputs live in DALI's own buffers until its next run.
        return torch.from_dlpack(images.as_tensor()).clone()

    def fault(self, encoded: Encoded) -> str | None:
        """See Pixels. DALI does not say which picture of a batch it could not decode, so each is tried alone."""
        try:
            Decoder().shape(encoded.tobytes())
        except AutodoError as why:
            return str(why)
        return None


def _graph(finish: Finish, gpu: int | None) -> Any:
    """What DALI does to a batch."""
    crop, relative = finish.crop, {"axis_names": "HW", "normalized_anchor": True, "normalized_shape": True}
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    origin, size = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("origin", "size"))
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    device = "cpu" if gpu is None else "mixed"
    if crop.kind == "padded":  # the window reaches outside, which the decoder's own slice cannot
        whole = fn.decoders.image(encoded, device=device, output_type=types.RGB)
        images = fn.slice(whole, origin, size, out_of_bounds_policy="pad", fill_values=0, **relative)
    else:
        images = fn.decoders.image_slice(encoded, origin, size, device=device, output_type=types.RGB, **relative)
    images = fn.resize(images, size=[crop.image_size, crop.image_size], antialias=True)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mirror=flip,
        mean=[255 * value for value in finish.mean],
        std=[255 * value for value in finish.std],
    )

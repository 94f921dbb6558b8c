"""Pictures through PIL and torchvision, for machines on which DALI does not install; always on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from autodo_dist.data import pil, torchvision_operations
from autodo_dist.data.pixels import Finish, Pictures
from autodo_dist.data.shards import Encoded
from autodo_dist.errors import DecodeError


class TorchvisionPixels:
    """Pixels through PIL and torchvision, whose own decoders are deprecated, with so many threads.

    Decoded pictures are DALI's (16-bit ones to 1 of 255); resized ones differ by 0.2 of 255 in the mean and 4 at most
    (tests/test_pixels.py).
    """

    def __init__(self, finish: Finish, threads: int) -> None:
        self.finish = finish
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, pictures: Pictures) -> torch.Tensor:
        """See Pixels."""
        try:
            images = torch.stack(list(self._threads.map(partial(_cut, self.finish, pictures), range(len(pictures)))))
        except pil.FAULTS as error:
            raise DecodeError(" ".join(str(error).split())) from error
        scaled = F.to_dtype(images, torch.float32, scale=True)
        normalised: torch.Tensor = F.normalize(scaled, list(self.finish.mean), list(self.finish.std))
        if self.finish.erases and pictures.drawn:
            for image, (top, left, height, width) in zip(normalised, pictures.drawn.erased_B4.tolist(), strict=True):
                image[:, top : top + height, left : left + width] = 0
        return normalised

    def fault(self, encoded: Encoded) -> str | None:
        """See Pixels."""
        try:
            pil.decode(encoded.tobytes())
        except pil.FAULTS as error:
            return " ".join(str(error).split())[:200]
        return None


def _cut(finish: Finish, pictures: Pictures, at: int) -> torch.Tensor:
    """The window of the picture at this place, resized, maybe mirrored and under its policy's operations, uint8."""
    side, drawn = finish.crop.image_size, pictures.drawn
    image = torch.from_numpy(pil.decode(pictures.encoded[at].tobytes())).permute(2, 0, 1)
    shape = image.shape[1:]
    (top, left), (rows, columns) = np.rint(pictures.origin_B2[at] * shape), np.rint(pictures.size_B2[at] * shape)
    image = F.crop(image, int(top), int(left), int(rows), int(columns))  # zeros where it reaches outside
    resized: torch.Tensor = F.resize(image, [side, side], antialias=True)
    mirrored = resized.flip(2) if pictures.flip_B[at] else resized
    if drawn is None:
        return mirrored
    return torchvision_operations.apply(mirrored, drawn.operation_BK[at], drawn.strength_BK[at])

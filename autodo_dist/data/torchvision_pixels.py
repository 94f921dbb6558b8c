"""Pictures on the CPU: a decoder cuts the windows out, torchvision does the rest.

DALI decodes faster than PIL and resizes on the CPU ten times slower than torchvision (docs/loader.md): so it decodes
here, and PIL does where DALI is not installed. Their windows are the same, bit for bit, but for 16-bit pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from autodo_dist.data import pil, torchvision_operations
from autodo_dist.data.pixels import Finish, Pictures
from autodo_dist.data.shards import Encoded
from autodo_dist.errors import DecodeError


class Windows(Protocol):
    """Decodes pictures, and cuts the windows out."""

    def decode(self, pictures: Pictures) -> Sequence[torch.Tensor] | torch.Tensor:
        """The windows, 3 × h × w uint8 each or B × 3 × h × w, valid until the next call. DecodeError if a picture does
        not decode.
        """

    def fault(self, encoded: Encoded) -> str | None:
        """See Pixels."""


class TorchvisionPixels:
    """Pixels on the CPU, with so many threads; see the module."""

    def __init__(self, finish: Finish, threads: int, windows: Windows) -> None:
        self.finish, self.windows = finish, windows
        self.fault = windows.fault
        self._count, self._threads = threads, ThreadPoolExecutor(threads, thread_name_prefix="pixels")
        scale = 255 * torch.tensor(finish.std)[:, None, None]
        self._factor, self._offset = 1 / scale, -255 * torch.tensor(finish.mean)[:, None, None] / scale

    def decode(self, pictures: Pictures) -> torch.Tensor:
        """See Pixels. Windows of one shape, as small pictures have, share their calls: one part for each thread."""
        side, count = self.finish.crop.image_size, len(pictures)
        images = torch.empty(count, 3, side, side)
        windows = self.windows.decode(pictures)
        alike = isinstance(windows, torch.Tensor) or len({window.shape for window in windows}) == 1
        size = -(-count // self._count) if alike else 1
        parts = [slice(start, start + size) for start in range(0, count, size)]
        for _ in self._threads.map(partial(self._finish, images, pictures, windows), parts):
            pass
        return images

    def _finish(
        self, images: torch.Tensor, pictures: Pictures, windows: Sequence[torch.Tensor] | torch.Tensor, part: slice
    ) -> None:
        """Resize, mirror, do the policy's operations, normalise, erase pictures of one shape, into `images`."""
        done = F.resize(_together(windows[part]), list(images.shape[2:]), antialias=True)
        flip_b, drawn = pictures.flip_B[part], pictures.drawn
        if flip_b.any():
            done = torch.where(torch.from_numpy(flip_b).bool()[:, None, None, None], done.flip(3), done)
        if drawn is not None:
            each = zip(done, drawn.operation_BK[part], drawn.strength_BK[part], strict=True)
            done = torch.stack([torchvision_operations.apply(*one) for one in each])
        images[part].copy_(done).mul_(self._factor).add_(self._offset)
        if self.finish.erases and drawn is not None:
            for image, (top, left, height, width) in zip(images[part], drawn.erased_B4[part].tolist(), strict=True):
                image[:, top : top + height, left : left + width] = 0


def _together(windows: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """Windows of one shape as one tensor, with pixels side by side as decoders give them: torchvision resizes these
    twice as fast, and plain stacking would undo it.
    """
    if isinstance(windows, torch.Tensor):
        return windows
    return torch.stack([window.permute(1, 2, 0) for window in windows]).permute(0, 3, 1, 2)


class PilWindows:
    """Windows through PIL, with so many threads; torchvision's own decoders are deprecated."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, pictures: Pictures) -> list[torch.Tensor]:
        """See Windows."""
        try:
            return list(self._threads.map(partial(_cut, pictures), range(len(pictures))))
        except pil.FAULTS as error:
            raise DecodeError(pil.reason(error)) from error

    def fault(self, encoded: Encoded) -> str | None:
        """See Pixels."""
        try:
            pil.decode(encoded.tobytes())
        except pil.FAULTS as error:
            return pil.reason(error)
        return None


def _cut(pictures: Pictures, at: int) -> torch.Tensor:
    """The window of the picture at this place; black where it reaches outside."""
    image = torch.from_numpy(pil.decode(pictures.encoded[at].tobytes())).permute(2, 0, 1)
    shape = image.shape[1:]
    (top, left), (rows, columns) = np.rint(pictures.origin_B2[at] * shape), np.rint(pictures.size_B2[at] * shape)
    cut: torch.Tensor = F.crop(image, int(top), int(left), int(rows), int(columns))
    return cut

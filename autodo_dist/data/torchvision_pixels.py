"""Pictures through torchvision, for machines on which DALI does not install, always on the CPU."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from autodo_dist.data.pixels import DecodeError, Finish, Pictures
from autodo_dist.data.shards import Encoded


class TorchvisionPixels:
    """Pixels through torchvision, with so many threads.

    Other than DALI's by what their JPEG decoders and resize filters differ: tests/test_pixels.py has the figures.
    """

    def __init__(self, finish: Finish, threads: int) -> None:
        self.finish = finish
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, pictures: Pictures) -> torch.Tensor:
        """See Pixels."""
        each = pictures.encoded, pictures.origin_B2, pictures.size_B2, pictures.flip_B
        try:
            images = torch.stack(list(self._threads.map(partial(_cut, self.finish), *each)))
        except (RuntimeError, OSError, ValueError, SyntaxError) as error:
            raise DecodeError(" ".join(str(error).split())) from error
        scaled = F.to_dtype(images, torch.float32, scale=True)
        normalised: torch.Tensor = F.normalize(scaled, list(self.finish.mean), list(self.finish.std))
        return normalised

    def fault(self, encoded: Encoded) -> str | None:
        """See Pixels."""
        try:
            decode(encoded)
        except (RuntimeError, OSError, ValueError, SyntaxError) as error:
            return " ".join(str(error).split())[:200]
        return None


def _cut(
    finish: Finish,
    encoded: Encoded,
    origin: npt.NDArray[np.float32],
    size: npt.NDArray[np.float32],
    flip: np.int32,
) -> torch.Tensor:
    """The window of a picture, resized and maybe mirrored, uint8."""
    image, side = decode(encoded), finish.crop.image_size
    height, width = image.shape[1:]
    (top, left), (rows, columns) = np.rint(origin * (height, width)), np.rint(size * (height, width))
    image = F.crop(image, int(top), int(left), int(rows), int(columns))  # zeros where it reaches outside
    resized: torch.Tensor = F.resize(image, [side, side], antialias=True)
    return resized.flip(2) if flip else resized


def decode(encoded: Encoded) -> torch.Tensor:
    """A picture as RGB (3 × H × W, uint8) with its EXIF orientation applied; 16-bit values are scaled.

    RuntimeError or one of PIL's errors if it does not decode.
    """
    try:
        image = decode_image(torch.from_numpy(encoded), ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:  # torchvision reads JPEG, PNG, WebP and GIF; PIL reads the rest, or says what is wrong
        with Image.open(io.BytesIO(encoded.tobytes())) as picture:
            upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I;16"):  # PIL's own conversion clips at 255
            upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
    scaled: torch.Tensor = F.to_dtype(image, torch.uint8, scale=True)
    return scaled

"""Pictures through PIL: the same pixels as DALI's, where DALI is not installed or would be in the way."""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

# What PIL's decoders answer broken bytes with.
FAULTS = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


def reason(error: BaseException) -> str:
    """Why a picture does not decode, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "no known picture format"
    return " ".join(f"{error or type(error).__name__}".split())[:200]


def decode(encoded: bytes) -> npt.NDArray[np.uint8]:
    """A picture as RGB (H × W × 3), turned by its EXIF orientation, 16-bit values scaled, alpha dropped.

    One of `FAULTS` if it does not decode.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        if image.format == "PNG":  # decoding does not look at the checksums of a PNG's data
            image.verify()
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits: PIL's own conversion clips at 255
        upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
    return np.array(upright.convert("RGB"))

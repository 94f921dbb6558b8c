"""Pixels -> encoded pictures: PNG for arrays, JPEG for pictures that are made smaller."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from autodo_dist.data import pil


def png(image: Image.Image) -> bytes:
    """Encode without loss."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Shrink:
    """Makes a picture smaller: its longer side becomes `max_side` pixels, its format JPEG of `quality` (1 to 95).

    The picture is decoded as training would decode the original: RGB, turned by its EXIF orientation, 16 bits scaled to
    8, an alpha channel dropped. Then it is resized by a Lanczos filter, as wide as the shrinking needs.
    """

    max_side: int
    quality: int

    def applies(self, height: int, width: int) -> bool:
        """Whether the picture is larger. One that is not keeps its bytes: it is neither enlarged nor encoded again."""
        return max(height, width) > self.max_side

    def __call__(self, encoded: bytes) -> tuple[bytes, int, int]:
        """Return (JPEG, height, width) of a picture that is known to decode."""
        image = Image.fromarray(pil.decode(encoded))
        image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS, reducing_gap=None)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.quality)
        return file.getvalue(), image.height, image.width

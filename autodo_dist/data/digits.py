"""The embedded data set: scikit-learn's handwritten digits."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

from autodo_dist.data.encode import png
from autodo_dist.data.sources import SPLIT, TEST, TRAIN, VALIDATION, Source, draw_part, stream

SHARD_SAMPLES = 256  # a few hundred kB, but several shards a part


def digits_sources(seed: int, validation_fraction: float, test_fraction: float) -> tuple[list[str], list[Source]]:
    """Class names and pictures of scikit-learn's 1,797 handwritten digits, as grey PNGs of 32 × 32 pixels.

    The fractions are those of `draw_part`: test is drawn first, validation from what is left.
    """
    from sklearn.datasets import load_digits  # only this source needs scikit-learn

    scans_NHW, labels_N = load_digits(return_X_y=True)
    scans_NHW = np.round(scans_NHW.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    sources = [
        Source(f"digit-{index:05d}", "png", int(label), TRAIN, partial(_enlarged, scan_HW))
        for index, (scan_HW, label) in enumerate(zip(scans_NHW, labels_N, strict=True))
    ]
    generator = stream(seed, SPLIT)
    for part, fraction in ((TEST, test_fraction), (VALIDATION, validation_fraction)):
        sources = draw_part(sources, part, 10, fraction, generator)
    return [str(digit) for digit in range(10)], sources


def _enlarged(scan_HW: npt.NDArray[np.uint8]) -> bytes:
    return png(Image.fromarray(scan_HW).resize((32, 32), Image.Resampling.BICUBIC))

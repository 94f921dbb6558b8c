"""DALI, PIL and torchvision decode, cut and resize alike, every kind of picture that `pack` admits."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autodo_dist.data.dali import DaliPixels, DaliWindows
from autodo_dist.data.order import Crop, stream, training_window
from autodo_dist.data.pixels import Finish, Pictures, Pixels
from autodo_dist.data.shards import Encoded
from autodo_dist.data.torchvision_pixels import PilWindows, TorchvisionPixels
from autodo_dist.errors import DecodeError

HEIGHT, WIDTH = 150, 200
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def natural() -> Image.Image:
    """Something with edges, gradients and grain."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    generator = np.random.default_rng(0)
    smooth = np.stack([rows * 1.5, columns * 1.2, 128 + 90 * np.sin(rows / 9) * np.cos(columns / 13)], -1)
    smooth[40:90, 60:120] = 255 - smooth[40:90, 60:120]
    return Image.fromarray((smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> Encoded:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def kinds() -> dict[str, Encoded]:
    image = natural()
    turned = Image.Exif()
    turned[274] = 6
    alpha = image.convert("RGBA")
    alpha.putalpha(image.convert("L"))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return {
        "jpeg": encoded(image, "JPEG", quality=90),
        "jpeg, 4:4:4": encoded(image, "JPEG", quality=90, subsampling=0),
        "jpeg, progressive": encoded(image, "JPEG", progressive=True),
        "jpeg, grey": encoded(image.convert("L"), "JPEG"),
        "jpeg, CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "jpeg, turned": encoded(image, "JPEG", exif=turned.tobytes()),
        "png": encoded(image, "PNG"),
        "png, palette": encoded(image.convert("P"), "PNG"),
        "png, alpha": encoded(alpha, "PNG"),
        "png, grey alpha": encoded(alpha.convert("LA"), "PNG"),
        "png, 16 bit": encoded(deep, "PNG"),
        "webp": encoded(image, "WEBP"),
        "webp, alpha": encoded(alpha, "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "tiff, 16 bit": encoded(deep, "TIFF"),
        "ppm": encoded(image, "PPM"),
        "pgm, 16 bit": encoded(deep, "PPM"),
        "jp2": encoded(image, "JPEG2000"),
    }


def pictures(several: list[Encoded], crop: Crop) -> Pictures:
    """All windows of these pictures are the same; every other one is mirrored."""
    count = len(several)
    if crop.kind == "padded":
        origin, size = np.array([3, -5]) / crop.image_size, np.array([1.0, 1.0])
    else:
        origin, size = np.array([30 / HEIGHT, 20 / WIDTH]), np.array([100 / HEIGHT, 120 / WIDTH])
    tile = np.ones((count, 1), np.float32)
    return Pictures(
        several, tile * origin.astype(np.float32), tile * size.astype(np.float32), np.arange(count, dtype=np.int32) % 2
    )


def ways(finish: Finish, most: int = 2) -> tuple[Pixels, Pixels, Pixels]:
    """Decoded by DALI, by PIL, and all by DALI, which is the graph for a GPU, here on the CPU."""
    return (
        TorchvisionPixels(finish, 2, DaliWindows(finish.crop, most, 1)),
        TorchvisionPixels(finish, 2, PilWindows(2)),
        DaliPixels(finish, most, 1, None),
    )


@pytest.mark.parametrize("kind", kinds())
def test_a_whole_picture_is_the_same(kind: str) -> None:
    """Not resized, only decoded: no difference, but for one step of 255 where 16 bits become 8."""
    upright = (WIDTH, HEIGHT) if kind == "jpeg, turned" else (HEIGHT, WIDTH)
    side = min(upright)
    crop = Crop("resized", (1.0, 1.0), 0, side, 1.0, flip=False)
    window = Pictures(
        [kinds()[kind]],
        np.zeros((1, 2), np.float32),
        np.array([[side / upright[0], side / upright[1]]], np.float32),
        np.zeros(1, np.int32),
    )
    by_dali, by_pil, on_a_gpu = (pixels.decode(window) for pixels in ways(Finish(crop, (0.0,) * 3, (1.0,) * 3)))
    assert by_dali.shape == (1, 3, side, side)
    most = 1.01 if "16 bit" in kind else 0.0
    assert float((255 * (by_dali - by_pil)).abs().max()) <= most
    assert float((255 * (by_dali - on_a_gpu)).abs().max()) <= most + 1e-3


@pytest.mark.parametrize("side", [24, 64, 160])
@pytest.mark.parametrize("kind", ["resized", "padded", "whole"])
def test_windows_are_resized_alike(kind: Any, side: int) -> None:
    """Smaller and larger than the window. DALI's graph: mean difference below 0.3 of 255, the largest 4."""
    crop = Crop(kind, (0.1, 1.0), 4, side, 0.875, flip=True)
    window = pictures([kinds()["jpeg"], kinds()["png"]], crop)
    by_dali, by_pil, on_a_gpu = (pixels.decode(window) for pixels in ways(Finish(crop, MEAN, STD)))
    assert by_dali.dtype == on_a_gpu.dtype == torch.float32
    assert torch.equal(by_dali, by_pil)
    difference = (255 * (by_dali - on_a_gpu) * torch.tensor(STD)[:, None, None]).abs()
    assert float(difference.mean()) < 0.3
    assert float(difference.max()) < 4.01


@pytest.mark.parametrize("side", [8, 15, 16, 32])
def test_shifts_of_half_a_pixel_are_rounded_alike(side: int) -> None:
    """Pictures smaller than the input: a shift by whole pixels of the input is by parts of theirs."""
    crop = Crop("padded", (0.1, 1.0), 4, 32, 1.0, flip=False)
    image = natural().resize((side, side))
    bordered = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    drawn = [training_window(stream(0, 0, "task", id_), side, side, crop) for id_ in range(40)]
    window = Pictures(
        [encoded(image, "PNG")] * len(drawn),
        np.array([(each.top, each.left) for each in drawn], np.float32),
        np.array([(each.height, each.width) for each in drawn], np.float32),
        np.zeros(len(drawn), np.int32),
    )
    for windows in (DaliWindows(crop, len(drawn), 1), PilWindows(2)):
        for found, each in zip(windows.decode(window), drawn, strict=True):
            top, left = 4 + round(each.top * side), 4 + round(each.left * side)
            shifted = bordered[top : top + side, left : left + side]
            assert np.array_equal(found.permute(1, 2, 0).numpy(), shifted)


@pytest.mark.parametrize("flip", [0, 1])
def test_pictures_of_one_size_are_the_same_beside_one_of_another(flip: int) -> None:
    """Those of one size are resized together, and where none is mirrored normalised together: the same to the bit."""
    crop = Crop("padded", (0.1, 1.0), 4, 24, 1.0, flip=True)
    alike, other = [kinds()["jpeg"], kinds()["png"]], kinds()["jpeg, turned"]
    two, three = (
        replace(drawn, flip_B=drawn.flip_B * flip) for drawn in (pictures(alike, crop), pictures([*alike, other], crop))
    )
    for pixels in ways(Finish(crop, MEAN, STD), 3)[:2]:
        assert torch.equal(pixels.decode(two), pixels.decode(three)[:2])


@pytest.mark.parametrize("broken", [b"", b"\xff\xd8\xff", bytes(100)])
def test_a_broken_picture_is_found(broken: bytes) -> None:
    crop = Crop("whole", (1.0, 1.0), 0, 24, 1.0, flip=False)
    good, bad = kinds()["jpeg"], np.frombuffer(broken, np.uint8)
    for pixels in ways(Finish(crop, MEAN, STD)):
        with pytest.raises(DecodeError):
            pixels.decode(pictures([good, bad], crop))
        assert pixels.fault(good) is None
        assert pixels.fault(bad)
        assert pixels.decode(pictures([good], crop)).shape == (1, 3, 24, 24)

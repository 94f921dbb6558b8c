"""Generated house numbers: a stand-in for SVHN that needs no download.

SVHN (Netzer et al. 2011, "Reading digits in natural images with unsupervised feature learning") holds 32 × 32 colour
pictures cut around one digit of a house number, with parts of its neighbours at the sides. Here such pictures are
drawn: digits of matplotlib's fonts, seen in perspective, in colours of high to low contrast, under uneven light, by a
camera of few pixels with noise, often through JPEG.

A picture is a pure function of (seed, part, index, digit): its randomness is counter-based (Philox, Salmon et al.
2011), so neither order nor number of workers matters. No function of a mathematical library comes in, whose last bits
differ between machines: the pinned wheels of numpy, Pillow (which brings FreeType and libjpeg-turbo) and matplotlib
(which brings the fonts) give the same bytes on machines of one processor architecture. Another FreeType may draw
another edge.

How hard they are, measured: after `autodo pack housenumbers OUT --train 25000 --test 5000 --balanced` (20,000 to train
on, 5,000 each for validation and test), `autodo train --config configs/housenumbers.yaml data.root=OUT` (plain
convnet, 15 epochs) errs 4.50 % on test; with seed 1 in place of 0 for pictures and training, 5.04 %.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from autodo_dist.data.manifest import PARTS
from autodo_dist.data.sources import TEST, TRAIN, VALIDATION, Source, draw_part
from autodo_dist.errors import AutodoError

SIDE = 32  # of a picture, pixels
GLYPH = 28  # height of an undistorted digit, pixels
# Digits of each class, 0 to 9, in SVHN's train_32x32.mat.
SVHN_COUNTS = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
TRAIN_PICTURES, TEST_PICTURES = 73257, 26032  # as many as SVHN's
# Those of matplotlib's fonts that have digits of equal height; DejaVu Mono's zero with its dot would blur into an 8.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmtt10",
)
_CANVAS = (128, 64)  # width and height of the line of digits before it is seen in perspective
_SPLIT = 2**64 - 1  # the counter that no picture uses: it draws the validation part

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """How a digit is seen; the defaults show it as its font draws it, black on white.

    Lengths are pixels, pairs of numbers go to the right and down, colours are 0 to 255.

    left, right: the neighbouring digits. gap: to each of them. height: of the digit. aspect: its width is stretched by.
    shift: of its centre. turn: tan(angle / 2), clockwise. shear: of upper parts to the right, per pixel. perspective:
    share by which things are larger, per pixel from the centre. ink, ground: colours. light: change of brightness, a
    share per pixel. patches: strength of spots on the ground. shade: share of light beyond a straight edge, `edge`
    being its normal and its distance times the normal's length. relief: by which the digit's own shadow falls.
    pixels: of the camera, per side. blur: of its lens, in its pixels. noise: standard deviation. jpeg: quality.
    """

    font: str = FONTS[0]
    left: int | None = None
    right: int | None = None
    gap: tuple[int, int] = (4, 4)
    height: float = GLYPH
    aspect: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    turn: float = 0.0
    shear: float = 0.0
    perspective: tuple[float, float] = (0.0, 0.0)
    ink: Rgb = (0.0, 0.0, 0.0)
    ground: Rgb = (255.0, 255.0, 255.0)
    light: tuple[float, float] = (0.0, 0.0)
    patches: float = 0.0
    shade: float = 1.0
    edge: tuple[float, float, float] = (1.0, 0.0, 0.0)
    relief: tuple[int, int] = (0, 0)
    pixels: int = SIDE
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int | None = None


# ------------------------------------------------------------------------------------------------------------ sources


def housenumbers_sources(
    seed: int, train: int, test: int, validation_fraction: float, *, balanced: bool
) -> tuple[list[str], list[Source]]:
    """Class names and pictures: `train` that training and validation share, and `test`; each drawn when it is read.

    Classes are as frequent as in SVHN's train part, or equally frequent if `balanced`. validation is
    round(validation_fraction·n) of each class's n. A larger number of pictures begins with the same pictures.
    AutodoError if there are too few.
    """
    if train < 10:
        raise AutodoError(f"pack housenumbers: --train {train} cannot hold ten classes; give 10 or more")
    if test < 0:
        raise AutodoError(f"pack housenumbers: --test {test}; give 0 or more")
    digits = label_order((1,) * 10 if balanced else SVHN_COUNTS)
    sources = [
        Source(f"{PARTS[part]}-{index:06d}", "png", digit, part, partial(picture, seed, part, index, digit))
        for part, count in ((TRAIN, train), (TEST, test))
        for index, digit in zip(range(count), cycle(digits))
    ]
    return [str(digit) for digit in range(10)], draw_part(
        sources, VALIDATION, 10, validation_fraction, _stream(seed, TRAIN, _SPLIT)
    )


def label_order(counts: tuple[int, ...]) -> list[int]:
    """counts[c] labels of each class c, evenly mixed: the k-th of n lies at (k + 1/2)/n of the whole."""
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    labels: list[int] = np.repeat(np.arange(len(counts)), counts)[np.argsort(place, kind="stable")].tolist()
    return labels


# ------------------------------------------------------------------------------------------------------------ drawing


def picture(seed: int, part: int, index: int, digit: int) -> bytes:
    """The PNG of picture `index` of a part."""
    generator = _stream(seed, part, index)
    file = io.BytesIO()
    # Without compression (3.2 kB a picture instead of 1.9): what deflate writes depends on zlib's build.
    render(digit, draw_look(generator), generator).save(file, "PNG", compress_level=0)
    return file.getvalue()


def draw_look(generator: np.random.Generator) -> Look:
    """Draw how a picture looks.

    Ranges were chosen by eye on sheets of pictures: as wide as leaves nearly every digit legible. Noise and patches
    follow the contrast, as they would drown a faint digit.
    """

    def between(low: float, high: float) -> float:
        return float(generator.uniform(low, high))

    def perhaps(share: float) -> bool:
        return bool(generator.random() < share)

    contrast = between(30, 140)
    ink, ground = _colours(generator, contrast)
    return Look(
        font=FONTS[generator.integers(len(FONTS))],
        left=int(generator.integers(10)) if perhaps(0.7) else None,
        right=int(generator.integers(10)) if perhaps(0.7) else None,
        gap=(int(generator.integers(7)), int(generator.integers(7))),
        height=between(18, 30),
        aspect=between(0.75, 1.2),
        shift=(between(-2.5, 2.5), between(-2.5, 2.5)),
        turn=between(-0.13, 0.13),
        shear=between(-0.3, 0.3),
        perspective=(between(-0.008, 0.008), between(-0.008, 0.008)),
        ink=ink,
        ground=ground,
        light=(between(-0.015, 0.015), between(-0.015, 0.015)),
        patches=contrast * between(0, 0.5),
        shade=between(0.5, 0.9) if perhaps(0.3) else 1.0,
        edge=(between(-1, 1), between(-1, 1), between(-8, 8)),
        relief=(int(generator.integers(-2, 3)), int(generator.integers(0, 3))) if perhaps(0.3) else (0, 0),
        pixels=int(generator.integers(12, SIDE + 1)),
        blur=between(0, 0.9),
        noise=contrast * between(0, 0.2),
        jpeg=int(generator.integers(30, 96)) if perhaps(0.5) else None,
    )


def _colours(generator: np.random.Generator, contrast: float) -> tuple[Rgb, Rgb]:
    """Ink and ground that differ by `contrast` in brightness, lighter on darker or the reverse, each with a tint."""
    level, sign = generator.uniform(30, 225), 2 * int(generator.integers(2)) - 1
    if not 15 <= level + sign * contrast <= 240:
        sign = 1 if level < 128 else -1
    ground = level + generator.uniform(-30, 30, 3)
    ink = ground + sign * contrast + generator.uniform(-15, 15, 3)
    return tuple(ink.tolist()), tuple(ground.tolist())


def render(digit: int, look: Look, generator: np.random.Generator) -> Image.Image:
    """Draw a digit; the generator gives what differs from pixel to pixel: patches and noise."""
    mask = _line(digit, look).transform(
        (SIDE, SIDE), Image.Transform.PERSPECTIVE, _homography(look), Image.Resampling.BICUBIC
    )
    scene_HWC = _ground(look, generator)
    if look.relief != (0, 0):
        scene_HWC *= 1 - np.float32(0.4) * _by_camera(mask.rotate(0, translate=look.relief), look)
    scene_HWC += _by_camera(mask, look) * (np.array(look.ink, np.float32) - scene_HWC)
    scene_HWC *= _light(look)
    if look.noise:
        scene_HWC += np.float32(look.noise) * _bell(generator, scene_HWC.shape)
    image = Image.fromarray(np.clip(np.rint(scene_HWC), 0, 255).astype(np.uint8))
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return image if look.jpeg is None else _through_jpeg(image, look.jpeg)


def _line(digit: int, look: Look) -> Image.Image:
    """The digit in the middle of the canvas, between its neighbours: 255 where ink is."""
    line, middle = Image.new("L", _CANVAS), glyph(look.font, digit)
    start = (_CANVAS[0] - middle.width) // 2
    top = (_CANVAS[1] - GLYPH) // 2
    line.paste(middle, (start, top))
    if look.left is not None:
        neighbour = glyph(look.font, look.left)
        line.paste(neighbour, (start - look.gap[0] - neighbour.width, top))
    if look.right is not None:
        line.paste(glyph(look.font, look.right), (start + middle.width + look.gap[1], top))
    return line


@lru_cache(maxsize=len(FONTS) * 10)
def glyph(font: str, digit: int) -> Image.Image:
    """A digit of a font, cut to its box and GLYPH pixels high: 255 where ink is."""
    import matplotlib  # only for where its fonts lie

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    drawn = ImageFont.truetype(path, 4 * GLYPH, layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("L", (8 * GLYPH, 8 * GLYPH))
    ImageDraw.Draw(image).text((2 * GLYPH, GLYPH), str(digit), font=drawn, fill=255)
    image = image.crop(image.getbbox())
    return image.resize((round(image.width * GLYPH / image.height), GLYPH), Image.Resampling.BOX)


def _homography(look: Look) -> tuple[float, ...]:
    """Pillow's eight numbers that lead from a pixel of the picture to a place on the canvas.

    With (x, y) from the digit's centre, p the perspective, and A = scale · rotation · shear, the place is
    canvas centre + A(x, y) / (1 + p·(x, y)).
    """
    scale = GLYPH / look.height
    cos, sin = (1 - look.turn**2) / (1 + look.turn**2), 2 * look.turn / (1 + look.turn**2)
    a, b = scale * cos / look.aspect, scale * (sin + look.shear * cos) / look.aspect
    c, d = -scale * sin, scale * (cos - look.shear * sin)
    (p, q), (x, y) = look.perspective, (SIDE / 2 + look.shift[0], SIDE / 2 + look.shift[1])
    u, v = _CANVAS[0] / 2, _CANVAS[1] / 2
    one = 1 - p * x - q * y
    rows = (a + u * p, b + u * q, u * one - a * x - b * y, c + v * p, d + v * q, v * one - c * x - d * y, p, q)
    return tuple(number / one for number in rows)


def _by_camera(mask: Image.Image, look: Look) -> npt.NDArray[np.float32]:
    """A mask as the camera's lens and pixels see it: shares in 0..1, (pixels, pixels, 1)."""
    mask = mask.resize((look.pixels, look.pixels), Image.Resampling.BOX)
    if look.blur:
        mask = mask.filter(ImageFilter.GaussianBlur(look.blur))
    return np.asarray(mask, np.float32)[..., None] / np.float32(255)


def _ground(look: Look, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """What the digit stands on: a colour with smooth patches."""
    ground_HWC = np.empty((look.pixels, look.pixels, 3), np.float32)
    ground_HWC[:] = look.ground
    if look.patches:
        spots = Image.fromarray(generator.integers(0, 256, (5, 5), dtype=np.uint8))
        spots = spots.resize((look.pixels, look.pixels), Image.Resampling.BICUBIC)
        ground_HWC += np.float32(look.patches / 128) * (np.asarray(spots, np.float32)[..., None] - 128)
    return ground_HWC


def _light(look: Look) -> npt.NDArray[np.float32]:
    """How bright each pixel of the camera is, as a factor: a ramp and the edge of a shadow."""
    axis = ((np.arange(look.pixels, dtype=np.float32) + 0.5) / look.pixels - 0.5) * SIDE
    x, y = axis[None, :, None], axis[:, None, None]
    light = 1 + look.light[0] * x + look.light[1] * y
    if look.shade < 1:
        behind = np.clip(look.edge[0] * x + look.edge[1] * y - look.edge[2], 0, 1)
        light = light * (1 - (1 - look.shade) * behind)
    return np.asarray(light, np.float32)


def _bell(generator: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Noise of mean 0 and variance 1: sums of four bytes, whose variance is 4·(256² - 1)/12."""
    total = generator.integers(0, 256, (4, *shape), dtype=np.uint8).sum(0, dtype=np.int16)
    return np.asarray((total - np.float32(510)) / np.float32(math.sqrt(4 * (256**2 - 1) / 12)), np.float32)


def _through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    with Image.open(file) as read:
        return read.convert("RGB")


def _stream(seed: int, part: int, index: int) -> np.random.Generator:
    """The random stream of one picture of a part."""
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, part], np.uint64), counter=np.array([0, 0, 0, index], np.uint64))
    )

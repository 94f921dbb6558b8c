"""Pictures side by side in one file, each with a few words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

Color = tuple[float, float, float]
LEAST, GAP, FONT, LINE = 112, 8, 12, 15  # pixels: side of a small picture, space between, size and height of letters
PER_ROW = 6


@dataclass(frozen=True)
class Cell:
    """Pictures one above the other, below lines of text."""

    text: tuple[str, ...]
    pictures: tuple[Image.Image, ...]


def picture(image_CHW: torch.Tensor, mean: Color, std: Color) -> Image.Image:
    """A normalised picture as RGB; what lies outside of 0..1 is cut off."""
    mean_C11, std_C11 = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    pixels = (image_CHW.double().cpu() * std_C11 + mean_C11).clamp(0, 1)
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())


def sheet(cells: Sequence[Cell]) -> Image.Image:
    """The cells in rows, on white. Small pictures are enlarged by a whole number, their pixels left as squares."""
    large = [Cell(cell.text, tuple(map(_enlarged, cell.pictures))) for cell in cells]
    font = ImageFont.load_default(FONT)
    lines = max(len(cell.text) for cell in large)
    letters = max(font.getlength(line) for cell in large for line in cell.text)
    width = GAP + max(int(letters) + 1, *(image.width for cell in large for image in cell.pictures))
    height = 2 * GAP + LINE * lines + max(sum(image.height + GAP for image in cell.pictures) for cell in large)
    columns, rows = min(PER_ROW, len(large)), -(-len(large) // PER_ROW)
    page = Image.new("RGB", (GAP + columns * width, rows * height), "white")
    draw = ImageDraw.Draw(page)
    for at, cell in enumerate(large):
        left, top = GAP + at % PER_ROW * width, GAP + at // PER_ROW * height
        for line, words in enumerate(cell.text):
            draw.text((left, top + line * LINE), words, fill="black", font=font)
        top += lines * LINE
        for image in cell.pictures:
            page.paste(image, (left, top))
            top += image.height + GAP
    return page


def _enlarged(image: Image.Image) -> Image.Image:
    """A small picture by a whole number larger, a large one shrunk to twice LEAST."""
    factor = max(1, LEAST // max(image.size))
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    shrunk = image.copy()
    shrunk.thumbnail((2 * LEAST, 2 * LEAST))
    return shrunk

"""Pictures of what policies and the learnt warp do, to be looked at: docs/results/policies.jpg and warp.jpg.

policies  a line a policy: two pictures as they are, then under the draws of ten ids, as DALI does them
warp      a line an operation of λ^A: seven strengths from end to end of its range; below them, the draws of seven
          ids where a run starts
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw

from autodo_dist.data import order
from autodo_dist.data.dali import DaliPixels
from autodo_dist.method import warp
from benchmarks.policies import Array, bytes_of, natural, policies, whole

SIDE, LABEL, DRAWS, STRENGTHS = 84, 130, 10, 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(folder: Annotated[Path, typer.Argument(help="where the two files go")] = Path("docs/results")) -> None:
    """Draw the two sheets."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {"policies": policy_lines(), "warp": warp_lines()}.items():
        sheet(lines).save(folder / f"{name}.jpg", quality=75)
        print(folder / f"{name}.jpg")


def policy_lines() -> dict[str, list[Array]]:
    """Each policy's pictures."""
    lines = {}
    for name, policy in policies(SIDE).items():
        if policy is None:
            continue
        drawn = policy.draw([order.stream(0, 0, "task", id_) for id_ in range(DRAWS)])
        finish = replace(bytes_of(SIDE), operations=policy.operations, erases=policy.erase is not None)
        images = natural(SIDE, SIDE) * (DRAWS // 2)
        done = DaliPixels(finish, DRAWS, 1, None).decode(whole(images, drawn))
        lines[name] = [images[0], images[1], *_bytes(done)]
    return lines


def warp_lines() -> dict[str, list[Array]]:
    """Pictures under each learnt operation, and under all of them as they start."""
    temple, flower = (torch.from_numpy(image).permute(2, 0, 1) / 255 for image in natural(SIDE, SIDE))
    lines, names = {}, (*warp.AFFINE, *warp.COLOR)
    for at, name in enumerate(names):
        strengths = torch.zeros(STRENGTHS, len(names))
        strengths[:, at] = torch.linspace(-1, 1, STRENGTHS) * warp.RANGES[at]
        lines[name] = _warped(temple.expand(STRENGTHS, -1, -1, -1), strengths)
    gate, magnitude = (torch.full((STRENGTHS, len(names)), logit) for logit in warp.start_logits())
    streams = [order.stream(0, 0, "task", id_) for id_ in range(STRENGTHS)]
    draws = np.stack([stream.random(2 * len(names), np.float32) for stream in streams])
    strengths = warp.strengths(gate, magnitude, torch.from_numpy(draws))
    lines["at the start"] = _warped(torch.stack([temple, flower] * STRENGTHS)[:STRENGTHS], strengths)
    return lines


def sheet(lines: dict[str, list[Array]]) -> Image.Image:
    """The lines below each other, each with its name before it."""
    width = LABEL + max(len(images) for images in lines.values()) * (SIDE + 2)
    paper = Image.new("RGB", (width, len(lines) * (SIDE + 2)), "white")
    pen = ImageDraw.Draw(paper)
    for row, (name, images) in enumerate(lines.items()):
        pen.text((4, row * (SIDE + 2) + SIDE // 2 - 6), name, "black")
        for column, image in enumerate(images):
            paper.paste(Image.fromarray(image), (LABEL + column * (SIDE + 2), row * (SIDE + 2)))
    return paper


def _warped(images_BCHW: torch.Tensor, strengths_BK: torch.Tensor) -> list[Array]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    done = warp.augment((images_BCHW - mean) / std, strengths_BK, MEAN, STD)
    return _bytes(255 * (done * std + mean))


def _bytes(images_BCHW: torch.Tensor) -> list[Array]:
    return list(images_BCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


if __name__ == "__main__":
    typer.run(main)

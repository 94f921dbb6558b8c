"""Fixed policies measured: how near their operations are to PIL's, and what a policy costs beside decoding.

    difference  mean absolute difference of an operation to PIL's, of 255, the largest over strengths and two natural
                pictures; by DALI and by torchvision
    cost        windows and draws of a batch, then decoding, resizing, policy and normalising, from JPEGs of ImageNet's
                usual size to 224 pixels, beside the same without a policy, interleaved

Times are the processor's, with one thread.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, autoaugment

from autodo_dist.data import order
from autodo_dist.data.dali import DaliPixels, DaliWindows
from autodo_dist.data.order import Crop
from autodo_dist.data.pixels import Finish, Pictures, Pixels
from autodo_dist.data.policies import PAPERS, Drawn, Policy, make_choice, make_erase
from autodo_dist.data.torchvision_pixels import TorchvisionPixels
from autodo_dist.experiment.table import insert
from autodo_dist.operations import OPERATIONS
from benchmarks.hyper_step import Figure, figure, interleaved
from benchmarks.runs import as_command, write_rows

Array = npt.NDArray[np.uint8]
Case = tuple[str, float, int]  # an operation, its strength, and which of the pictures

DECODERS: dict[str, Callable[[Finish, int], Pixels]] = {
    "dali": lambda finish, most: DaliPixels(finish, most, 1, None),
    "torchvision": lambda finish, most: TorchvisionPixels(finish, 1, DaliWindows(finish.crop, most, 1)),
}
NAMES = ("randaugment", "trivialaugment", *PAPERS, "random_subset")
STRENGTHS = {
    **dict.fromkeys(("shear_x", "shear_y"), (0.13, -0.3, 0.99)),
    **dict.fromkeys(("translate_x", "translate_y"), (13.0, -30.0)),
    "rotate": (9.0, -30.0, 77.0, 135.0),
    **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (-0.9, -0.33, 0.0, 0.5, 0.99)),
    "posterize": (8.0, 6.0, 4.0, 2.0),
    "solarize": (255.0, 226.667, 128.0, 0.0),
}
CASES = [(name, strength, at) for name in OPERATIONS for strength in STRENGTHS.get(name, (0.0,)) for at in range(2)]
BATCH, HEIGHT, WIDTH, SIZE = 64, 375, 500, 224
CROP = Crop("resized", (0.08, 1.0), 0, SIZE, 0.875, flip=True)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="few rounds: under a minute")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    doc: Annotated[Path | None, typer.Option(help="put the tables between the marks in this file")] = None,
) -> None:
    """Measure differences and cost, then print them as Markdown."""
    torch.set_num_threads(1)
    machine = f"{os.cpu_count()} cores, one thread, torch {torch.__version__}"
    sizes = {size: {decoder: differences(decoder, size) for decoder in DECODERS} for size in (32, 128, 224)}
    times = {decoder: cost(decoder, 3 if quick else 25) for decoder in DECODERS}
    text = f"{difference_table(sizes)}\n\n{cost_table(times)}\n\nMeasured on {machine}."
    print(f"`{shlex.join(['python', '-m', 'benchmarks.policies', *sys.argv[1:]])}`\n\n{text}")
    if json_file is not None:
        write_rows(json_file, figures(sizes, times))
    if doc is not None:
        insert(doc, "results", text)


def natural(height: int, width: int) -> list[Array]:
    """A temple and a flower, H × W × 3."""
    return [np.array(Image.fromarray(image).resize((width, height))) for image in load_sample_images().images]


def encode(image: Array, **how: Any) -> Array:
    """A picture's file, as PIL writes it."""
    Image.fromarray(image).save(file := io.BytesIO(), **how)
    return np.frombuffer(file.getvalue(), np.uint8)


def whole(images: Sequence[Array], drawn: Drawn | None, flip: int = 0) -> Pictures:
    """Pictures without loss and as they are, with what is drawn for them."""
    corner_B2 = np.zeros((len(images), 2), np.float32)
    flip_B = np.full(len(images), flip, np.int32)
    return Pictures([encode(image, format="png") for image in images], corner_B2, corner_B2 + 1, flip_B, drawn)


def bytes_of(size: int, operations: int = 1) -> Finish:
    """Pictures of this side whose values stay those of bytes, 0 to 255."""
    return Finish(
        Crop("whole", (1.0, 1.0), 0, size, 1.0, flip=True), (0, 0, 0), (1 / 255, 1 / 255, 1 / 255), operations
    )


def one_each(cases: Sequence[Case]) -> Drawn:
    """One operation for each picture."""
    index_B1 = np.array([[OPERATIONS.index(name)] for name, _, _ in cases], np.int32)
    strength_B1 = np.array([[strength] for _, strength, _ in cases], np.float32)
    return Drawn(index_B1, strength_B1, np.zeros((len(cases), 4), np.int32))


def by_pil(image: Array, name: str, strength: float) -> Array:
    """A picture under an operation, as torchvision lets PIL do it."""
    theirs = "".join(word.capitalize() for word in name.split("_"))
    return np.asarray(autoaugment._apply_op(Image.fromarray(image), theirs, strength, InterpolationMode.NEAREST, None))


def differences(decoder: str, size: int) -> dict[str, float]:
    """The largest mean absolute difference to PIL of each operation, of 255. All are done in one batch."""
    images = natural(size, size)
    batch = whole([images[at] for _, _, at in CASES], one_each(CASES))
    found = DECODERS[decoder](bytes_of(size), len(CASES)).decode(batch).numpy()
    largest = dict.fromkeys(OPERATIONS, 0.0)
    for (name, strength, at), image in zip(CASES, found, strict=True):
        expected = by_pil(images[at], name, strength).transpose(2, 0, 1).astype(np.float32)
        largest[name] = max(largest[name], float(np.abs(image - expected).mean()))
    return largest


def policies(size: int) -> dict[str, Policy | None]:
    """What is timed, by name, for pictures of this side."""
    chosen = {name: Policy(make_choice(name, 2, 9, (), size), None) for name in NAMES}
    kinds: tuple[Literal["cutout", "random"], ...] = ("cutout", "random")
    erased = {f"erase {kind}": Policy(None, make_erase(kind, None, None, size)) for kind in kinds}
    return {"none": None, **chosen, **erased}


def cost(decoder: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a batch under each policy, in each round."""
    plain = Finish(CROP, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = {}
    for name, policy in policies(SIZE).items():
        finish = replace(plain, operations=policy.operations, erases=policy.erase is not None) if policy else plain
        steps[name] = functools.partial(batch, DECODERS[decoder](finish, BATCH), policy, itertools.count())
    return interleaved(steps, rounds)


def batch(pixels: Pixels, policy: Policy | None, epochs: Iterator[int]) -> torch.Tensor:
    """What a loader does for a batch, but for reading."""
    epoch = next(epochs)
    streams = [order.stream(0, epoch, "task", id_) for id_ in range(BATCH)]
    windows = [order.training_window(stream, HEIGHT, WIDTH, CROP) for stream in streams]
    pictures = Pictures(
        encoded=photographs() * (BATCH // 2),
        origin_B2=np.array([(window.top, window.left) for window in windows], np.float32),
        size_B2=np.array([(window.height, window.width) for window in windows], np.float32),
        flip_B=np.array([window.flip for window in windows], np.int32),
        drawn=policy.draw(streams) if policy else None,
    )
    return pixels.decode(pictures)


@functools.cache
def photographs() -> list[Array]:
    """The two natural pictures as JPEGs of ImageNet's usual size."""
    return [encode(image, format="jpeg", quality=92) for image in natural(HEIGHT, WIDTH)]


def ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """Speed with a policy beside that without, in each round."""
    return [none / one for none, one in zip(seconds["none"], seconds[name], strict=True)]


def speed(seconds: list[float]) -> float:
    """Pictures a second of processor time."""
    return BATCH / statistics.median(seconds)


def figures(sizes: dict[int, dict[str, dict[str, float]]], times: dict[str, dict[str, list[float]]]) -> list[Figure]:
    """Every figure, as the benchmarks keep them."""
    rows = [
        figure(f"{name}, {size} px, {decoder} beside PIL", value, "of 255")
        for size, decoders in sizes.items()
        for decoder, found in decoders.items()
        for name, value in found.items()
    ]
    for decoder, seconds in times.items():
        for name in seconds:
            rows.append(figure(f"{name}, {decoder}", speed(seconds[name]), "pictures/s"))
            rows.append(figure(f"{name} beside none, {decoder}", statistics.median(ratios(seconds, name)), "times"))
    return rows


def difference_table(sizes: dict[int, dict[str, dict[str, float]]]) -> str:
    """The differences as Markdown: an operation a line, a decoder and size a column."""
    columns = [(f"{decoder}, {size} px", found) for size, both in sizes.items() for decoder, found in both.items()]
    lines = [f"| operation | {' | '.join(title for title, _ in columns)} |", "|---|" + "---|" * len(columns)]
    for name in OPERATIONS:
        lines.append(f"| {name} | {' | '.join(f'{found[name]:.2f}' for _, found in columns)} |")
    return "\n".join(lines)


def cost_table(times: dict[str, dict[str, list[float]]]) -> str:
    """The cost as Markdown: a policy a line."""
    titles = " | ".join(f"{decoder}, pictures/s | beside none" for decoder in times)
    lines = [f"| policy | {titles} |", "|---|" + "---|---|" * len(times)]
    for name in policies(SIZE):
        cells = [
            f"{speed(seconds[name]):.0f} | {statistics.median(ratios(seconds, name)):.2f}" for seconds in times.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    as_command(main)

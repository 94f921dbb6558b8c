"""The pictures of a report: thumbnails, and samples under their learnt augmentation, as data that a page can hold.

Pictures are decoded by PIL, whatever decoded them for the training: the same pixels (tests/test_pixels.py).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from autodo_dist import contact_sheet
from autodo_dist.data import order, pil
from autodo_dist.data.order import Crop, Ids
from autodo_dist.data.pixels import Finish, Pictures
from autodo_dist.data.shards import Encoded, Shards
from autodo_dist.data.torchvision_pixels import PilWindows, TorchvisionPixels
from autodo_dist.errors import DecodeError
from autodo_dist.learnt import Source
from autodo_dist.method import warp

SIDE = 112  # longest side of a thumbnail, pixels
TOGETHER = 64  # pictures that are in memory together, encoded
DRAWS = 5  # of a sample's learnt augmentation


@dataclass(frozen=True)
class Drawn:
    """A picture as data: URI, and what was done to it: operations with their strengths; empty: nothing."""

    picture: str
    operations: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """A sample, its probability of each operation, and its picture: as the model is evaluated on it, then draws."""

    id: int
    key: str
    given: str
    probability: dict[str, float]
    pictures: list[Drawn]


def thumbnails(shards: Shards, ids: Sequence[int]) -> list[str | None]:
    """The pictures of these ids as data: URIs, SIDE pixels at most; None for one that does not decode.

    AutodoError if the data set cannot be read.
    """
    found: list[str | None] = []
    for start in range(0, len(ids), TOGETHER):
        found += [thumbnail(encoded) for encoded in shards.read(ids[start : start + TOGETHER])]
    return found


def thumbnail(encoded: Encoded) -> str | None:
    """A picture, made small, as a data: URI; None if it does not decode."""
    try:
        image = Image.fromarray(pil.decode(encoded.tobytes()))
    except pil.FAULTS:
        return None
    return _show(image)


def data_uri(image: Image.Image) -> str:
    """A picture as WebP: without loss where it is as small as a digit, else as good as thumbnails need."""
    small = max(image.size) <= 32
    with io.BytesIO() as file:
        image.save(file, "WEBP", lossless=small, quality=75)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def sheet(source: Source, ids: Ids) -> list[Sample]:
    """These train samples (sorted ids) with DRAWS draws of what each has learnt, of all operations that are learnt.

    The noise of a draw comes from (seed, number of the draw, id); the picture is whole, without crop or flip. Samples
    that do not decode are left out. AutodoError if the data set cannot be read.
    """
    config, layout, manifest = source.config, source.layout, source.manifest
    data, operations = config.data, layout.operations
    crop = Crop("whole", data.crop_area, 0, data.image_size, data.evaluation_crop, False)
    pixels = TorchvisionPixels(Finish(crop, data.mean, data.std), 1, PilWindows(1))
    logits_2nK = _logits(source, ids)
    samples = []
    for at, (id_, encoded) in enumerate(zip(ids.tolist(), Shards(manifest).read(ids.tolist()), strict=True)):
        window = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32), np.zeros(1, np.int32)
        try:
            image_1CHW = pixels.decode(Pictures([encoded], *window))
        except DecodeError:
            continue
        noise = [
            order.stream(config.train.seed, epoch, "task", id_).random(2 * len(operations)) for epoch in range(DRAWS)
        ]
        gate_K, magnitude_K = logits_2nK[:, at]
        strengths_DK = warp.strengths(
            gate_K.expand(DRAWS, -1), magnitude_K.expand(DRAWS, -1), torch.from_numpy(np.array(noise, np.float32))
        )
        strengths = torch.cat([torch.zeros(1, len(operations)), strengths_DK])
        images = warp.augment(image_1CHW.expand(DRAWS + 1, -1, -1, -1), strengths, data.mean, data.std)
        done = [{name: s for name, s in zip(operations, row, strict=True) if s} for row in strengths.tolist()]
        uris = [_show(contact_sheet.picture(image_CHW, data.mean, data.std)) for image_CHW in images]
        probability = dict(zip(operations, gate_K.sigmoid().tolist(), strict=True))
        pictures = [Drawn(uri, each) for uri, each in zip(uris, done, strict=True)]
        key, given = str(manifest.keys[id_]), manifest.classes[source.split.label_N[id_]]
        samples.append(Sample(id_, key, given, probability, pictures))
    return samples


def _logits(source: Source, ids: Ids) -> torch.Tensor:
    """Gate and magnitude logits (2 × n × K, float32) of these samples."""
    layout = source.layout
    if layout.augment == "shared":
        both = source.reader.whole("hyper.shared.value").float().chunk(2)
        return torch.stack(both)[:, None].expand(-1, len(ids), -1)
    rows = np.searchsorted(source.split.train, ids)
    groups = layout.split(source.reader.rows("hyper.rows.value", rows).float())
    return torch.stack([groups["gate_logit"], groups["magnitude_logit"]])


def _show(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    return data_uri(image)

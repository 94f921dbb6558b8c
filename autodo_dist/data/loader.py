"""DALI decodes, crops and normalises; which pictures, in which order and with which crop is `order`'s word.

    manifest + order -> bytes read ahead by threads -> DALI (decode, window, resize, mirror, normalise) -> Batch

DALI's own readers shuffle and shard by themselves, which cannot give exact epochs or the same global batches on another
number of ranks. So encoded pictures come in from outside, with their windows, ids and draws beside them: the id of a
picture goes through the pipeline with it, and a loader that starts at any position gives what it would have given. The
pipeline runs in a thread of its own, a few batches ahead.

Shapes: B pictures of this rank's part of a global batch, C = 3 colours, H = W = image_size, D draws.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types

from autodo_dist.data import order
from autodo_dist.data.decode import SYNCHRONOUS, Decoder, reason
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.order import Crop, Ids, Pass
from autodo_dist.errors import AutodoError

S = TypeVar("S")
T = TypeVar("T")
Feed = dict[str, Any]  # what the pipeline is fed: `encoded`, a list of arrays of bytes, and arrays a row a picture

READERS, READ_AHEAD = 4, 6  # threads that read tars, each a whole local batch; batches read before they are asked for
DECODED_AHEAD = 2  # batches decoded before they are asked for


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: float32 images, given labels and ids (both int64), on one device.

    draws_BD are uniform numbers in [0, 1) of each sample in this pass, for whoever needs randomness. next_ids_B are
    the ids of the rank's part of the next batch of the pass (None: this is the last).
    """

    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    ids_B: torch.Tensor
    draws_BD: torch.Tensor
    next_ids_B: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_B)


class Loader:
    """Streams this rank's part of every global batch of one pass.

    Task and hyper pass are shuffled, randomly cropped, and lose the last incomplete global batch (another one each
    epoch); the validation pass is shuffled but has the window of evaluation; the evaluation pass gives every id exactly
    once, in order. Every rank makes `steps` steps; in the last step of an evaluation a rank's part may be empty.
    """

    def __init__(
        self,
        manifest: Manifest,
        label_N: npt.NDArray[np.int32],
        ids: Ids,
        *,
        pass_: Pass,
        seed: int,
        batch_size: int,
        rank: int,
        ranks: int,
        crop: Crop,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        decode_on_gpu: bool,
        threads: int,
        draws: int = 0,
    ) -> None:
        self.manifest, self.ids, self.pass_, self.seed, self.crop = manifest, ids, pass_, seed, crop
        self.batch_size, self.rank, self.ranks, self.device = batch_size, rank, ranks, device
        self.shuffled, self.random_crop = pass_ != "evaluation", pass_ in ("task", "hyper")
        self.draws = draws
        self.steps = order.steps_per_pass(len(ids), batch_size, drop_last=self.shuffled)
        self._label_N = torch.from_numpy(label_N.astype(np.int64))
        self._build = functools.partial(
            pipeline_def(_graph),
            crop,
            mean,
            std,
            decode_on_gpu,
            batch_size=-(-batch_size // ranks),
            num_threads=threads,
            device_id=device.index if decode_on_gpu else None,
            **SYNCHRONOUS,
        )

    @functools.cached_property
    def _pipeline(self) -> Any:
        """DALI's threads and buffers, made when the first pass begins."""
        pipeline = self._build()
        pipeline.build()
        return pipeline

    def batches(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """This rank's batches of one epoch from step `start` on."""
        ids = order.shuffled(self.ids, self.seed, epoch, self.pass_) if self.shuffled else self.ids
        part = functools.partial(order.local_ids, ids, self.batch_size, rank=self.rank, ranks=self.ranks)
        feeds = ahead(
            functools.partial(self._read, epoch=epoch), map(part, range(start, self.steps)), READERS, READ_AHEAD
        )
        with contextlib.closing(ahead(self._run, feeds, 1, DECODED_AHEAD)) as batches:
            for step, batch in enumerate(batches, start=start + 1):
                next_ids_B = torch.from_numpy(part(step)).to(self.device) if step < self.steps else None
                yield replace(batch, next_ids_B=next_ids_B)

    def _run(self, feed: Feed) -> Batch:
        if not feed["encoded"]:
            shape = (0, 3, self.crop.image_size, self.crop.image_size)
            images, ids, draws = torch.empty(shape), torch.empty(0, dtype=torch.int64), torch.empty(0, self.draws)
        else:
            try:
                outputs = self._pipeline.run(**feed)
            except RuntimeError as error:
                raise self._name_broken(feed, error) from error
            # Outputs live in DALI's own buffers until its next run.
            images, ids, draws = (torch.from_dlpack(output.as_tensor()).clone() for output in outputs)
        return Batch(*(part.to(self.device) for part in (images, self._label_N[ids], ids, draws)))

    def _name_broken(self, feed: Feed, error: Exception) -> AutodoError:
        """DALI does not say which picture of a batch it could not decode, so each is tried alone."""
        decoder = Decoder()
        for id_, encoded in zip(feed["ids"].tolist(), feed["encoded"], strict=True):
            try:
                decoder.shape(encoded.tobytes())
            except AutodoError as why:
                return AutodoError(
                    f"data {self.manifest.root}: picture {self.manifest.keys[id_]} (id {id_}) does not decode ({why}); "
                    "mend or remove it in the source and pack again"
                )
        return AutodoError(f"data {self.manifest.root}: DALI failed on pictures that decode alone: {reason(error)}")

    def _read(self, part: Ids, epoch: int) -> Feed:
        drawn = [self._draw(int(id_), epoch) for id_ in part]
        windows = [window for window, _ in drawn]
        return {
            "encoded": [self._encoded(int(id_)) for id_ in part],
            "origin": np.array([(window.top, window.left) for window in windows], np.float32),
            "size": np.array([(window.height, window.width) for window in windows], np.float32),
            "flip": np.array([window.flip for window in windows], np.int32),
            "ids": part,
            "draws": np.array([draws for _, draws in drawn], np.float32).reshape(len(part), self.draws),
        }

    def _draw(self, id_: int, epoch: int) -> tuple[order.Window, npt.NDArray[np.float32]]:
        height, width = int(self.manifest.height_N[id_]), int(self.manifest.width_N[id_])
        stream = order.stream(self.seed, epoch, self.pass_, id_)
        window = (
            order.training_window(stream, height, width, self.crop)
            if self.random_crop
            else order.evaluation_window(height, width, self.crop)
        )
        return window, stream.random(self.draws, np.float32)

    def _encoded(self, id_: int) -> npt.NDArray[np.uint8]:
        path = self.manifest.root / self.manifest.shards[self.manifest.shard_N[id_]].name
        size = int(self.manifest.size_N[id_])
        try:
            file = _open(path)  # held while it is read: the cache may drop it meanwhile
            data = os.pread(file.fileno(), size, int(self.manifest.offset_N[id_]))
        except OSError as error:
            raise AutodoError(f"data {path}: cannot be read ({error.strerror}); check the file system") from error
        if len(data) != size:
            raise AutodoError(f"data {path}: ends inside sample {id_}; the tar was cut off after the run started")
        return np.frombuffer(data, np.uint8)


def endless(loader: Loader, step: int) -> Iterator[Batch]:
    """The loader's batches, epoch after epoch, from step `step` of epoch 0 on."""
    epoch, position = divmod(step, loader.steps)
    while True:
        yield from loader.batches(epoch, position)
        epoch, position = epoch + 1, 0


def ahead(work: Callable[[S], T], items: Iterable[S], threads: int, waiting: int) -> Generator[T, None, None]:
    """`map(work, items)`, with up to `waiting` results made by threads before they are asked for.

    A consumer that stops early, or an error, ends the threads and closes `items`.
    """
    results: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as executor:
        try:
            for item in items:
                results.append(executor.submit(work, item))
                if len(results) > waiting:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        finally:
            for result in results:
                result.cancel()
            if isinstance(items, Generator):
                items.close()


# Below the usual limit of 1,024 open files. An evicted file closes when its last reader is done.
@lru_cache(maxsize=256)
def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


def _graph(
    crop: Crop, mean: tuple[float, float, float], std: tuple[float, float, float], gpu: bool
) -> tuple[Any, Any, Any]:
    """What DALI does to a batch: normalised pictures, and their ids and draws as they came in."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    origin, size, draws = (
        fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("origin", "size", "draws")
    )
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    ids = fn.external_source(name="ids", dtype=types.INT64, ndim=0)
    device = "mixed" if gpu else "cpu"
    relative: dict[str, Any] = {"axis_names": "HW", "normalized_anchor": True, "normalized_shape": True}
    if crop.kind == "padded":  # the window reaches outside, which the decoder's own slice cannot
        whole = fn.decoders.image(encoded, device=device, output_type=types.RGB)
        images = fn.slice(whole, origin, size, out_of_bounds_policy="pad", fill_values=0, **relative)
    else:
        images = fn.decoders.image_slice(encoded, origin, size, device=device, output_type=types.RGB, **relative)
    images = fn.resize(images, size=[crop.image_size, crop.image_size], antialias=True)
    images = fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mirror=flip,
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
    )
    return images, ids, draws

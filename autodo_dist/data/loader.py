"""DALI decodes, crops and normalises; which pictures, in which order and with which crop is `order`'s word.

    manifest + order -> bytes read ahead by threads -> DALI (decode, window, resize, mirror, normalise) -> Batch

DALI's own readers shuffle and shard by themselves, which cannot give exact epochs or the same global batches on another
number of ranks. So encoded pictures come in through `external_source`, with their windows and ids beside them: the id
of a picture goes through the pipeline with it, and a loader that starts at any position gives what it would have given.

Shapes: B pictures of this rank's part of a global batch, C = 3 colours, H = W = image_size.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types

from autodo_dist.data import order
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.order import Crop, Ids, Pass
from autodo_dist.errors import AutodoError

# A list of encoded pictures, then arrays: window origins (top, left) and sizes (height, width), flips, ids, draws.
Feed = tuple[Any, ...]

READERS = 4  # threads that read tars, each a whole local batch
READ_AHEAD = 6  # local batches being read or waiting


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: float32 images, given labels and ids (both int64), on one device.

    draws_BD are uniform numbers in [0, 1) of each sample in this pass, for whoever needs randomness.
    """

    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    ids_B: torch.Tensor
    draws_BD: torch.Tensor

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
        self._feed = _nothing()
        self._build = functools.partial(
            pipeline_def(_graph),
            lambda: next(self._feed),
            crop,
            mean,
            std,
            decode_on_gpu,
            batch_size=-(-batch_size // ranks),
            num_threads=threads,
            device_id=device.index if decode_on_gpu else None,
            prefetch_queue_depth=2,
        )

    @functools.cached_property
    def _pipeline(self) -> Any:
        """DALI's threads and buffers, made when the first pass begins."""
        pipeline = self._build()
        pipeline.build()
        return pipeline

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch from step `start` on."""
        ids = order.shuffled(self.ids, self.seed, epoch, self.pass_) if self.shuffled else self.ids
        parts = [
            order.local_ids(ids, self.batch_size, step, self.rank, self.ranks) for step in range(start, self.steps)
        ]
        self._feed = _read_ahead(lambda part: self._read(part, epoch), [part for part in parts if len(part)])
        try:
            for part in parts:
                yield self._run(part)
        finally:
            self._stop()

    def _run(self, part: Ids) -> Batch:
        if not len(part):
            size = self.crop.image_size
            empty = torch.empty(0, dtype=torch.int64, device=self.device)
            images, draws = torch.empty(0, 3, size, size, device=self.device), torch.empty(0, self.draws)
            return Batch(images, empty, empty, draws.to(self.device))
        try:
            # Outputs live in DALI's own buffers until its next run.
            images, ids, draws = (torch.from_dlpack(output.as_tensor()).clone() for output in self._pipeline.run())
        except RuntimeError as error:
            keys = self.manifest.keys.take(part).to_pylist()
            raise AutodoError(
                f"data {self.manifest.root}: a picture among {keys[0]} … {keys[-1]} cannot be decoded "
                f"({str(error).splitlines()[0]}); `autodo pack --verify {self.manifest.root}` checks the files"
            ) from error
        parts = images, self._label_N[ids], ids, draws
        return Batch(*(part.to(self.device) for part in parts))

    def _stop(self) -> None:
        """Let the pipeline run dry, so that the next pass starts with nothing of this one in it."""
        self._feed.close()
        self._feed = _nothing()
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()

    def _read(self, part: Ids, epoch: int) -> Feed:
        drawn = [self._draw(int(id_), epoch) for id_ in part]
        windows = [window for window, _ in drawn]
        return (
            [self._encoded(int(id_)) for id_ in part],
            np.array([(window.top, window.left) for window in windows], np.float32),
            np.array([(window.height, window.width) for window in windows], np.float32),
            np.array([window.flip for window in windows], np.int32),
            part,
            np.array([draws for _, draws in drawn], np.float32).reshape(len(part), self.draws),
        )

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


def _nothing() -> Generator[Feed, None, None]:
    yield from ()


def _read_ahead(read: Callable[[Ids], Feed], parts: list[Ids]) -> Generator[Feed, None, None]:
    """`map(read, parts)`, with up to READ_AHEAD of them read by threads before they are asked for."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead") as executor:
        waiting: deque[Future[Feed]] = deque()
        try:
            for part in parts:
                waiting.append(executor.submit(read, part))
                if len(waiting) == READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@lru_cache(
    maxsize=256
)  # below the usual limit of 1,024 open files; an evicted file closes when its last reader is done
def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


def _graph(
    source: Callable[[], Feed],
    crop: Crop,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    gpu: bool,
) -> tuple[Any, Any, Any]:
    """What DALI does to a batch: normalised pictures, and their ids and draws as they came in."""
    encoded, origin, size, flip, ids, draws = fn.external_source(
        source=source,
        num_outputs=6,
        batch=True,
        dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.INT64, types.FLOAT],
        ndim=[1, 1, 1, 0, 0, 1],
    )
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

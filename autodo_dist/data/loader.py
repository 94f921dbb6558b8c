"""Which pictures, in which order and with which crop is `order`'s word; `shards` reads them, `pixels` decodes them.

    manifest + order -> bytes read ahead by threads -> pixels (decode, window, resize, mirror, policy, normalise)
    -> Batch

DALI's own readers shuffle and shard by themselves, which cannot give exact epochs or the same global batches on another
number of ranks. So encoded pictures come in from outside, with their windows beside them, and a loader that starts at
any position gives what it would have given. Decoding runs in a thread of its own, a few batches ahead.

Shapes: B pictures of this rank's part of a global batch, C = 3 colours, H = W = image_size, D draws.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from autodo_dist.data import order
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.order import Crop, Ids, Pass
from autodo_dist.data.pixels import Pictures, Pixels
from autodo_dist.data.policies import Policy
from autodo_dist.data.shards import Shards
from autodo_dist.errors import AutodoError, DecodeError

S = TypeVar("S")
T = TypeVar("T")

READERS, READ_AHEAD = 4, 6  # threads that read tars, each a whole local batch; batches read before they are asked for
DECODED_AHEAD = 1  # batches decoded before they are asked for, beside the one whose ids the batch before tells


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


@dataclass(frozen=True)
class Read:
    """What is read of a batch before it is decoded."""

    pictures: Pictures
    ids_B: Ids
    draws_BD: npt.NDArray[np.float32]

    def only(self, keep_B: npt.NDArray[np.bool_]) -> Read:
        """The part for which `keep_B` is true."""
        return Read(self.pictures.only(keep_B), self.ids_B[keep_B], self.draws_BD[keep_B])


class Dropped:
    """Pictures that were left out because they do not decode: id -> why. One for all loaders of a rank.

    With `most` 0 the first of them stops the run, else more than `most` do, as `check` is told of them.
    """

    def __init__(self, manifest: Manifest, most: int) -> None:
        self.manifest, self.most = manifest, most
        self.why: dict[int, str] = {}
        self._lock = threading.Lock()  # several loaders decode at once

    def add(self, faults: dict[int, str]) -> None:
        """Note further pictures. AutodoError if there may be none."""
        if not self.most:
            id_, why = next(iter(faults.items()))
            raise AutodoError(
                f"data {self.manifest.place}: picture {self.manifest.keys[id_]} (id {id_}) does not decode ({why}); "
                "mend or remove it in the source and pack again, or set data.on_error=skip"
            )
        with self._lock:
            self.why = self.why | faults  # a new one, as others may be reading the old one

    def check(self, count: int) -> None:
        """AutodoError if `count` pictures are too many to drop."""
        if count > self.most:
            raise AutodoError(
                f"data {self.manifest.place}: {count} pictures do not decode, more than the {self.most} that "
                "data.most_dropped allows; pack again, or raise it"
            )


class Loader:
    """Streams this rank's part of every global batch of one pass.

    Task and hyper pass are shuffled, randomly cropped, and lose the last incomplete global batch (another one each
    epoch); the validation pass is shuffled but has the window of evaluation; the evaluation pass gives every id exactly
    once, in order. Every rank makes `steps` steps; in the last step of an evaluation a rank's part may be empty.

    A picture that does not decode is dropped from its batch, on whichever rank and in whichever pass it comes up; the
    batch is then smaller by one, and all others stay as they are. `pixels` is made for the most pictures of a part. A
    `policy` draws from a picture's stream after its window and `draws`, so that without it these are the same.
    `most_steps` cuts every pass off after so many global batches. Epoch e is without the ids `absent[e mod F]` where F
    such parts are given; every epoch has the steps of the shortest.
    """

    def __init__(
        self,
        shards: Shards,
        pixels: Callable[[int], Pixels],
        dropped: Dropped,
        label_N: npt.NDArray[np.int32],
        ids: Ids,
        *,
        pass_: Pass,
        seed: int,
        batch_size: int,
        rank: int,
        ranks: int,
        crop: Crop,
        device: torch.device,
        draws: int = 0,
        policy: Policy | None = None,
        most_steps: int | None = None,
        absent: Sequence[Ids] = (),
    ) -> None:
        self.shards, self.dropped, self.ids, self.pass_, self.seed, self.crop = shards, dropped, ids, pass_, seed, crop
        self.batch_size, self.rank, self.ranks, self.device, self.draws = batch_size, rank, ranks, device, draws
        self.policy, self.absent = policy, absent
        self.shuffled, self.random_crop = pass_ != "evaluation", pass_ in ("task", "hyper")
        self._most_steps = most_steps
        self.steps = self._steps()
        self._label_N = torch.from_numpy(label_N.astype(np.int64))
        self._pixels = pixels(-(-batch_size // ranks))

    def over(self, ids: Ids, label_N: npt.NDArray[np.int32] | None = None) -> Loader:
        """The same stream of other samples, with other labels by id where they are given. It shares its pixels: one of
        both at a time.
        """
        other = copy.copy(self)
        other.ids, other.absent = ids, ()
        other.steps = other._steps()
        if label_N is not None:
            other._label_N = torch.from_numpy(label_N.astype(np.int64))
        return other

    def labels(self, ids: Ids) -> torch.Tensor:
        """The labels with which these samples come."""
        return self._label_N[torch.from_numpy(ids)]

    def _steps(self) -> int:
        pictures = order.fewest(self.ids, self.absent)
        steps = order.steps_per_pass(pictures, self.batch_size, drop_last=self.shuffled)
        return steps if self._most_steps is None else min(steps, self._most_steps)

    def batches(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """This rank's batches of one epoch from step `start` on."""
        ids = order.present(self.ids, self.absent, epoch)
        ids = order.shuffled(ids, self.seed, epoch, self.pass_) if self.shuffled else ids
        part = functools.partial(order.local_ids, ids, self.batch_size, rank=self.rank, ranks=self.ranks)
        reads = ahead(
            functools.partial(self._read, epoch=epoch), map(part, range(start, self.steps)), READERS, READ_AHEAD
        )
        with contextlib.closing(ahead(self._decode, reads, 1, DECODED_AHEAD)) as batches:
            batch = next(batches, None)
            while batch is not None:
                following = next(batches, None)
                yield replace(batch, next_ids_B=None if following is None else following.ids_B)
                batch = following

    def _read(self, part: Ids, epoch: int) -> Read:
        streams = [order.stream(self.seed, epoch, self.pass_, int(id_)) for id_ in part]
        windows = [self._window(stream, int(id_)) for stream, id_ in zip(streams, part, strict=True)]
        draws = [stream.random(self.draws, np.float32) for stream in streams]
        pictures = Pictures(
            encoded=self.shards.read(part.tolist()),
            origin_B2=np.array([(window.top, window.left) for window in windows], np.float32),
            size_B2=np.array([(window.height, window.width) for window in windows], np.float32),
            flip_B=np.array([window.flip for window in windows], np.int32),
            drawn=self.policy.draw(streams) if self.policy else None,
        )
        return Read(pictures, part, np.array(draws, np.float32).reshape(len(part), self.draws))

    def _window(self, stream: np.random.Generator, id_: int) -> order.Window:
        height, width = int(self.shards.manifest.height_N[id_]), int(self.shards.manifest.width_N[id_])
        if self.random_crop:
            return order.training_window(stream, height, width, self.crop)
        return order.evaluation_window(height, width, self.crop)

    def _decode(self, read: Read) -> Batch:
        read, images = self._without_broken(read)
        ids, draws = torch.from_numpy(read.ids_B), torch.from_numpy(read.draws_BD)
        return Batch(*(part.to(self.device) for part in (images, self._label_N[ids], ids, draws)))

    def _without_broken(self, read: Read) -> tuple[Read, torch.Tensor]:
        """The model's input, and what is left of the batch when pictures that do not decode are dropped."""
        if self.dropped.why:
            read = read.only(~np.isin(read.ids_B, list(self.dropped.why)))
        if not len(read.ids_B):
            if self.random_crop:  # BatchNorm cannot do with no picture
                raise AutodoError(
                    f"data {self.shards.manifest.place}: rank {self.rank}'s whole part of a batch does not decode; "
                    "pack again, or start another run with a larger train.batch_size"
                )
            return read, torch.empty(0, 3, self.crop.image_size, self.crop.image_size)
        try:
            return read, self._pixels.decode(read.pictures)
        except DecodeError as error:
            faults = {
                id_: why
                for id_, encoded in zip(read.ids_B.tolist(), read.pictures.encoded, strict=True)
                if (why := self._pixels.fault(encoded)) is not None
            }
            if not faults:
                place = self.shards.manifest.place
                raise AutodoError(f"data {place}: pictures decode alone but not together ({error})") from error
            self.dropped.add(faults)
            return self._without_broken(read)


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

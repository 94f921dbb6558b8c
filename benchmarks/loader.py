"""How fast pictures arrive: this loader beside DALI's own, webdataset and ImageFolder, on pictures like ImageNet's.

Generated JPEGs of 500 × 375 pixels, about 110 kB (noise whose spectrum falls off as that of natural pictures), packed
by `pack`. Every way does the same: decode, a random resized crop to 224 pixels, mirror, normalise to a float32 batch;
with as many threads or worker processes as there are cores. The limit is DALI reading, decoding and resizing alone.

    speed    pictures a second of wall time, ways alternating in rounds; what is queued as a round begins is dropped
    restore  a loader of 1,281,167 rows, made and asked for a batch of the beginning, the middle and the end of an epoch
    start    a process that builds all loaders of a rank on as many rows and goes through its passes: time and memory
    parts    processor time of decoding and resizing a picture, by DALI, PIL and torchvision
    warp     the learnt warp and normalising, beside it
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import typer
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torchvision.transforms.v2 import functional as F

from autodo_dist import build_data
from autodo_dist.data import pil
from autodo_dist.data.decode import Pipeline
from autodo_dist.data.folder import folder_sources
from autodo_dist.data.loader import Loader
from autodo_dist.data.manifest import read_manifest, write_manifest
from autodo_dist.data.pack import pack
from autodo_dist.data.shards import Shards
from autodo_dist.experiment.table import insert
from autodo_dist.load_config import check_config
from autodo_dist.method import warp
from autodo_dist.parallel.comm import Ranks
from benchmarks.hyper_step import CPU, Figure, figure, interleaved, resident, table
from benchmarks.row_table import at_least
from benchmarks.runs import write_rows

IMAGENET, CLASSES = 1_281_167, 10
HEIGHT, WIDTH, QUALITY = 375, 500, 90
SIDE, BATCH, QUEUE = 224, 64, 2  # QUEUE: batches that a way may have ready
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CORES = len(os.sched_getaffinity(0))
LIMIT, DALI = "DALI, decode and resize only", "DALI readers.webdataset"
OURS, OURS_PIL = "this loader", "this loader, PIL decodes"
WEBDATASET, FOLDER = "webdataset + torchvision", "ImageFolder + DataLoader"
MIB = 2**20

Batches = Iterator[Any]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="fewer pictures and rounds: under a minute")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    doc: Annotated[Path | None, typer.Option(help="put the table between the marks in this file")] = None,
) -> None:
    """Time every way, restoring and starting."""
    torch.set_num_threads(1)
    pictures, rounds, batches = (200, 2, 3) if quick else (2000, 15, 8)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = make_pictures(root, pictures)
        rows = [figure("size of a picture", size / 1000, "kB"), *speed(root, rounds, batches)]
        make_imagenet(root)
        rows += [*restoring(root / "imagenet"), *starting(root / "imagenet")]
        rows += [*parts_of_it(root / "packed", rounds), *warping(rounds)]
    load = os.getloadavg()[0]
    command = shlex.join(["python", "-m", "benchmarks.loader", *sys.argv[1:]])
    machine = f"{platform.platform()}, {CORES} cores, load {load:.1f}, torch {torch.__version__}"
    text = f"`{command}` on {machine}\n\n{table(rows)}"
    print(text)
    if json_file is not None:
        write_rows(json_file, rows)
    if doc is not None:
        insert(doc, "results", text)


# Pictures -------------------------------------------------------------------------------------------------------------


def make_pictures(root: Path, count: int) -> float:
    """JPEGs in root/pictures/train/<class>, packed into root/packed; their mean size in bytes."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(CORES, context) as pool:
        for number, encoded in enumerate(pool.map(picture, range(count), chunksize=16)):
            place = root / f"pictures/train/{number % CLASSES}/{number:06d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(encoded)
    classes, sources = folder_sources(root / "pictures", 0, 0.1, 0.1)
    options: dict[str, Any] = {"seed": 0, "shard_samples": 100, "skip_unreadable": False, "origin": {}}
    pack(root / "packed", "generated", classes, sources, report=lambda *_: None, workers=CORES, **options)
    return float(read_manifest(root / "packed").size_N.mean())


def picture(number: int) -> bytes:
    """A JPEG: brightness and two colours are noise with a spectrum of about 1/f."""
    generator = np.random.Generator(np.random.Philox([0, number]))
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    amplitude = 1 / np.maximum(frequency, 1 / WIDTH)

    def noise(deviation: float, steepness: float) -> Any:
        waves = generator.standard_normal((2, *frequency.shape))
        plane = np.fft.irfft2(amplitude**steepness * (waves[0] + 1j * waves[1]), s=(HEIGHT, WIDTH))
        return 128 + deviation * plane / plane.std()

    planes = np.stack([noise(50, 1.1), noise(18, 1.4), noise(18, 1.4)], -1)
    file = io.BytesIO()
    Image.fromarray(planes.clip(0, 255).astype(np.uint8), "YCbCr").save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def make_imagenet(root: Path) -> None:
    """A data set of as many rows as ImageNet in root/imagenet: the packed pictures again and again."""
    packed = read_manifest(root / "packed")
    (root / "imagenet").mkdir()
    for file in (root / "packed").glob("train-*"):
        (root / "imagenet" / file.name).symlink_to(file)
    train = np.flatnonzero(packed.part_N == 0)
    rows = train[np.arange(IMAGENET) % len(train)]
    columns = {
        "id": pa.array(np.arange(IMAGENET)),
        "key": pa.array([f"train/n{row % 1000:08d}/n{row % 1000:08d}_{row}.JPEG" for row in range(IMAGENET)]),
        "shard": packed.shard_N[rows],
        "offset": packed.offset_N[rows],
        "size": packed.size_N[rows],
        "height": packed.height_N[rows],
        "width": packed.width_N[rows],
        "label": packed.label_N[rows],
        "part": packed.part_N[rows],
    }
    shards = [shard for shard in packed.shards if shard.name.startswith("train")]
    write_manifest(root / "imagenet", "as many as ImageNet", list(packed.classes), shards, pa.table(columns), {})


# Speed ----------------------------------------------------------------------------------------------------------------


def speed(root: Path, rounds: int, batches: int) -> list[Figure]:
    """Pictures a second of every way, and the bars on ours."""
    ways: dict[str, Callable[[], Batches]] = {
        LIMIT: partial(by_dali, root / "packed", finish=False),
        OURS: partial(by_this_loader, root / "packed", "dali"),
        OURS_PIL: partial(by_this_loader, root / "packed", "pil"),
        DALI: partial(by_dali, root / "packed", finish=True),
        WEBDATASET: partial(by_webdataset, root / "packed"),
        FOLDER: partial(by_folder, root / "pictures/train"),
    }
    streams = {name: make() for name, make in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for at in range(-1, rounds):
        for name in (*names[at % len(names) :], *names[: at % len(names)]):
            for _ in range(QUEUE * max(1, CORES if name in (WEBDATASET, FOLDER) else 1)):
                next(streams[name])
            start = time.perf_counter()
            for _ in range(batches):
                next(streams[name])
            if at >= 0:
                found[name].append(batches * BATCH / (time.perf_counter() - start))
            settle()
    median = {name: statistics.median(values) for name, values in found.items()}

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))

    best = max((WEBDATASET, FOLDER), key=lambda name: median[name])
    return [
        *(figure(name, value, "pictures/s") for name, value in median.items()),
        figure("this loader beside the limit", ratio(OURS, LIMIT), "times"),
        at_least("this loader beside DALI readers.webdataset", ratio(OURS, DALI), "times", 0.90),
        at_least(f"this loader beside the best without DALI, {best}", ratio(OURS, best), "times", 1.2),
        figure("this loader with PIL beside the best without DALI", ratio(OURS_PIL, best), "times"),
    ]


def settle(most: float = 10.0) -> None:
    """Wait until this way has filled its queues again: it would take its time from the next one's."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    end, before = time.monotonic() + most, used()
    while time.monotonic() < end:
        time.sleep(0.1)
        now = used()
        if now - before < 0.02:
            return
        before = now


def by_this_loader(root: Path, decoder: str) -> Batches:
    """Training batches of a run."""
    loader = loaders(root, decoder).task
    return (batch for epoch in itertools.count() for batch in loader.batches(epoch))


def loaders(root: Path, decoder: str) -> build_data.Loaders:
    """The loaders of a run of one rank."""
    data = {"root": str(root), "decoder": decoder, "threads": CORES, "validation_fraction": 0.04}
    config = check_config({"data": data, "train": {"batch_size": BATCH}}, "of the benchmark")
    manifest = read_manifest(root)
    return build_data.build_loaders(config, manifest, build_data.build_split(config, manifest), Ranks(0, 1, CPU))


def by_dali(root: Path, *, finish: bool) -> Batches:
    """DALI's own reader, shuffling and queues, as documented; `finish`: normalised, and given to torch."""
    pipeline = pipeline_def(_dali)(root, finish, batch_size=BATCH, num_threads=CORES, device_id=None)
    pipeline.build()
    while True:
        (images,) = pipeline.run()
        yield torch.from_dlpack(images.as_tensor()).clone() if finish else images


def _dali(root: Path, finish: bool) -> Any:
    tars = sorted(str(path) for path in root.glob("train-*.tar"))
    indexes = [path.removesuffix("tar") + "idx" for path in tars]
    encoded, _ = fn.readers.webdataset(
        paths=tars, index_paths=indexes, ext=["jpg", "id"], random_shuffle=True, initial_fill=1000
    )
    images = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0])
    images = fn.resize(images, size=[SIDE, SIDE], antialias=True)
    if not finish:
        return images
    mirror = fn.random.coin_flip(probability=0.5)
    mean, std = [255 * each for each in MEAN], [255 * each for each in STD]
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mirror=mirror, mean=mean, std=std)


def transform() -> Any:
    """torchvision's, on tensors, which is faster than on PIL's pictures."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(SIDE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(MEAN), list(STD)),
        ]
    )


def decoded(encoded: bytes) -> Image.Image:
    """By PIL, as webdataset does and ImageFolder; webdataset's own decoding would try its hand at our ids."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def by_webdataset(root: Path) -> Batches:
    """The same shards by webdataset, in worker processes."""
    import webdataset

    tars = sorted(str(path) for path in root.glob("train-*.tar"))
    data = webdataset.WebDataset(tars, shardshuffle=100, nodesplitter=None, empty_check=False).repeat()
    data = data.shuffle(1000).to_tuple("jpg").map_tuple(decoded).map_tuple(transform()).batched(BATCH, partial=False)
    return iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=CORES, prefetch_factor=QUEUE))


def by_folder(root: Path) -> Batches:
    """The pictures' own files by torchvision, in worker processes."""
    from torchvision.datasets import ImageFolder

    loader = torch.utils.data.DataLoader(
        ImageFolder(root, transform()),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=CORES,
        prefetch_factor=QUEUE,
        persistent_workers=True,
    )
    return (batch for _ in itertools.count() for batch in loader)


# Restoring and starting -----------------------------------------------------------------------------------------------


def restoring(root: Path) -> list[Figure]:
    """Seconds from nothing but the manifest to a batch of the beginning, the middle and the end of an epoch."""
    seconds = []
    loaders(root, "dali")  # imports
    for share in (0.0, 0.5, 0.9999):
        made: Loader = loaders(root, "dali").task
        start = time.perf_counter()
        batches = made.batches(1, int(share * made.steps))
        next(batches)
        seconds.append(time.perf_counter() - start)
        batches.close()
    return [figure("restoring a position, the slowest of three", max(seconds), "s", 2.0)]


def starting(root: Path) -> list[Figure]:
    """Time and memory of all loaders of a rank, in a process of their own, its imports not counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds, memory = pool.submit(start_all, root).result()
    return [
        figure("start of all loaders of a rank", seconds, "s", 10.0),
        figure("memory of all loaders of a rank", memory / MIB, "MiB", 1e9 / MIB),
    ]


def start_all(root: Path) -> tuple[float, float]:
    """Seconds from the manifest to a batch of every loader, one pass after another as in a run, and the most bytes."""
    torch.set_num_threads(1)
    before, start = resident("VmRSS"), time.perf_counter()
    made = loaders(root, "dali")
    for together in (
        (made.task, made.hyper_validation),
        (made.hyper, made.hyper_validation),
        (made.validation,),
    ):
        passes = [loader.batches(0) for loader in together]
        for batches in passes:
            next(batches)
        if together[0] is made.validation:
            seconds = time.perf_counter() - start
        for _, batches in itertools.product(range(4), passes):  # until its queues are full
            next(batches, None)
        for batches in passes:
            batches.close()
    return seconds, MIB * (resident("VmHWM") - before)


def parts_of_it(root: Path, rounds: int) -> list[Figure]:
    """Processor time of decoding and of resizing a whole picture, by those who could do it on the CPU; one thread."""
    manifest = read_manifest(root)
    encoded = Shards(manifest).read(range(BATCH))
    images = [torch.from_numpy(pil.decode(each.tobytes())).permute(2, 0, 1) for each in encoded]
    decode, both = (Pipeline(_decode_and_resize, resize, most=BATCH, threads=1, gpu=None) for resize in (False, True))
    seconds = interleaved(
        {
            "DALI decodes": lambda: decode.run(encoded=encoded),
            "DALI decodes and resizes": lambda: both.run(encoded=encoded),
            "PIL decodes": lambda: [pil.decode(each.tobytes()) for each in encoded],
            "torchvision resizes": lambda: [F.resize(image, [SIDE, SIDE], antialias=True) for image in images],
        },
        rounds,
    )
    return [
        figure(f"{name} a picture, one thread", 1000 * statistics.median(values) / BATCH, "ms")
        for name, values in seconds.items()
    ]


def _decode_and_resize(resize: bool) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
    return fn.resize(images, size=[SIDE, SIDE], antialias=True) if resize else images


def warping(rounds: int) -> list[Figure]:
    """Pictures a second of the learnt warp and of normalising, on one thread."""
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    draws = torch.rand(BATCH, 2 * len(warp.AFFINE))
    gate, magnitude = (torch.full((BATCH, len(warp.AFFINE)), value) for value in warp.start_logits())
    strengths = warp.strengths(gate, magnitude, draws)
    scale, shift = torch.rand(2, 3, 1, 1)

    def rate(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            with torch.no_grad():
                work()
            seconds.append(time.perf_counter() - start)
        return BATCH / statistics.median(seconds[1:])

    return [
        figure("learnt warp, one thread", rate(lambda: warp.augment(images, strengths, MEAN, STD)), "pictures/s"),
        figure("normalising, one thread", rate(lambda: images.mul(scale).add_(shift)), "pictures/s"),
    ]


if __name__ == "__main__":
    typer.run(main)

"""What the report of a run of ImageNet's size costs: bytes of the page, seconds, memory of its process.

The run is made for it, in a temporary folder: 1,281,167 train samples of 1,000 classes with every group learnt (a row
is 1,015 values, 5.2 GB in all; second moments are left out, as a report does not read them), 90 epochs of metrics with
accuracies of every class, and a data set whose samples share a few hundred pictures of 500 × 375 pixels, as large as
ImageNet's are on average (110 kB). Rows are those of a start, with noise on all logits; a tenth of the given labels are
others than the packed ones, and the soft labels of half of those have moved to these.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import torch
import typer
from PIL import Image

from autodo_dist import ledger
from autodo_dist.config import Config
from autodo_dist.data.manifest import PARTS, Shard, read_manifest, write_manifest
from autodo_dist.data.split import Labels, Split
from autodo_dist.data.split_file import checksum, encode, write_split
from autodo_dist.files import sha256, write_json
from autodo_dist.hyperparameters import Layout
from autodo_dist.load_config import check_config
from autodo_dist.method import warp
from autodo_dist.parallel import checkpoint_save, comm
from benchmarks.hyper_step import CPU, Figure, figure, table
from benchmarks.runs import as_command, write_rows

CLASSES, EPOCHS, LINES = 1000, 90, 250  # lines of metrics an epoch: 5,004 steps, a line every 20
LAYOUT = Layout("per_sample", warp.AFFINE, True, CLASSES, 0.1)
PICTURES, SIDES, KILOBYTES = 300, (500, 375), 110
TOGETHER = 1 << 13  # rows that are made together
MOST_MB, MOST_SECONDS, MOST_GB = 20.0, 60.0, 4.0
ROOT, ONE_THREAD = Path(__file__).resolve().parent.parent, {"OMP_NUM_THREADS": "1"}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="50,000 samples")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
) -> None:
    """Make a run, measure its report, then print a Markdown table with the bars that it is to hold."""
    torch.set_num_threads(1)
    samples = 50_000 if quick else 1_281_167
    machine = f"{platform.platform()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}"
    print(f"`{shlex.join(['python', '-m', 'benchmarks.report', *sys.argv[1:]])}` on {machine}\n")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        rows = measure(make_run(Path(folder), samples), Path(folder) / "report.html", samples)
    print(table(rows))
    if json_file is not None:
        write_rows(json_file, rows)


# The report as a process of its own, which says at its end what it has held and used. (What the kernel tells a parent
# of its child's memory counts the parent's own, before exec.)
CHILD = """
import resource, sys
from autodo_dist.cli import app
app(["report", *sys.argv[1:]], standalone_mode=False)
from benchmarks.hyper_step import resident
used = resource.getrusage(resource.RUSAGE_SELF)
print(resident("VmHWM"), used.ru_utime + used.ru_stime)
"""


def measure(run: Path, out: Path, samples: int) -> list[Figure]:
    """The figures of `autodo report`, once what was written before is on the disk."""
    os.sync()
    command = [sys.executable, "-c", CHILD, str(run), "--out", str(out)]
    begun = time.perf_counter()
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | ONE_THREAD)
    seconds = time.perf_counter() - begun
    if "not on the page" in said.stderr:
        raise RuntimeError(said.stderr)
    load = os.getloadavg()[0]  # over the last minute, this process with it
    held, used = map(float, said.stdout.splitlines()[-1].split())
    return [
        figure("train samples", samples, "rows"),
        figure("size of the page", out.stat().st_size / 1e6, "MB", MOST_MB),
        figure("seconds, wall clock", seconds, "s", MOST_SECONDS),
        figure("seconds of the processor", used, "s"),
        figure("load of the machine meanwhile", load, "processes"),
        figure("peak memory (resident)", held * 2**20 / 1e9, "GB", MOST_GB),
    ]


def make_run(folder: Path, samples: int) -> Path:
    """A finished run over so many train samples, and its data set, below `folder`; the run's folder."""
    random = np.random.default_rng(0)
    true_N = random.integers(CLASSES, size=samples + 50 * CLASSES, dtype=np.int32)
    true_N[samples:] = np.arange(50 * CLASSES) % CLASSES
    given_N = true_N.copy()
    redrawn = random.random(samples) < 0.1
    given_N[:samples][redrawn] = random.integers(CLASSES, size=int(redrawn.sum()))
    classes = [f"n{number:08}" for number in range(CLASSES)]
    write_data(folder / "data", true_N, samples, classes, random)
    write_labels(folder / "split.bin", folder / "data", given_N, samples)
    config = settings(folder)
    run = config.folder
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml())
    write_metrics(run, classes, checksum(folder / "split.bin"), random)
    write_table(run, folder / "values", given_N[:samples], true_N[:samples])
    return run


def settings(folder: Path) -> Config:
    """Those of configs/imagenet's kind: every group per sample."""
    return check_config(
        {
            "run": {"root": str(folder / "runs"), "name": "imagenet"},
            "data": {"root": str(folder / "data"), "split": str(folder / "split.bin")},
            "train": {"epochs": EPOCHS},
            "learn": {"augment": "per_sample", "weight": True, "soft_label": True},
            "hyper": {"start_epoch": 50},
        },
        "benchmark",
    )


def write_data(root: Path, true_N: Labels, samples: int, classes: list[str], random: np.random.Generator) -> None:
    """A packed data set whose samples share pictures, all in one shard."""
    root.mkdir()
    encoded = [picture(random) for _ in range(PICTURES)]
    (root / "train-00000.tar").write_bytes(b"".join(encoded))
    (root / "train-00000.idx").write_text("")
    size_n = np.array([len(each) for each in encoded])
    which_N = random.integers(PICTURES, size=len(true_N))
    part_N = np.full(len(true_N), PARTS.index("validation"), np.int8)
    part_N[:samples] = PARTS.index("train")
    width, height = SIDES
    columns = {
        "id": np.arange(len(true_N)),
        "key": [f"{classes[label]}/{classes[label]}_{id_}.JPEG" for id_, label in enumerate(true_N)],
        "shard": np.zeros(len(true_N), np.int32),
        "offset": (size_n.cumsum() - size_n)[which_N],
        "size": size_n[which_N],
        "height": np.full(len(true_N), height, np.int32),
        "width": np.full(len(true_N), width, np.int32),
        "label": true_N,
        "part": part_N,
    }
    tar = root / "train-00000.tar"
    shard = Shard(tar.name, tar.stat().st_size, len(true_N), sha256(tar), sha256(tar.with_suffix(".idx")))
    write_manifest(root, "imagenet", classes, [shard], pa.table(columns), {})


def picture(random: np.random.Generator) -> bytes:
    """A JPEG of noise on several scales, of about KILOBYTES."""
    width, height = SIDES
    image = Image.new("RGB", SIDES)
    for scale in (125, 25, 5, 1):
        noise = random.integers(0, 256, (height // scale, width // scale, 3), dtype=np.uint8)
        image = Image.blend(
            image, Image.fromarray(noise).resize(SIDES, Image.Resampling.BICUBIC), 0.75 * scale**0.5 / 12
        )
    quality = 95
    while True:
        with io.BytesIO() as file:
            image.save(file, "JPEG", quality=quality)
            if file.tell() <= 1000 * KILOBYTES or quality <= 10:
                return file.getvalue()
        quality -= 5


def write_labels(path: Path, data: Path, given_N: Labels, samples: int) -> None:
    """The split file with the given labels."""
    manifest = read_manifest(data)
    ids = np.arange(len(given_N))
    split = Split(ids[:samples], ids[samples:], ids[:0], given_N)
    write_split(path, encode(split, manifest, {}))


def write_metrics(run: Path, classes: list[str], split: str, random: np.random.Generator) -> None:
    """metrics.jsonl, environment.json, summary.json and ledger.jsonl of EPOCHS epochs."""
    with (run / "metrics.jsonl").open("w") as file:
        for epoch in range(EPOCHS):
            for line in range(LINES):
                row = {"kind": "task", "step": 0, "epoch": epoch + (line + 1) / LINES, "loss": random.random()}
                row |= {"accuracy": random.random(), "seconds": 10.0, "images_per_second": 512.0}
                file.write(json.dumps(row) + "\n")
            accuracy = dict(zip(classes, random.random(CLASSES).tolist(), strict=True))
            found = {"kind": "evaluation", "step": 0, "epoch": epoch + 1}
            for part in ("validation", "test"):
                found |= {f"{part}_loss": 2.0, f"{part}_accuracy": 0.5, f"{part}_accuracy_per_class": accuracy}
            file.write(json.dumps(found) + "\n")
    seconds = {"task": 5e5, "hyper": 3e5, "data": 1e4, "evaluation": 2e4, "save": 1e3}
    write_json(run / "summary.json", {"seconds": seconds})
    write_json(
        run / "environment.json",
        {"split_checksum": split, "starts": [{"time": "2026-01-01T00:00:00", "git_commit": "0" * 40}]},
    )
    ledger.add(run, {"event": "end", "attempt": "", "cause": "finished", "why": ""})


def write_table(run: Path, beside: Path, given_N: Labels, true_N: Labels) -> None:
    """The checkpoint; values are made in a file, so that they need no memory of this process."""
    count = len(given_N)
    values_NP = torch.from_file(str(beside), shared=True, size=count * LAYOUT.width).view(count, LAYOUT.width)
    generator = torch.Generator().manual_seed(0)
    moved_N = (given_N != true_N) & (np.arange(count) % 2 == 0)
    for start in range(0, count, TOGETHER):
        part = slice(start, start + TOGETHER)
        labels_n = np.where(moved_N, true_N, given_N)[part]
        rows = LAYOUT.start(labels_n, torch.float32)
        values_NP[part] = rows + 0.5 * torch.randn(rows.shape, generator=generator)
    state = {"hyper": {"rows": {"value": values_NP, "touched": torch.ones(count, dtype=torch.int64)}}}
    with comm.process_group(comm.place(), CPU) as ranks:
        checkpoint_save.save(run / "checkpoints", 1, state, {"step": 1}, ranks)
    beside.unlink()


if __name__ == "__main__":
    as_command(main)

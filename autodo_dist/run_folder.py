"""The folder of a run: which run it is, where it was run, what came of it.

runs/NAME/
  config.yaml         every setting, resolved
  environment.json    checksums of data set and split; of each start: git commit, versions, hosts, ranks
  metrics.jsonl       a line every train.log_every steps and every evaluation
  history.jsonl       rows of a few samples at the ends of epochs, see history.py
  tensorboard/        with train.tensorboard: the numbers of metrics.jsonl as curves, see curves.py
  checkpoints/        see parallel/checkpoint.py
  logs/               plain lines, a file a rank
  slurm.json          under Slurm: the last job; its script and ranks' output are in submitit/, its code in code-…/
  lock.1.json         while a run is under way: who holds the folder, see run_lock.py
  ranks/              while a run is under way: where each rank is, see launcher/warden.py
  nonfinite.jsonl     with train.on_nonfinite=rollback: batches that were left out, see nonfinite.py
  dropped.csv         with data.on_error=skip: pictures that do not decode
  labels.csv          of each train sample: what a run knows of its label, and how suspect that is, see labels_csv.py
  predictions.safetensors   what the model says of the train pictures, see predictions.py
  summary.json        the result; a run that has it is finished
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import logging
import os
import platform
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from autodo_dist import __version__
from autodo_dist.config import Config, differences
from autodo_dist.data import split_file
from autodo_dist.data.manifest import Manifest
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, write_json, write_text
from autodo_dist.load_config import check_config

log = logging.getLogger(__name__)
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "deepspeed", "submitit", "webdataset", "numpy")


def check_same_run(config: Config, data_checksum: str) -> None:
    """Refuse a folder that holds another run: other settings than those free at a resume, another data set or split.

    A fork's data set and split are those of the run that it starts from.
    """
    folder, source = config.folder, config.run.fork.rpartition("@")[0]
    if source:
        check_same_data(Path(source), config.data.root, data_checksum, config.data.split)
    if not (folder / "config.yaml").is_file():
        return
    changed = differences(read_config(folder), config)
    if changed:
        raise AutodoError(
            f"run {folder}: was made with other settings ({'; '.join(changed)}); "
            "choose another run.name, take the old settings, or delete the folder"
        )
    check_same_data(folder, config.data.root, data_checksum, config.data.split)


def check_same_data(folder: Path, place: str, data_checksum: str, split: Path | None) -> None:
    """Refuse a data set or a split file other than the one that the run was made with."""
    path = folder / "environment.json"
    if not path.is_file():
        return
    made_with = read_json(path)
    if made_with.get("data_checksum", data_checksum) != data_checksum:
        raise AutodoError(
            f"run {folder}: was made with another packed data set than {place} (checksum of its manifest); "
            "set data.root to that one, or choose another run.name"
        )
    if made_with.get("split_checksum") != split_checksum(split):
        raise AutodoError(
            f"run {folder}: was made with another split than data.split = {split} (checksum "
            f"{_short(made_with.get('split_checksum'))}, now {_short(split_checksum(split))}); "
            "set data.split to that one, or choose another run.name"
        )


def split_checksum(split: Path | None) -> str | None:
    """Checksum of the split file; None where a run has none."""
    return None if split is None else split_file.checksum(split)


def make(folder: Path) -> None:
    """Make the run's folder. AutodoError if it cannot be written to."""
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AutodoError(f"run folder {folder}: cannot be written to ({error.strerror}); set run.root") from error


def finished(folder: Path) -> bool:
    """Whether the run has come to its end."""
    return (folder / "summary.json").is_file()


def describe(config: Config, data_checksum: str, hosts: list[str], main: bool) -> None:
    """Write config.yaml, and add this start to environment.json; done by rank 0 (`main`)."""
    if not main:
        return
    folder = config.folder
    write_text(folder / "config.yaml", config.to_yaml())
    path = folder / "environment.json"
    starts = read_json(path).get("starts", []) if path.is_file() else []
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": git_commit(),
        "hosts": hosts,
        "python": platform.python_version(),
        "autodo_dist": __version__,
    } | {name: _version(name) for name in PACKAGES}
    checksums = {"data_checksum": data_checksum, "split_checksum": split_checksum(config.data.split)}
    write_json(path, checksums | {"starts": [*starts, start]})


def write_dropped(folder: Path, why: dict[int, str], manifest: Manifest) -> int:
    """Add pictures that were dropped (id -> why) to dropped.csv, and say which are new; how many it holds then."""
    path = folder / "dropped.csv"
    known = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            known = {int(row["id"]): row["why"] for row in csv.DictReader(file)}
    if new := why.keys() - known.keys():
        names = ", ".join(str(manifest.keys[id_]) for id_ in sorted(new)[:5])
        more = " …" if len(new) > 5 else ""
        log.warning("left out, as they do not decode: %d pictures (%s%s), see %s", len(new), names, more, path)
        text = io.StringIO()
        rows = [(id_, manifest.keys[id_], reason) for id_, reason in sorted((known | why).items())]
        csv.writer(text, lineterminator="\n").writerows([("id", "key", "why"), *rows])
        write_text(path, text.getvalue())
    return len(known | why)


def read_config(folder: Path) -> Config:
    """The settings that a run was made with. AutodoError where the folder holds no run."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise AutodoError(f"run {folder}: no run there (no config.yaml); see `ls {folder.parent}`")
    try:
        return check_config(yaml.safe_load(path.read_text()), str(path))
    except yaml.YAMLError as error:
        raise AutodoError(f"run {path}: broken yaml; delete the run folder") from error


def git_commit(besides: Path | None = None) -> str | None:
    """Commit of the code that runs, with `+changes` where the working tree differs; None outside a checkout.

    Changes in the folder `besides` do not count.
    """
    root = Path(__file__).resolve().parent.parent
    what = [":/"]
    if besides is not None and root in besides.resolve().parents:
        what.append(f":(exclude,top){besides.resolve().relative_to(root)}")
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        command = ["git", "status", "--porcelain", "--", *what]
        status = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def host() -> str:
    """Name of this machine, with the process id: where a rank runs."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _short(checksum: str | None) -> str:
    return "none" if checksum is None else checksum[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

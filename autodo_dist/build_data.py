"""From settings to the stream of data: manifest, split, loaders."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from autodo_dist import run_folder
from autodo_dist.config import Config
from autodo_dist.data import order
from autodo_dist.data.loader import Batch, Dropped, Loader, endless
from autodo_dist.data.manifest import Manifest, cache_folder, read_manifest
from autodo_dist.data.order import Crop, Ids
from autodo_dist.data.pixels import Finish, Pixels
from autodo_dist.data.policies import Policy, make_choice, make_erase
from autodo_dist.data.shards import Shards
from autodo_dist.data.split import Recipe, Split, folds, make_split
from autodo_dist.data.split_file import read_split
from autodo_dist.data.staging import Turn
from autodo_dist.data.torchvision_pixels import PilWindows, TorchvisionPixels
from autodo_dist.errors import AutodoError
from autodo_dist.method import warp
from autodo_dist.parallel.comm import Ranks

log = logging.getLogger(__name__)
DEFAULT_CACHE_GB = 10.0  # in the default folder: home folders are small
MORE_CLEAN = "raise data.validation_fraction (or that of the file data.split), or pack a validation part"


@dataclass(frozen=True)
class Loaders:
    """A stream for each use, and what they all dropped. `hyper` and `hyper_validation` are the two sides of a hyper
    step; `validation_passes` of the latter are for each epoch of the former.
    """

    task: Loader
    hyper: Loader
    hyper_validation: Loader
    validation_passes: int
    validation: Loader
    test: Loader
    dropped: Dropped

    def unseen(self, epoch: int) -> Loader:
        """The clean pictures that the epoch does not train on: all of them, or its fold."""
        folds_F = self.task.absent
        return self.validation.over(order.left_out(folds_F, epoch)) if folds_F else self.validation

    def validations(self, epoch: int, done: int = 0) -> Iterator[Batch]:
        """The validation batches of an epoch's hyper steps, those after the first `done`."""
        first = epoch * self.validation_passes * self.hyper_validation.steps
        return endless(self.hyper_validation, first + done)


def read_data(config: Config, elsewhere: Path | str | None = None) -> Manifest:
    """The manifest of the packed data set, or of its copy `elsewhere`."""
    cache = config.data.cache
    return read_manifest(elsewhere or config.data.root, expand("data.cache", cache) if cache else None)


def read_data_of(run: Path, config: Config, elsewhere: Path | str | None = None) -> Manifest:
    """The manifest of the data set that the run in this folder was made with, or of its copy `elsewhere`.

    AutodoError for another data set or split.
    """
    manifest = read_data(config, elsewhere)
    run_folder.check_same_data(run, manifest.place, manifest.checksum, config.data.split)
    return manifest


def build_split(config: Config, manifest: Manifest) -> Split:
    """The parts of the run and the given labels: of the file that data.split names, or drawn by the other settings."""
    data = config.data
    if data.split is not None:
        return trained_on(read_split(data.split, manifest), manifest, data.train_on)
    recipe = Recipe(
        validation_fraction=data.validation_fraction,
        imbalance_ratio=data.imbalance_ratio,
        noise_rate=data.label_noise,
        seed=data.split_seed,
    )
    split = make_split(manifest.label_N, manifest.part_N, len(manifest.classes), recipe)
    return trained_on(split, manifest, data.train_on)


def trained_on(split: Split, manifest: Manifest, what: Literal["train", "all", "clean"]) -> Split:
    """The split whose train part is what data.train_on says; clean pictures keep their true labels."""
    if what == "train":
        return split
    label_N = split.label_N.copy()
    label_N[split.validation] = manifest.label_N[split.validation]
    train = split.validation if what == "clean" else np.union1d(split.train, split.validation)
    return replace(split, train=train, label_N=label_N)


def clean_folds(config: Config, manifest: Manifest, split: Split) -> tuple[Ids, ...]:
    """The folds of the clean validation part that epochs leave out in turn; none where it is not trained on.

    AutodoError if there are more folds than pictures.
    """
    count = config.learn.clean_folds
    if not count:
        return ()
    if len(split.validation) < count:
        raise AutodoError(
            f"learn.clean_folds = {count}: there are {len(split.validation)} clean pictures; lower it, or {MORE_CLEAN}"
        )
    return folds(split.validation, manifest.label_N, len(manifest.classes), count, config.train.seed)


def warn_of_scarce(folds_F: tuple[Ids, ...], manifest: Manifest, split: Split) -> None:
    """Say where a class has fewer clean pictures than there are folds."""
    counts = np.bincount(manifest.label_N[split.validation], minlength=len(manifest.classes))
    if len(folds_F) > counts.min():
        log.warning(
            "class %s has %d clean pictures for %d folds: in the other epochs nothing is learnt by it; %s",
            manifest.classes[counts.argmin()],
            counts.min(),
            len(folds_F),
            f"lower learn.clean_folds, or {MORE_CLEAN}",
        )


def check_split(config: Config, manifest: Manifest, split: Split) -> None:
    """Refuse a split that leaves a class without train pictures or, where something is learnt, without clean ones."""
    if missing := lacking(manifest, split.train):
        if config.data.train_on == "clean":
            raise AutodoError(f"data.train_on = clean: no clean picture of class {missing}; {MORE_CLEAN}")
        what = f"data.validation_fraction = {config.data.validation_fraction}"
        if config.data.split is not None:
            what = f"data.split = {config.data.split}"
        raise AutodoError(f"{what}: leaves class {missing} without a train picture; lower it, or leave out the class")
    if config.learn.anything and (missing := lacking(manifest, split.validation)):
        raise AutodoError(
            f"validation part: no picture of class {missing}; learning needs clean ones of every class: {MORE_CLEAN}"
        )


def lacking(manifest: Manifest, ids: Ids) -> str:
    """The first classes of which there is no picture among `ids`; empty if there is none."""
    counts = np.bincount(manifest.label_N[ids], minlength=len(manifest.classes))
    return ", ".join(manifest.classes[label] for label in np.flatnonzero(counts == 0)[:5])


def check_sizes(config: Config, pictures: int, ranks: int) -> None:
    """Refuse a batch that the data or the ranks are too few for."""
    batch = config.train.batch_size
    if batch < ranks:
        raise AutodoError(f"train.batch_size = {batch}: less than one picture for each of {ranks} ranks; raise it")
    if pictures < batch:
        raise AutodoError(
            f"train.batch_size = {batch}: more than the {pictures} train pictures that the split leaves; lower it"
        )


def choose_kept(train: Ids, samples: int, wanted: tuple[int, ...], seed: int) -> Ids:
    """The ids whose rows are kept, sorted: the wanted ones, and so many drawn from the sorted train ids.

    AutodoError for a wanted id that is no train sample of the run.
    """
    unknown = np.setdiff1d(np.array(wanted, np.int64), train)
    if len(unknown):
        raise AutodoError(
            f"history.ids: {unknown[0]} is none of the {len(train)} train samples of this run; leave it out, or choose "
            "another (RUN/labels.csv of a finished run lists them)"
        )
    drawn = np.random.Generator(np.random.Philox(seed)).permutation(train)[:samples]
    return np.union1d(drawn, np.array(wanted, np.int64))


def operations(config: Config) -> tuple[str, ...]:
    """The learnt operations; none where augmentation is not learnt."""
    if config.learn.augment == "none":
        return ()
    return (*warp.AFFINE, *warp.COLOR) if config.learn.color else warp.AFFINE


def build_loaders(config: Config, manifest: Manifest, split: Split, ranks: Ranks) -> Loaders:
    """A loader for each use; only train pictures have the given labels, only what is trained on gets the policy."""
    data, clean = config.data, split.validation
    folds_F = clean_folds(config, manifest, split)
    warn_of_scarce(folds_F, manifest, split)
    crop = Crop(data.crop, data.crop_area, data.crop_padding, data.image_size, data.evaluation_crop, data.flip)
    policy, pixels, dropped = build_policy(config), build_pixels(config, ranks.device), build_dropped(config, manifest)
    plain = Finish(crop, data.mean, data.std)
    augmented = replace(plain, operations=policy.operations, erases=policy.erase is not None) if policy else plain
    load = functools.partial(
        Loader,
        Shards(manifest),
        dropped=dropped,
        seed=config.train.seed,
        rank=ranks.rank,
        ranks=ranks.ranks,
        crop=crop,
        device=ranks.device,
        most_steps=config.train.steps_per_pass,
    )
    batch = config.train.batch_size
    piece = -(-batch // config.train.accumulate)
    train = functools.partial(
        load,
        pixels=functools.partial(pixels, augmented),
        batch_size=batch,
        draws=2 * len(operations(config)),
        policy=policy,
    )
    evaluate = functools.partial(load, pixels=functools.partial(pixels, plain), label_N=manifest.label_N)
    everything = trained_on(split, manifest, "all" if folds_F else "train")
    task = train(pass_="task", ids=everything.train, label_N=everything.label_N, absent=folds_F)
    others_F = [np.setdiff1d(clean, fold, assume_unique=True) for fold in folds_F]
    # A small clean part is one batch; without any, the run learns nothing and this loader is not used.
    validation_batch = max(1, min(batch, order.fewest(clean, others_F)))
    hyper_validation = evaluate(ids=clean, pass_="validation", batch_size=validation_batch, absent=others_F)
    passes = -(-task.steps // (config.hyper.validation_every * max(1, hyper_validation.steps)))
    hyper_validation.absent = [others for others in others_F for _ in range(passes)]  # an epoch's passes have one fold
    return Loaders(
        task=task,
        hyper=train(pass_="hyper", ids=split.train, label_N=split.label_N),
        hyper_validation=hyper_validation,
        validation_passes=passes,
        validation=evaluate(ids=clean, pass_="evaluation", batch_size=piece),
        test=evaluate(ids=split.test, pass_="evaluation", batch_size=piece),
        dropped=dropped,
    )


def build_policy(config: Config) -> Policy | None:
    """What training pictures get after their window; None: nothing. AutodoError if a level is missing."""
    data = config.data
    choice = make_choice(data.policy, data.policy_operations, data.policy_strength, data.sub_policies, data.image_size)
    erase = make_erase(data.erase, data.erase_area, data.erase_probability, data.image_size)
    return Policy(choice, erase) if choice or erase else None


def build_pixels(config: Config, device: torch.device) -> Callable[[Finish, int], Pixels]:
    """How so many pictures become pixels: all by DALI on a GPU; on the CPU decoded by DALI, or by PIL where that is set
    or DALI is not installed.
    """
    data = config.data
    if data.decoder != "pil":
        try:
            from autodo_dist.data.dali import DaliPixels, DaliWindows
        except ImportError as error:
            if data.decoder == "dali":
                raise AutodoError(f"data.decoder = dali: not installed ({error}); set data.decoder=pil") from error
            log.warning("DALI is not installed: PIL decodes")
        else:
            if decode_on_gpu(data.device, device):
                return lambda finish, most: DaliPixels(finish, most, data.threads, device.index)
            return lambda finish, most: TorchvisionPixels(
                finish, data.threads, DaliWindows(finish.crop, most, data.threads)
            )
    if data.device == "gpu":
        raise AutodoError("data.device = gpu: PIL decodes on the CPU; install DALI, or set data.device=auto")
    return lambda finish, most: TorchvisionPixels(finish, data.threads, PilWindows(data.threads))


def build_dropped(config: Config, manifest: Manifest) -> Dropped:
    """Where pictures that do not decode are noted, and how many may be."""
    skip = config.data.on_error == "skip"
    return Dropped(manifest, math.ceil(config.data.most_dropped * len(manifest)) if skip else 0)


def decode_on_gpu(setting: Literal["auto", "cpu", "gpu"], device: torch.device) -> bool:
    """Whether DALI decodes on the GPU. AutodoError if it should and this rank has none."""
    if setting == "gpu" and device.type != "cuda":
        raise AutodoError("data.device = gpu: this rank trains on the CPU; set train.device=cuda, or data.device=auto")
    return setting != "cpu" and device.type == "cuda"


def keep_shards(config: Config, shards: Shards, ranks: Ranks) -> None:
    """Copy shards to this node as the settings say: first, or in the background. Every rank must call this."""
    data, manifest = config.data, shards.manifest
    limit = data.cache_gb
    if data.stage_to:
        folder = cache_folder(expand("data.stage_to", data.stage_to), manifest.checksum)
    elif data.cache:
        folder = cache_folder(expand("data.cache", data.cache), manifest.checksum)
    elif manifest.remote:
        folder, limit = manifest.root, DEFAULT_CACHE_GB if limit is None else limit
    elif limit is None:
        return
    else:
        raise AutodoError(f"data.cache_gb = {limit:g}: of a copy that is not made; set data.cache or data.stage_to too")
    hosts = ranks.gather(socket.gethostname())
    node = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]
    shards.keep(
        folder,
        None if limit is None else round(limit * 1e9),
        Turn(node.index(ranks.rank), len(node)),
        ranks.gather if data.stage_to else None,
        strict=data.on_error == "stop",
    )


def expand(setting: str, folder: str) -> Path:
    """A folder with ~ and $NAME replaced as this node has them. AutodoError for a variable that is not set here."""
    for name in re.findall(r"\$(?:\{(\w+)\}|(\w+))", folder):
        if not os.environ.get("".join(name)):
            raise AutodoError(f"{setting} = {folder}: {''.join(name)} is not set on {socket.gethostname()}")
    return Path(os.path.expanduser(os.path.expandvars(folder)))

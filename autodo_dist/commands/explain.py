"""`autodo explain`: one train sample: what was learnt of it over time, and its pictures as the model saw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autodo_dist.commands.rows import operations_lines, parse_ids
from autodo_dist.errors import AutodoError

if TYPE_CHECKING:  # they import torch, which the other commands can do without
    from PIL.Image import Image

    from autodo_dist.learnt import Source
    from autodo_dist.replay import Course, Kept, View

SHOWN = 6  # epochs, where none are asked for


def explain(
    run: Annotated[Path, typer.Argument(help="run folder, e.g. runs/digits")],
    sample: Annotated[str, typer.Argument(metavar="ID", help="a train sample: its id, or its key")],
    epoch: Annotated[
        str | None, typer.Option(help="epochs of the pictures, from 1, e.g. 3,17,40-45; by default a few")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="warp all pictures by the row in the checkpoint of this step")
    ] = None,
    data: Annotated[str | None, typer.Option(help="the packed data set, where it lies elsewhere by now")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="where the pictures go; by default RUN/explain-ID.png")
    ] = None,
) -> None:
    """Show one sample: its row over time, and a sheet of its pictures as loaded and as the model got them.

    They are made again from the run's order and draws, to the bit where its row of then is known; it says where not.
    """
    from autodo_dist import replay
    from autodo_dist.learnt import open_source

    source = open_source(run, None, data)
    id_ = find_sample(source, sample)
    course = replay.course_of(source, id_)
    kept = replay.rows_over_time(source, course)
    only = next((it for it in kept if it.where == f"checkpoint of step {step}"), None)
    if step is not None and only is None:
        have = ", ".join(it.where.rpartition(" ")[2] for it in kept if it.where.startswith("checkpoint"))
        raise AutodoError(f"--step {step}: run {run} keeps no checkpoint of it; those there: {have or 'none'}")
    typer.echo("\n".join([*head(source, id_), *table(kept), *augmentation_lines(source, kept)]))
    views, lines = replayed(source, course, kept, epochs(course, kept, epoch), only)
    path = out or run / f"explain-{id_}.png"
    save(draw(source, id_, views), path)
    typer.echo("\n".join([f"  pictures: {path}; packed, then as loaded above and as the model got it below", *lines]))


def find_sample(source: Source, word: str) -> int:
    """The id of a train sample that is named by id or key. AutodoError if there is none."""
    import numpy as np
    import pyarrow.compute as pc

    manifest, split = source.manifest, source.split
    if word.isascii() and word.isdigit():
        id_ = int(word)
        if id_ >= len(manifest):
            raise AutodoError(f"id {word}: the data set has ids 0 to {len(manifest) - 1}")
    else:
        id_ = pc.index(manifest.keys, word).as_py()
        if id_ < 0:
            raise AutodoError(f"{word!r}: neither an id (0 to {len(manifest) - 1}) nor a key of {manifest.place}")
    for name, part in (("validation", split.validation), ("test", split.test)):
        if id_ in part:
            raise AutodoError(f"id {id_} ({manifest.keys[id_]}): of the {name} part; only train samples have a row")
    if not np.isin(id_, split.train):
        raise AutodoError(f"id {id_} ({manifest.keys[id_]}): left out of the train part by the split; it has no row")
    return id_


def head(source: Source, id_: int) -> list[str]:
    """Key and labels."""
    manifest, given = source.manifest, source.split.label_N[id_]
    true = f", true label {manifest.classes[manifest.label_N[id_]]}" if source.truth_known else ""
    return [f"id {id_}: {manifest.keys[id_]}", f"  given label {manifest.classes[given]}{true}"]


def table(kept: Sequence[Kept]) -> list[str]:
    """A line for each time at which the row is known; one that says the same as the line before is left out."""
    lines, said = [f"  {'row at':28} {'step':>8} {'updated':>8}  weight   given  likeliest labels"], ""
    for it in kept:
        row = it.row
        weight = f"{row['weight']:8.4g}" if "weight" in row else f"{'':8}"
        given = f"{row['given_probability']:7.4f}" if "soft_label" in row else f"{'':7}"
        labels = ", ".join(f"{name} {p:.4f}" for name, p in row.get("soft_label", {}).items())
        text = f"{row.get('last_hyper_step', ''):8} {weight} {given}  {labels}".rstrip()
        if row and text != said:
            lines.append(f"  {it.where:28} {it.step:8} {text}")
            said = text
    return lines if said else []


def augmentation_lines(source: Source, kept: Sequence[Kept]) -> list[str]:
    """The newest augmentation; none where it is not learnt."""
    import torch

    from autodo_dist.learnt import augmentation

    known = [it for it in kept if it.logits is not None]
    if not known or known[-1].logits is None:
        return []
    learnt = augmentation(source.layout.operations, *(torch.tensor(it).double() for it in known[-1].logits))
    whose = ", shared by all samples" if source.layout.augment == "shared" else ""
    return [f"  augmentation at {known[-1].where}{whose}", *(f"  {line}" for line in operations_lines(learnt))]


def epochs(course: Course, kept: Sequence[Kept], asked: str | None) -> list[int]:
    """The epochs of the pictures, from 0: those asked for, or a few of those that the run has come to.

    AutodoError for what is no epoch of the run.
    """
    if asked is not None:
        spans = parse_ids(asked, "--epoch")
        for number in (end for span in spans for end in span):
            if not 1 <= number <= course.epochs:
                raise AutodoError(f"--epoch {number}: the run has epochs 1 to {course.epochs}")
        return [number - 1 for first, last in spans for number in range(first, last + 1)]
    first, newest = course.begun[0], max(it.moment for it in kept)
    last = max(first, newest.epoch - (newest.position == 0 and newest.pass_ == 0))
    count = min(SHOWN, last - first + 1)
    return sorted({first + round((last - first) * at / max(1, count - 1)) for at in range(count)})


def replayed(
    source: Source, course: Course, kept: list[Kept], wanted: Sequence[int], only: Kept | None
) -> tuple[list[View], list[str]]:
    """The pictures of these epochs, and a line for each: the step, and whose row it was; or why there is none."""
    from autodo_dist import replay

    views, lines = [], []
    for epoch in wanted:
        for pass_ in course.passes(epoch):
            name = f"  epoch {epoch + 1}, {replay.PASSES[pass_]} pass"
            try:
                found = replay.view(source, course, kept, epoch, pass_, only)
            except replay.NotSeen as why:
                lines.append(f"{name}: {why}")
                continue
            views.append(found)
            lines.append(f"{name}: step {found.step}, rank {found.rank} of {found.ranks}{whose(found, only)}")
    return views, lines


def whose(view: View, only: Kept | None) -> str:
    """By which row the picture was warped."""
    if view.kept.logits is None:
        return ", no learnt augmentation"
    if only is not None:
        return f", row of {only.where}, as asked"
    return f", row of {view.kept.where}, " + ("which is that of this step" if view.exact else "the nearest kept before")


def draw(source: Source, id_: int, views: Sequence[View]) -> Image:
    """The packed picture, and each view as loaded and as seen."""
    from PIL import Image

    from autodo_dist.contact_sheet import Cell, picture, sheet
    from autodo_dist.data import pil
    from autodo_dist.data.shards import Shards
    from autodo_dist.replay import PASSES

    (encoded,) = Shards(source.manifest).read([id_])
    data, classes = source.config.data, source.manifest.classes
    label = f"given {classes[source.split.label_N[id_]]}"
    cells = [Cell((f"id {id_}", label, ""), (Image.fromarray(pil.decode(encoded.tobytes())),))]
    for view in views:
        when = f"epoch {view.moment.epoch + 1}", f"{PASSES[view.moment.pass_]} step {view.step}"
        images = (picture(image, data.mean, data.std) for image in (view.loaded_CHW, view.seen_CHW))
        cells.append(Cell((*when, "" if view.exact else "row: nearest kept"), tuple(images)))
    return sheet(cells)


def save(image: Image, path: Path) -> None:
    """Write the sheet. AutodoError if it cannot be written."""
    from autodo_dist.files import own_partial, whole

    if path.suffix.lower() != ".png":
        raise AutodoError(f"--out {path}: the sheet is a PNG; name a file that ends in .png")
    try:
        with whole(path, own_partial(path)) as partial:
            image.save(partial, "PNG")
    except OSError as error:
        raise AutodoError(f"{path}: cannot be written ({error.strerror}); set --out") from error

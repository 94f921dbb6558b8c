"""`autodo labels`: which given labels a run holds for wrong; and, of those that people ticked, the next run's split."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autodo_dist.errors import AutodoError

if TYPE_CHECKING:  # they import torch, which the other commands can do without
    from autodo_dist.learnt import Columns, Numbers, Source
    from autodo_dist.predictions import Predictions

SHOWN = 10  # of the most suspect labels
DRAWN = ("validation_fraction", "imbalance_ratio", "label_noise", "split_seed")  # how a run without a file splits


def labels(
    run: Annotated[Path, typer.Argument(help="run folder, e.g. runs/digits")],
    step: Annotated[int | None, typer.Option(help="the checkpoint of this step; by default the newest")] = None,
    data: Annotated[str | None, typer.Option(help="the packed data set, where it lies elsewhere by now")] = None,
    out: Annotated[
        Path | None, typer.Option(help="where to; by default RUN/labels.csv, or RUN/labels-STEP.csv with --step")
    ] = None,
    predict: Annotated[
        bool, typer.Option(help="have the model predict every train picture, unless that is known; else tables alone")
    ] = True,
    apply: Annotated[
        Path | None, typer.Option(help="CSV with id or key, and new_label (empty: leave the sample out)")
    ] = None,
    split_out: Annotated[
        Path | None, typer.Option(help="the split with --apply's labels; a run takes it by data.split=FILE")
    ] = None,
) -> None:
    """List every train label with how suspect it is, from a checkpoint; of a run under way, too.

    With --apply and --split-out: write the run's split with corrected train labels instead.
    """
    if (apply is None) != (split_out is None):
        raise AutodoError("--apply and --split-out: give both, what to correct and where the split goes, or neither")
    if apply is not None and split_out is not None:
        if step is not None or out is not None:
            raise AutodoError(
                "--apply: takes the run's given labels and reads no checkpoint; leave out --step and --out"
            )
        typer.echo(correct(run, data, apply, split_out))
        return
    from autodo_dist.label_errors import scores
    from autodo_dist.labels_csv import write_labels
    from autodo_dist.learnt import open_source, read_columns

    source = open_source(run, step, data)
    columns = read_columns(source, predictions(source, keep=step is None) if predict else None)
    score_N = scores(columns)
    out = out or run / ("labels.csv" if step is None else f"labels-{step}.csv")
    try:
        write_labels(out, columns, score_N, source.manifest)
    except OSError as error:
        raise AutodoError(f"--out {out}: cannot be written ({error.strerror}); choose another place") from error
    lines = [f"{out}: {len(score_N)} train samples, step {source.step}", *suspects(source, columns, score_N)]
    typer.echo("\n".join([*lines, *against_truth(source, columns, score_N)]))


def predictions(source: Source, keep: bool) -> Predictions:
    """What the checkpoint's model says of every train picture: as the run folder has it, or by a pass made now."""
    from autodo_dist import build, build_data
    from autodo_dist.data.manifest import check_files
    from autodo_dist.parallel import comm
    from autodo_dist.predictions import predict, read_predictions, write_predictions

    config, split, manifest = source.config, source.split, source.manifest
    kept = read_predictions(source.run, source.step, len(split.train))
    if kept is not None:
        return kept
    check_files(manifest)
    with comm.process_group(comm.Place(), build.choose_device(config.train.device, 0)) as ranks:
        model = build.restore_classifier(config, source.reader.path, len(manifest.classes), ranks)
        loaders = build_data.build_loaders(config, manifest, split, ranks)
        loader = loaders.validation.over(split.train, split.label_N)
        found = predict(model, loader, len(source.manifest.classes), build.DTYPES[config.train.precision], ranks)
        loaders.dropped.check(len(loaders.dropped.why))
    if keep:  # those of the newest checkpoint, for the next reader
        with contextlib.suppress(OSError):
            write_predictions(source.run, source.step, found)
    return found


def suspects(source: Source, columns: Columns, score_N: Numbers) -> list[str]:
    """The most suspect labels, a line each."""
    import numpy as np

    manifest, lines = source.manifest, []
    for at in np.argsort(-score_N, kind="stable")[:SHOWN].tolist():
        id_ = int(columns.id_N[at])
        line = f"  {score_N[at]:.4f}  id {id_}: {manifest.keys[id_]}, given {manifest.classes[columns.given_N[at]]}"
        for word, label_N in (("learnt", columns.learnt_N), ("suggested", columns.suggested_N)):
            if label_N is not None and label_N[at] >= 0:
                line += f", {word} {manifest.classes[label_N[at]]}"
        lines.append(line)
    return lines


def against_truth(source: Source, columns: Columns, score_N: Numbers) -> list[str]:
    """How well the score finds the labels that are not the packed ones, and which labels are right how often.

    Nothing where the truth is not known.
    """
    from autodo_dist.label_errors import measures

    if (wrong_N := source.wrong_N) is None:
        return []
    true_N = source.manifest.label_N[columns.id_N]
    named = {"given": columns.given_N, "learnt": columns.learnt_N, "suggested": columns.suggested_N}
    shares = [f"{word} {(label_N == true_N).mean():.2%}" for word, label_N in named.items() if label_N is not None]
    lines = [f"the true labels are known: {wrong_N.sum()} of {len(wrong_N)} are wrong; right are {', '.join(shares)}"]
    if wrong_N.all():
        return lines
    found = measures(score_N, wrong_N)
    return [*lines, ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())]


def correct(run: Path, data: str | None, ticks: Path, out: Path) -> str:
    """Write the run's split with the labels of `ticks`; what was changed, in a line."""
    import numpy as np

    from autodo_dist import build_data, run_folder
    from autodo_dist.data.label_file import read_corrections
    from autodo_dist.data.split_file import checksum, encode, write_split
    from autodo_dist.files import sha256

    config = run_folder.read_config(run)
    manifest = build_data.read_data_of(run, config, data)
    before = build_data.build_split(config, manifest)
    after = read_corrections(ticks, manifest, before)
    if missing := build_data.lacking(manifest, after.train):
        raise AutodoError(f"file {ticks}: leaves class {missing} without a train sample; keep one of it")
    drawn = {name: getattr(config.data, name) for name in DRAWN} if config.data.split is None else None
    made = {
        "corrected": {"run": config.run.name, "split": run_folder.split_checksum(config.data.split), "drawn": drawn}
    }
    new = write_split(out, encode(after, manifest, made | {"corrections_sha256": sha256(ticks)}))
    changed = np.count_nonzero(after.label_N[after.train] != before.label_N[after.train])
    said = "" if new else ", was there already with the same bytes"
    left_out = len(before.train) - len(after.train)
    return f"{out}: {changed} labels changed, {left_out} samples left out, checksum {checksum(out)[:12]}{said}"

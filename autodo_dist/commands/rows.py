"""`autodo rows`: what a run has learnt of a few samples, read from a checkpoint without loading its table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autodo_dist.errors import AutodoError

if TYPE_CHECKING:  # they import torch, which the other commands can do without
    from autodo_dist.data.order import Ids
    from autodo_dist.data.split import Split
    from autodo_dist.learnt import Source


def rows(
    run: Annotated[Path, typer.Argument(help="run folder, e.g. runs/digits")],
    ids: Annotated[str, typer.Option(help="ids of train samples: numbers and ranges, e.g. 3,17,40-45")],
    step: Annotated[int | None, typer.Option(help="the checkpoint of this step; by default the newest")] = None,
    data: Annotated[str | None, typer.Option(help="the packed data set, where it lies elsewhere by now")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what was learnt of a few samples: weight, soft label, augmentation, last update. Reads their rows alone."""
    found = read_rows(run, parse_ids(ids), step, data)
    typer.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else text(found))


def parse_ids(words: str, option: str = "--ids") -> list[tuple[int, int]]:
    """First and last number of each part of e.g. 3,17,40-45. AutodoError if that cannot be read."""
    spans = []
    for word in words.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", word, re.ASCII)
        if match is None:
            raise AutodoError(
                f"{option} {words!r}: {word!r} is neither a number nor a range; write e.g. {option} 3,17,40-45"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise AutodoError(f"{option} {words!r}: {word!r} goes backwards; write {last}-{first}")
        spans.append((first, last))
    return spans


def read_rows(run: Path, spans: Sequence[tuple[int, int]], step: int | None, data: Path | str | None) -> dict[str, Any]:
    """What a checkpoint holds of the samples whose ids are in the spans; see `text` for how it is shown."""
    from autodo_dist.learnt import open_source
    from autodo_dist.parallel import checkpoint
    from autodo_dist.parallel.row_table import find

    source = open_source(run, step, data)
    reader, split, manifest = source.reader, source.split, source.manifest
    ids = expand(spans, split)
    learnt = describe(source, find(split.train, ids))
    named = [
        {"id": id_, "key": manifest.keys[id_].as_py(), "given_label": manifest.classes[split.label_N[id_]]} | row
        for id_, row in zip(ids.tolist(), learnt, strict=True)
    ]
    facts = {"checkpoint": str(reader.path), "step": checkpoint.step_of(reader.path), "bytes_read": reader.bytes_read}
    return facts | {"rows_stored": len(split.train), "shared": source.shared(), "rows": named}


def expand(spans: Sequence[tuple[int, int]], split: Split) -> Ids:
    """The ids of the spans, in their order. AutodoError names the first that has no row."""
    import numpy as np

    from autodo_dist.parallel.row_table import find

    find(split.train, np.array([end for span in spans for end in span], np.int64))  # before a span fills the memory
    ids = np.concatenate([np.arange(first, last + 1, dtype=np.int64) for first, last in spans])
    find(split.train, ids)  # of the ids inside the spans, too
    return ids


def describe(source: Source, rows_n: Ids) -> list[dict[str, Any]]:
    """What the table says of each of these rows; groups that are not learnt per sample are left out."""
    from autodo_dist.learnt import readable

    reader, layout, split = source.reader, source.layout, source.split
    if not layout.width:
        return [{} for _ in rows_n]
    values_nP, updated_n = (reader.rows(f"hyper.rows.{name}", rows_n) for name in ("value", "touched"))
    norms = reader.rows("hyper.rows.second_moment", rows_n).double().norm(dim=1).tolist()
    found = readable(layout, values_nP, split.label_N[split.train[rows_n]], updated_n, source.manifest.classes)
    return [row | {"second_moment_norm": norm} for row, norm in zip(found, norms, strict=True)]


def text(found: dict[str, Any]) -> str:
    """The rows for a reader: a line for the checkpoint, then a few for each sample."""
    lines = [
        f"{found['checkpoint']}: {len(found['rows'])} of {found['rows_stored']} rows, {found['bytes_read']} bytes read"
    ]
    if found["shared"] is not None:
        lines += ["all samples", *operations_lines(found["shared"])]
    for row in found["rows"]:
        weight = f", weight {row['weight']:.4g}" if "weight" in row else ""
        lines += [f"id {row['id']}: {row['key']}", f"  given label {row['given_label']}{weight}"]
        if "soft_label" in row:
            lines.append("  likeliest labels: " + ", ".join(f"{name} {p:.4f}" for name, p in row["soft_label"].items()))
        lines += operations_lines(row.get("augment", {}))
        if step := row.get("last_hyper_step"):
            lines.append(f"  last update: hyper step {step}; norm of the second moment {row['second_moment_norm']:.3g}")
        elif step == 0:
            lines.append("  no hyper step yet")
    return "\n".join(lines)


def operations_lines(operations: dict[str, dict[str, float]]) -> list[str]:
    """A line for each operation: how likely it is, and how strong in shares of its range."""
    return [
        f"  {name}: probability {it['probability']:.4f}, magnitude {it['magnitude']:.4f}"
        for name, it in operations.items()
    ]

"""A checkpoint for other programs: the model as one safetensors file, what was learnt of each sample as parquet.

    OUT.safetensors   names and shapes of torchvision's own state_dict, so load_state_dict takes it as it is. The model
                      was trained with CELU in the place of every nn.ReLU: that must be swapped there, too.
    OUT.parquet       id, key, given_label; as far as they are learnt per sample weight, gate.<operation> (probability),
                      magnitude.<operation> (share of the range), soft_logit (all classes), learnt_label,
                      learnt_probability; last_hyper_step. Its metadata `autodo` says the rest, as JSON.

Rows are read, changed and written block by block, so the table may be larger than the memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from autodo_dist import run_folder
from autodo_dist.config import Config
from autodo_dist.data.manifest import Manifest
from autodo_dist.data.order import Ids
from autodo_dist.data.split import Split
from autodo_dist.errors import AutodoError
from autodo_dist.files import whole
from autodo_dist.hyperparameters import Layout
from autodo_dist.learnt import Source, source_of
from autodo_dist.method import losses
from autodo_dist.models import build_model
from autodo_dist.parallel.checkpoint_rows import RowReader


def tables_beside(out: Path) -> Path:
    """OUT.parquet of OUT.safetensors."""
    return out.with_suffix(".parquet")


def export(run: Path, reader: RowReader, out: Path, data: str | None) -> list[str]:
    """Write both files, or neither; a line for each that says so. A run that learns nothing of its samples has one.

    AutodoError if the checkpoint's tensors are not those of the run's settings and data set.
    """
    config = run_folder.read_config(run)
    tensors = model_tensors(config, reader)
    about = {
        "format": "pt",  # what Hugging Face's readers ask for
        "model": config.model.name,
        "activation": "CELU in the place of ReLU",
        "run": config.run.name,
        "step": str(reader.header.step),
    }
    with whole_or_not(out) as partial:
        save_file(tensors, partial, metadata=about)
        line = f"{out}: {config.model.name} of step {reader.header.step}, {len(tensors)} tensors"
        return [line, *export_rows(run, config, reader, tables_beside(out), data)]


def model_tensors(config: Config, reader: RowReader) -> dict[str, torch.Tensor]:
    """The model's tensors, or their average, by the names that the network has at home: torchvision's, timm's or ours.

    AutodoError if names or shapes are not those of the run's model.
    """
    prefix = "model." if config.train.average is None else "average.module."
    ours = {name.removeprefix(prefix): name for name in reader.names if name.startswith(prefix)}
    classes = reader.size(ours["head.weight"])[0] if "head.weight" in ours else 1
    with torch.device("meta"):
        model = build_model(config.model.name, classes, 0, config.data.image_size)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if expected != {name: reader.size(full) for name, full in ours.items()}:
        raise AutodoError(f"checkpoint {reader.path}: its tensors are not those of {config.model.name} (config.yaml)")
    names = model.own_names()
    return {names[name]: reader.whole(full) for name, full in ours.items()}


def export_rows(run: Path, config: Config, reader: RowReader, out: Path, data: str | None) -> list[str]:
    """Write what was learnt; a line that says so, or none for a run that learns nothing of its samples."""
    if not config.learn.anything:
        return []
    source = source_of(run, config, reader, data)
    with whole_or_not(out) as partial:
        writer = None
        for block in blocks(source):
            if writer is None:
                about = {"autodo": json.dumps(facts(source))}
                schema = block.schema.with_metadata(about)
                writer = pa.parquet.ParquetWriter(partial, schema, use_dictionary=["given_label", "learnt_label"])
            writer.write_table(block)
        assert writer is not None  # a run without train samples does not start
        writer.close()
    return [f"{out}: {len(source.split.train)} rows"]


def facts(source: Source) -> dict[str, Any]:
    """What the rows do not say themselves."""
    found = {"run": source.config.run.name, "step": source.reader.header.step, "classes": list(source.manifest.classes)}
    shared = source.shared()
    return found if shared is None else found | {"shared": shared}


def blocks(source: Source) -> Iterator[pa.Table]:
    """The rows as tables of about BLOCK bytes, in the order of ids."""
    layout, split, manifest = source.layout, source.split, source.manifest
    for part, groups in source.blocks():
        columns = named(split.train[part], split, manifest) | learnt(groups, layout, manifest)
        if layout.width:
            columns["last_hyper_step"] = source.reader.between("hyper.rows.touched", part.start, part.stop).numpy()
        yield pa.table(columns)


def named(ids: Ids, split: Split, manifest: Manifest) -> dict[str, Any]:
    """Which samples these are."""
    classes = pa.array(manifest.classes, pa.string())
    return {
        "id": ids,
        "key": manifest.keys.take(pa.array(ids)),
        "given_label": classes.take(pa.array(split.label_N[ids])),
    }


def learnt(groups: dict[str, torch.Tensor], layout: Layout, manifest: Manifest) -> dict[str, Any]:
    """What was learnt of each sample, as columns; see the module."""
    columns: dict[str, Any] = {}
    if "weight_logit" in groups:
        columns["weight"] = losses.weight(groups["weight_logit"]).numpy()
    for group, name in (("gate_logit", "gate"), ("magnitude_logit", "magnitude")):
        if group in groups:
            shares = groups[group].sigmoid().numpy()
            columns |= {f"{name}.{it}": shares[:, k].copy() for k, it in enumerate(layout.operations)}
    if "soft_logit" in groups:
        logits_nC = groups["soft_logit"]
        share, label = torch.softmax(logits_nC.double(), 1).max(1)
        flat = pa.array(np.ascontiguousarray(logits_nC.numpy()).reshape(-1))
        columns["soft_logit"] = pa.FixedSizeListArray.from_arrays(flat, layout.classes)
        columns["learnt_label"] = pa.array(manifest.classes, pa.string()).take(pa.array(label.numpy()))
        columns["learnt_probability"] = share.numpy()
    return columns


@contextmanager
def whole_or_not(out: Path) -> Iterator[Path]:
    """A file to write to, renamed to `out` at the end. AutodoError if the disk does not take it; nothing stays then."""
    try:
        with whole(out) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise AutodoError(f"export {out}: cannot be written ({error}); free space, then try again") from error

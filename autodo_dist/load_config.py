"""From a yaml file and a command line's words to a checked Config, or one line that says what is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from autodo_dist.config import Config, settings, short
from autodo_dist.config_checks import check_consistent
from autodo_dist.errors import AutodoError, one_line


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a yaml file, lay `key=value` words over it, and check every setting.

    Raises AutodoError with one line for a missing file, broken yaml, an unknown key (with the nearest name), a wrong
    type or a value out of range.
    """
    if not file.is_file():
        raise AutodoError(f"config {file}: no such file; see configs/ for examples")
    for word in overrides:
        if word.endswith("=???"):
            raise AutodoError(f"override {word!r}: ??? is no value")
        if "=" not in word or word.startswith("-"):
            raise AutodoError(f"override {word!r}: not of the form key=value, e.g. train.epochs=3")
    try:
        both = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(list(overrides)))
        tree = OmegaConf.to_container(both, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise AutodoError(f"config {file}: {one_line(error)}; mend the yaml or the override") from error
    config = check_config(tree, str(file))
    if not config.run.name:
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": file.stem})})
    return config


def check_config(tree: Any, source: str) -> Config:
    """Turn a plain tree of settings into a Config; `source` names it in the error."""
    if not isinstance(tree, dict):
        raise AutodoError(f"config {source}: holds no settings; write sections such as `data:` and `train:`")
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        first, rest = error.errors()[0], error.error_count() - 1
        more = f" (and {rest} more)" if rest else ""
        raise AutodoError(f"config {source}: {_explain(first)}{more}") from error
    check_consistent(config)
    return config


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    known = settings()
    if error["type"] == "extra_forbidden":
        leaf = {key.rsplit(".", 1)[-1]: key for key in known}
        near = difflib.get_close_matches(name, [*known, *Config.model_fields], n=1, cutoff=0.7)
        near = near or [leaf[key] for key in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaf, n=1)]
        return f"unknown key {name}; " + (f"did you mean {near[0]}?" if near else "`autodo settings` lists all")
    setting = next((key for key in known if f"{name}.".startswith(f"{key}.")), None)
    if error["type"] == "missing" and setting in (None, name):
        meaning = known[name].description if name in known else "a section"
        return f"{name} is missing; set it in the file or as {name}=... ({meaning})"
    meaning = f" ({known[setting].description})" if setting else ""
    near = difflib.get_close_matches(
        str(error["input"]), re.findall("'(.*?)'", error.get("ctx", {}).get("expected", "")), n=1
    )
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{name} = {short(repr(error['input']))}: {error['msg'][:1].lower()}{error['msg'][1:]}{meant}{meaning}"

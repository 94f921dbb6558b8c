"""Pictures in folders: SRC/train/<class>/*, and SRC/val and SRC/test where they are there."""

from __future__ import annotations

import os
from pathlib import Path

from autodo_dist.data.sources import (
    SPLIT,
    TEST,
    TRAIN,
    VALIDATION,
    FileBytes,
    Source,
    draw_part,
    extension,
    printable,
    stream,
)
from autodo_dist.errors import AutodoError

FOLDERS = {"train": TRAIN, "val": VALIDATION, "test": TEST}


def folder_sources(
    src: Path, seed: int, validation_fraction: float, test_fraction: float
) -> tuple[list[str], list[Source]]:
    """Class names and pictures of SRC/train/<class>/*, SRC/val/<class>/* and SRC/test/<class>/*.

    Classes are the sorted names of SRC/train's folders; hidden files are passed over. Where val or test is missing,
    its fraction of train becomes that part, as in `draw_part`: test is drawn first, validation from what is left.
    AutodoError names the folder that is missing, empty, nested or of an unknown class.
    """
    if not src.is_dir():
        raise AutodoError(f"pack {src}: no such folder; give one that holds train/<class>/<pictures>")
    if not (src / "train").is_dir():
        raise AutodoError(f"pack {src}: holds no folder train; put the pictures into {src / 'train'}/<class>/")
    classes = _class_names(src / "train")
    sources = []
    for folder, part in FOLDERS.items():
        if (src / folder).is_dir():
            sources += _folder_part(src, folder, part, classes)
    generator = stream(seed, SPLIT)
    for folder, fraction in (("test", test_fraction), ("val", validation_fraction)):
        if not (src / folder).is_dir():
            sources = draw_part(sources, FOLDERS[folder], len(classes), fraction, generator)
    return classes, sources


def require_outside(out: Path, src: Path) -> None:
    """AutodoError if what is packed would lie among the pictures: OUT inside SRC/train, SRC/val or SRC/test."""
    for folder in FOLDERS:
        if out.resolve().is_relative_to((src / folder).resolve()):
            raise AutodoError(f"pack {out}: lies inside the pictures of {src / folder}; choose a folder outside")


def _folder_part(src: Path, folder: str, part: int, classes: list[str]) -> list[Source]:
    """Sources of one of SRC's folders, in the order of their keys within a class."""
    label_of = {name: label for label, name in enumerate(classes)}
    sources = []
    for name in _class_names(src / folder):
        if name not in label_of:
            raise AutodoError(f"pack {src / folder / name}: train knows no class {name!r}; rename or delete the folder")
        for entry in _entries(src / folder / name):
            if entry.is_dir():
                raise AutodoError(
                    f"pack {printable(entry.path)}: a folder inside a class; move its pictures up or delete it"
                )
            key = printable(f"{folder}/{name}/{entry.name}")
            sources.append(Source(key, extension(entry.name), label_of[name], part, FileBytes(entry.path)))
    if not sources:
        raise AutodoError(f"pack {src / folder}: holds no picture; put pictures into <class>/ there or delete it")
    return sources


def _class_names(folder: Path) -> list[str]:
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    for name in names:
        if printable(name) != name:
            raise AutodoError(f"pack {folder}: the name of class {printable(name)!r} does not print; rename its folder")
    return names


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name: folders, files, and links that lead nowhere (unreadable later on)."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if entry.is_dir() or entry.is_file() or entry.is_symlink()]
    except OSError as error:
        raise AutodoError(f"pack {folder}: cannot be read ({error.strerror}); mend its permissions") from error
    return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)

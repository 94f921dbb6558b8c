"""Every crash of a real piece of work on files, by replay: what a killed process and a power cut leave on the disk.

    with recorded(base) as log: ...     what this process does to the files below `base`, in its order
    Disk(base)                          the tree as it is, all of it durable
    disk.apply(operation)               one operation further
    disk.killed(), disk.cuts()          the tree that a killed process leaves; the trees that a power cut may leave

Of a power cut no more is expected than POSIX promises: a file holds what it held at its last fsync, and a folder the
names that it had at its own. What is newer is there or not, each folder for itself.
"""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

Tree = dict[str, bytes | None]  # path below the base -> contents; None for a folder


@dataclass(frozen=True, order=True)
class Operation:
    """Something that was done to a file or a folder; `time` is the machine's monotonic clock, the same for all ranks.

    Paths are relative to the base. mark: nothing was done, but the work came as far as `path` says.
    """

    time: int
    kind: str  # create, write, fsync, rename, unlink, mkdir, rmdir, mark
    path: str
    target: str = ""  # rename
    offset: int = 0  # write
    data: bytes = b""  # write

    def __str__(self) -> str:
        size = f" {len(self.data)} bytes at {self.offset}" if self.kind == "write" else ""
        return f"{self.kind} {self.path}{' to ' if self.target else ''}{self.target}{size}"


class Log:
    """The operations of this process below `base`, in the order in which they ended."""

    def __init__(self, base: Path) -> None:
        self.base, self.operations = base, list[Operation]()

    def add(self, kind: str, path: str | Path, target: str | Path = "", offset: int = 0, data: bytes = b"") -> None:
        names = [os.path.relpath(name, self.base) if name else "" for name in (path, target)]
        if not names[0].startswith(".."):
            self.operations.append(Operation(time.monotonic_ns(), kind, *names, offset, data))

    def mark(self, what: str) -> None:
        """Note how far the work has come."""
        self.operations.append(Operation(time.monotonic_ns(), "mark", what))


class File(io.FileIO):
    """A file opened for writing, without a buffer; its writes are those that the kernel gets."""

    def __init__(self, log: Log, path: Any, mode: str) -> None:
        made = "w" in mode or not os.path.exists(path)
        super().__init__(path, mode)
        self.log = log
        if made:
            log.add("create", opened(self.fileno()))

    def write(self, data: Any) -> int:
        offset, size = self.tell(), super().write(data)
        assert size is not None
        self.log.add("write", opened(self.fileno()), offset=offset, data=bytes(memoryview(data).cast("B")[:size]))
        return size


def opened(descriptor: int) -> str:
    """The path by which an open file or folder is found now."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


@contextmanager
def recorded(base: Path) -> Iterator[Log]:
    """Log what this process does to files below `base`, from any of its threads.

    Through Python, that is; whether that is all, a replay shows.
    """
    log, really = Log(base), {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
    opening = io.open

    def open_(file: Any, mode: str = "r", buffering: int = -1, *words: Any, **names: Any) -> Any:
        if not set(mode) & set("wax+") or not Path(file).absolute().is_relative_to(base):
            return opening(file, mode, buffering, *words, **names)
        raw = File(log, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *words, **names)  # type: ignore[arg-type]

    def moving(name: str) -> Callable[..., None]:
        def move(source: Any, target: Any) -> None:
            really[name](source, target)
            log.add("rename", source, target)

        return move

    def fsync(file: Any) -> None:
        really["fsync"](file)
        log.add("fsync", opened(file if isinstance(file, int) else file.fileno()))

    patches = {"fsync": fsync} | {name: moving(name) for name in ("rename", "replace")}
    patches |= {name: changing(log, name) for name in ("unlink", "remove", "mkdir", "rmdir")}
    with ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(patch.object(os, name, function))
        for module in ("io", "builtins"):
            stack.enter_context(patch(f"{module}.open", open_))
        yield log


def changing(log: Log, name: str) -> Callable[..., None]:
    """The function of `os` that makes or deletes a name, recorded."""
    really, kind = getattr(os, name), {"remove": "unlink"}.get(name, name)

    def change(path: Any, *words: Any, dir_fd: int | None = None, **names: Any) -> None:
        really(path, *words, dir_fd=dir_fd, **names)
        log.add(kind, path if dir_fd is None else Path(opened(dir_fd), path))

    return change


@dataclass(eq=False)
class Node:
    """A file or a folder: as it is, and as it is on the disk."""

    data: bytes = b""
    synced: bytes = b""
    names: dict[str, Node] | None = None  # of a folder
    synced_names: dict[str, Node] = field(default_factory=dict)

    def sync(self) -> None:
        """Make it durable: a file's contents, a folder's names."""
        self.synced, self.synced_names = self.data, dict(self.names or {})


class Disk:
    """Files and folders below a base, and which of them a power cut would leave."""

    def __init__(self, base: Path) -> None:
        self.top = read_node(base)

    def apply(self, operation: Operation) -> None:
        """Do an operation."""
        kind, path = operation.kind, operation.path
        if kind == "mark":
            return
        if kind == "fsync":
            return self.find(path).sync()
        folder, name = self.find(os.path.dirname(path)).names, os.path.basename(path)
        assert folder is not None
        if kind == "create" and name in folder:
            folder[name].data = b""
        elif kind in ("create", "mkdir"):
            assert name not in folder
            folder[name] = Node(names={} if kind == "mkdir" else None)
        elif kind == "write":
            old, end = folder[name].data, operation.offset + len(operation.data)
            folder[name].data = old[: operation.offset].ljust(operation.offset, b"\0") + operation.data + old[end:]
        elif kind == "rename":
            goal = self.find(os.path.dirname(operation.target)).names
            assert goal is not None
            goal[os.path.basename(operation.target)] = folder.pop(name)
        else:
            assert kind in ("unlink", "rmdir")
            assert not folder.pop(name).names

    def find(self, path: str) -> Node:
        """The file or folder at a path."""
        node = self.top
        for name in path.split("/") if path not in ("", ".") else ():
            assert node.names is not None
            node = node.names[name]
        return node

    def killed(self) -> Tree:
        """What is there when the process is killed: all that it did."""
        return dict(tree(self.top, frozenset(), lost=False))

    def cuts(self) -> Iterator[Tree]:
        """What may be there after a power cut: any of the folders with the names of its last fsync, and the files with
        what they hold, or with what they held at theirs.
        """
        unsynced = [node for node in nodes(self.top) if node.names is not None and node.names != node.synced_names]
        for some in itertools.product((False, True), repeat=len(unsynced)):
            back = frozenset(node for node, is_ in zip(unsynced, some, strict=True) if is_)
            for lost in (False, True):
                yield dict(tree(self.top, back, lost))


def nodes(top: Node) -> set[Node]:
    """All files and folders that are there or are on the disk."""
    found, new = set[Node](), {top}
    while new:
        found |= new
        new = {child for node in new for child in [*(node.names or {}).values(), *node.synced_names.values()]} - found
    return found


def tree(node: Node, back: frozenset[Node], lost: bool, path: str = "") -> Iterator[tuple[str, bytes | None]]:
    """Paths and contents, where the folders `back` and, if `lost`, all files are as they are on the disk."""
    if node.names is None:
        yield path, node.synced if lost else node.data
        return
    yield path, None
    for name, child in (node.synced_names if node in back else node.names).items():
        yield from tree(child, back, lost, f"{path}/{name}" if path else name)


def read_node(path: Path) -> Node:
    """A file, or a folder with all that is in it, as it is on the real disk; durable."""
    node = Node(names={}) if path.is_dir() else Node(data=path.read_bytes())
    for child in path.iterdir() if path.is_dir() else ():
        assert node.names is not None
        node.names[child.name] = read_node(child)
    node.sync()
    return node


def write_tree(base: Path, found: Tree) -> None:
    """Make these files and folders below `base`."""
    for path, data in found.items():
        if data is None:
            (base / path).mkdir(parents=True)
        else:
            (base / path).write_bytes(data)


def crashes(disk: Disk, log: list[Operation]) -> Iterator[tuple[int, str, Tree]]:
    """For each crash in the course of `log`: how many operations were done, killed or cut, and a tree that is left.

    A write may also have been cut in half. `disk` comes to the end of the log on the way.
    """
    for done, operation in enumerate(log):
        yield done, "killed", disk.killed()
        yield from ((done, "cut", found) for found in disk.cuts())
        if operation.kind == "write" and len(operation.data) > 1:
            disk.apply(replace(operation, data=operation.data[: len(operation.data) // 2]))
            yield done, "killed", disk.killed()
            yield from ((done, "cut", found) for found in disk.cuts())
        disk.apply(operation)
    yield len(log), "killed", disk.killed()
    yield from ((len(log), "cut", found) for found in disk.cuts())

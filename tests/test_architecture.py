"""The walls of the house: imports go downwards only (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each wing, and what of the project it may import. The longest matching prefix counts.
ALLOWED = {
    "autodo_dist.errors": (),
    "autodo_dist.files": ("autodo_dist.errors",),
    "autodo_dist.ports": ("autodo_dist.errors",),
    "autodo_dist.urls": ("autodo_dist.errors",),
    "autodo_dist.operations": (),
    "autodo_dist.thread_name": (),
    "autodo_dist.config": ("autodo_dist.errors", "autodo_dist.operations", "autodo_dist.urls"),
    "autodo_dist.data": (
        "autodo_dist.errors",
        "autodo_dist.files",
        "autodo_dist.operations",
        "autodo_dist.urls",
        "autodo_dist.data",
    ),
    "autodo_dist.method": ("autodo_dist.errors", "autodo_dist.method"),
    "autodo_dist.parallel": (
        "autodo_dist.errors",
        "autodo_dist.files",
        "autodo_dist.ports",
        "autodo_dist.method",
        "autodo_dist.parallel",
    ),
    "autodo_dist.models": ("autodo_dist.errors", "autodo_dist.wide_resnet"),
    "autodo_dist.wide_resnet": (),
    "autodo_dist.heartbeat": (),
    "autodo_dist.ledger": ("autodo_dist.errors", "autodo_dist.files"),
    "autodo_dist.stop": (),
    "autodo_dist.metrics": (
        "autodo_dist.files",
        "autodo_dist.heartbeat",
        "autodo_dist.ledger",
        "autodo_dist.thread_name",
    ),
    "autodo_dist.report.charts": (),
    "autodo_dist.report.facts": (
        "autodo_dist.errors",
        "autodo_dist.files",
        "autodo_dist.ledger",
        "autodo_dist.standing",
    ),
    "autodo_dist.report.learnings": (
        "autodo_dist.errors",
        "autodo_dist.label_errors",
        "autodo_dist.learnt",
    ),
    "autodo_dist.report.pictures": (
        "autodo_dist.contact_sheet",
        "autodo_dist.data",
        "autodo_dist.errors",
        "autodo_dist.learnt",
        "autodo_dist.method",
    ),
    "autodo_dist.report": (
        "autodo_dist.label_errors",
        "autodo_dist.data",
        "autodo_dist.errors",
        "autodo_dist.files",
        "autodo_dist.method",
        "autodo_dist.report",
    ),
    "autodo_dist": ("autodo_dist",),
    "launcher": ("launcher", "autodo_dist"),
    "benchmarks": ("autodo_dist",),
}
FILES = sorted(path for wing in ("autodo_dist", "launcher", "benchmarks") for path in ROOT.glob(f"{wing}/**/*.py"))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_downwards(path: Path) -> None:
    wing = max((wing for wing in ALLOWED if inside(module(path), wing)), key=len)
    for name in imports(path):
        if name in ("autodo_dist", "autodo_dist.__version__") or not inside(name, "autodo_dist"):
            continue
        assert any(inside(name, allowed) for allowed in ALLOWED[wing]), f"{module(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_the_method_knows_nothing_of_ranks(path: Path) -> None:
    if inside(module(path), "autodo_dist.method"):
        assert not any(inside(name, "torch.distributed") for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_only_build_train_commands_and_launcher_see_the_config(path: Path) -> None:
    if inside(module(path), "autodo_dist.data") or any(
        inside(module(path), f"autodo_dist.{wing}") for wing in ("method", "parallel", "models", "metrics", "evaluate")
    ):
        assert not any(inside(name, "autodo_dist.config") for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_only_the_command_sees_the_report(path: Path) -> None:
    if not inside(module(path), "autodo_dist.report") and module(path) != "autodo_dist.commands.report":
        assert not any(inside(name, "autodo_dist.report") for name in imports(path))

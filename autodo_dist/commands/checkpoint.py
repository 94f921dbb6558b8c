"""`autodo checkpoint`: list, verify, compare, export and prune the checkpoints of a run. Nothing in one is trusted."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autodo_dist.errors import AutodoError

if TYPE_CHECKING:  # it imports torch, which the other commands can do without
    from autodo_dist.parallel.checkpoint_rows import RowReader

app = typer.Typer(no_args_is_help=True, help="List, verify, compare, export and prune the checkpoints of a run.")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="run folder, e.g. runs/digits")]


LEFT = {
    ".partial": "left by a save that broke off, or being written",
    ".broken": "renamed as broken",
    ".replaced": "its step was saved again; the next start takes it back where that is not there",
}


@app.command("list")
def list_(run: Run) -> None:
    """List the checkpoints of a run, oldest first. Sizes are looked at, contents are not: see `verify`."""
    from autodo_dist.parallel import checkpoint

    root = folder(run)
    found = checkpoint.complete(root)
    left = sorted(path for path in root.glob("step-*") if path.suffix in LEFT)
    best = best_step(run)
    typer.echo(f"{root}: {len(found)} checkpoints" + (f", {len(left)} partial, replaced or broken" if left else ""))
    typer.echo(f"{'step':>10} {'epoch':>6} {'bytes':>16}  {'saved':19}  state")
    for path in found:
        typer.echo(describe(path, best, newest=path == found[-1]))
    for path in left:
        step = path.stem.removeprefix("step-").lstrip("0") or "0"
        typer.echo(f"{step:>10} {'':6} {size(path):16,}  {'':19}  {LEFT[path.suffix]}")


def describe(path: Path, best: int | None, newest: bool) -> str:
    """A line for one checkpoint."""
    from autodo_dist.parallel import checkpoint
    from autodo_dist.parallel.checkpoint_metadata import LayoutError

    step = checkpoint.step_of(path)
    try:
        header, _ = checkpoint.examine(path, contents_of=[".metadata"])
    except LayoutError as error:
        return f"{step:>10} {'?':>6} {size(path):16,}  {'?':19}  broken: {error}"
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / "checkpoint.json").stat().st_mtime))
    epoch = header.progress.get("epoch")
    marks = ", ".join(word for word, is_ in (("newest", newest), ("best by validation", step == best)) if is_)
    known = epoch if isinstance(epoch, int) else "?"
    return f"{step:>10} {known:>6} {size(path):16,}  {saved}  complete" + (f", {marks}" if marks else "")


@app.command()
def verify(
    run: Run,
    step: Annotated[int | None, typer.Option(min=0, help="the checkpoint of this step; by default all")] = None,
) -> None:
    """Read every byte of the checkpoints against checkpoint.json; exit status 1 and the first wrong file if one is."""
    from autodo_dist.parallel import checkpoint
    from autodo_dist.parallel.checkpoint_rows import find_checkpoint

    root = folder(run)
    chosen = find_checkpoint(root, step)
    faults = []
    for path in checkpoint.complete(root) if step is None else [chosen]:
        if fault := checkpoint.check(path):
            faults.append(f"{path.name}: {fault}")
        else:
            typer.echo(f"{path}: {size(path):,} bytes are as they were written")
    if faults:
        raise AutodoError(f"{root}: {len(faults)} not as written ({'; '.join(faults)}); restore from a copy, or delete")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="RUN@STEP", help="one checkpoint, e.g. runs/digits@1200")],
    b: Annotated[str, typer.Argument(metavar="RUN@STEP", help="the other")],
) -> None:
    """Compare two checkpoints to the bit: exit status 0 if all tensors and the progress are equal, else 1.

    For each tensor that differs: how many elements, the largest |a - b| and the largest |a - b| / max(|a|, |b|).
    Seconds that were measured are left out.
    """
    from autodo_dist.parallel.checkpoint_diff import differences, progress_differences

    left, right = open_checkpoint(a), open_checkpoint(b)
    equal = True
    for it in differences(left, right):
        equal = False
        typer.echo(str(it))
    for line in progress_differences(left, right):
        equal = False
        typer.echo(line)
    if not equal:
        raise typer.Exit(1)
    typer.echo(f"equal: {len(left.names)} tensors, and the progress")


@app.command()
def prune(
    run: Run,
    keep: Annotated[int, typer.Option(min=1, help="newest checkpoints to keep, beside the best by validation")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be deleted, and delete nothing")] = False,
) -> None:
    """Delete all but the newest checkpoints and the best one. The newest whose bytes are all right is never deleted."""
    from autodo_dist.parallel import checkpoint

    root = folder(run)
    have = checkpoint.complete(root)
    good = next((path for path in reversed(have) if checkpoint.check(path) is None), None)
    if have and good is None:
        raise AutodoError(
            f"{root}: none of its checkpoints is as written; nothing is deleted; see `autodo checkpoint list`"
        )
    gone = [path for path in checkpoint.spare(root, keep, best_step(run)) if path != good]
    if links := [path.name for path in gone if path.is_symlink()]:
        raise AutodoError(f"{root}: {links[0]} is a link; nothing is deleted; remove the link, then prune again")
    total = 0
    for path in gone:
        freed = size(path)
        typer.echo(f"{'would delete' if dry_run else 'deleting'} {path}: {freed:,} bytes")
        if not dry_run:
            try:
                checkpoint.delete(path)
            except OSError as error:
                raise AutodoError(f"{path}: cannot be deleted ({error.strerror}); see to its permissions") from error
        total += freed
    typer.echo(
        f"{len(gone)} of {len(have)} checkpoints, {total:,} bytes" + (" (nothing was deleted)" if dry_run else "")
    )


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN[@STEP]", help="a checkpoint; without @STEP the newest")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="new file; the rows go to OUT.parquet")],
    data: Annotated[str | None, typer.Option(help="the packed data set, where it lies elsewhere by now")] = None,
) -> None:
    """Write the model as one safetensors file that torchvision loads, and what was learnt of each sample as parquet."""
    from autodo_dist import export as exporting

    if out.suffix != ".safetensors":
        raise AutodoError(f"export {out}: a name that ends in .safetensors, please")
    for path in (out, exporting.tables_beside(out)):
        if path.exists():
            raise AutodoError(f"export {path}: is there already; delete it, or choose another name")
    if not out.absolute().parent.is_dir():
        raise AutodoError(f"export {out}: there is no folder {out.absolute().parent}; make it")
    for line in exporting.export(run_and_step(source)[0], open_checkpoint(source), out, data):
        typer.echo(line)


def run_and_step(words: str) -> tuple[Path, int | None]:
    """Run folder and step of RUN@STEP; None for RUN alone."""
    run, _, step = words.rpartition("@")
    return (Path(run), int(step)) if run and re.fullmatch(r"\d{1,18}", step, re.ASCII) else (Path(words), None)


def open_checkpoint(words: str) -> RowReader:
    """The checkpoint RUN@STEP, or the newest of RUN. AutodoError if not every byte of it is as it was written."""
    from autodo_dist.parallel.checkpoint_rows import RowReader, find_checkpoint

    run, step = run_and_step(words)
    return RowReader(find_checkpoint(folder(run), step), contents_of=None)


def folder(run: Path) -> Path:
    """The folder of a run's checkpoints. AutodoError if there is none, or it leads out of the run's folder."""
    from autodo_dist.parallel.checkpoint_header import require_inside
    from autodo_dist.parallel.checkpoint_metadata import LayoutError

    root = run / "checkpoints"
    if not root.is_dir():
        raise AutodoError(f"run {run}: no checkpoints there; see `ls {run.parent}`")
    try:
        require_inside(root, run)
    except LayoutError as error:
        raise AutodoError(f"run {run}: {error}; move the checkpoints into the run's folder") from error
    return root


def best_step(run: Path) -> int | None:
    """The step of the best evaluation by validation, as the newest readable checkpoint knows it."""
    from autodo_dist.parallel import checkpoint
    from autodo_dist.parallel.checkpoint_header import read_header
    from autodo_dist.parallel.checkpoint_metadata import LayoutError

    for path in reversed(checkpoint.complete(folder(run))):
        try:
            best: Any = read_header(path).progress.get("best")
        except LayoutError:
            continue
        step = best.get("step") if isinstance(best, dict) else None
        return step if isinstance(step, int) else None
    return None


def size(path: Path) -> int:
    """Bytes of the files of a checkpoint's folder."""
    return sum(file.lstat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else 0

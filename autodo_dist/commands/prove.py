"""`autodo prove-resume`: the user's own configuration, killed and gone on with, against itself unbroken."""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autodo_dist.config import Config, differences
from autodo_dist.errors import AutodoError
from autodo_dist.files import read_json, write_json
from autodo_dist.load_config import load_config
from autodo_dist.run_folder import PACKAGES

if TYPE_CHECKING:  # it imports torch, which the other commands can do without
    from autodo_dist.proof.prove import Elastic, Proof

HINT = "on a GPU a resume is bit-exact with train.deterministic=true alone (docs/reliability.md)"


def prove_resume(
    config: Annotated[Path, typer.Argument(help="yaml file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="laid over the file")] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps of a run, of all its passes together, about")] = 40,
    kills: Annotated[int, typer.Option(min=1, help="ranks killed with kill -9, each time the same command again")] = 4,
    ranks: Annotated[int, typer.Option(min=1, help="ranks of the unbroken run and of the broken one")] = 2,
    elastic: Annotated[
        str, typer.Option(metavar="N,…|none", help="numbers of ranks on which a further run goes on after kills")
    ] = "1,3",
    seed: Annotated[int | None, typer.Option(min=0, help="draws the kills; by default another each time")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="write all of it there as JSON")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep the runs, whatever comes of them")] = False,
) -> None:
    """Prove that a run of CONFIG that is killed and started again is the run that would have been.

    Makes short runs of it in a folder of their own below run.root: one unbroken, one killed again and again and
    started by the same command until it ends, one that goes on on other numbers of ranks. Compares them, and exits
    with 1 if they are not equal. Each start imports everything anew, which takes most of the time.
    """
    settings, numbers = load_config(config, overrides or []), numbers_of(elastic)
    if out is not None and not out.absolute().parent.is_dir():
        raise AutodoError(f"--out {out}: there is no folder {out.absolute().parent}; make it")
    from autodo_dist.proof.kill import submit
    from autodo_dist.proof.prove import prove

    seed = secrets.randbelow(2**32) if seed is None else seed
    begun = time.monotonic()
    with scratch_folder(settings.run.root, keep) as scratch:
        typer.echo(f"seed {seed}; runs below {scratch}", err=True)
        proof = prove(
            settings,
            scratch,
            steps=steps,
            kills=kills,
            ranks=ranks,
            elastic=numbers,
            seed=seed,
            start=submit,
            say=lambda text: typer.echo(f"{time.monotonic() - begun:6.1f} s  {text}", err=True),
        )
        found = record(proof, settings, scratch)
        typer.echo("\n".join(lines(proof, found)))
        if out is not None:
            write_json(out, found)
        if proof.verdict != "bit-exact":
            raise typer.Exit(1)


def numbers_of(words: str) -> list[int]:
    """The numbers of ranks in a word such as 1,3. AutodoError for another word."""
    if words == "none":
        return []
    if not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4})*", words, re.ASCII):
        raise AutodoError(f"--elastic {words}: no numbers of ranks; give such as 1,3, or none")
    return [int(word) for word in words.split(",")]


@contextmanager
def scratch_folder(root: Path, keep: bool) -> Iterator[Path]:
    """A new folder for runs, removed at the end; not if `keep`, nor if the block raises after there were any.

    AutodoError if it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="prove-resume-", dir=root))
    except OSError as error:
        raise AutodoError(f"run folder {root}: cannot be written to ({error.strerror}); set run.root") from error
    try:
        yield scratch
    except BaseException:
        keep = any(scratch.iterdir())
        raise
    finally:
        if keep:
            typer.echo(f"kept: {scratch}", err=True)
        else:
            shutil.rmtree(scratch)


def record(proof: Proof, settings: Config, scratch: Path) -> dict[str, Any]:
    """All that came of it, as JSON: what was run where, each kill, what was compared."""
    changes = [line for line in differences(settings, proof.config, ()) if not line.startswith("run.")]
    environment = read_json(scratch / "unbroken/environment.json")
    return {
        "verdict": proof.verdict,
        "fault": proof.fault,
        "command": shlex.join(["autodo", *sys.argv[1:]]),
        "changed": changes,
        **environment["starts"][-1],
        "data_checksum": environment["data_checksum"],
        **{name: value for name, value in asdict(proof).items() if name != "config"},
    }


def lines(proof: Proof, found: dict[str, Any]) -> list[str]:
    """The verdict in a few lines that can be kept."""
    from autodo_dist.proof.prove import describe

    compared, packages = proof.compared, ("autodo_dist", "python", *PACKAGES)
    versions = ", ".join(f"{name} {found[name]}" for name in packages if found.get(name))
    hosts = ", ".join(sorted({host.partition(":")[0] for host in found["hosts"]}))
    more = f" (and {len(compared.differences) - 1} more)" if len(compared.differences) > 1 else ""
    why = {"bit-exact": "", "not equal": f": {proof.fault}{more}", "incomplete": f": {proof.missed} kills did not fall"}
    return [
        f"command   {found['command']}",
        f"changed   {'; '.join(found['changed'])}",
        f"code      commit {found['git_commit']}; {versions}",
        f"where     {hosts}, {found['time']}; data set {found['data_checksum'][:12]}",
        f"unbroken  {proof.steps} steps on {proof.ranks} ranks, {proof.unbroken:.0f} s, {proof.started:.0f} s of them "
        "before the first step",
        f"broken    {len(proof.broken.kills)} kills drawn with seed {proof.seed}, {proof.broken.seconds:.0f} s",
        *(f"  kill -9 {describe(kill)}" for kill in proof.broken.kills),
        f"compared  {compared.tensors} tensors and progress of step {compared.step}, {compared.lines} lines of "
        f"{', '.join(['metrics.jsonl', *compared.files])}; times left out",
        f"SHA-256   {compared.digests[0]} unbroken: all tensors of model, optimizer and tables",
        f"SHA-256   {compared.digests[1]} broken",
        *(elastic_lines(proof.elastic) if proof.elastic is not None else ()),
        f"verdict   {proof.verdict}{why[proof.verdict]}",
        *([f"          {HINT}"] if proof.fault and proof.on_gpu and not proof.config.train.deterministic else ()),
    ]


def elastic_lines(elastic: Elastic) -> list[str]:
    """The part about other numbers of ranks."""
    from autodo_dist.proof.prove import CLOSE, describe

    found = elastic.losses
    promise = f"not promised to be equal, as {elastic.depends}" if elastic.depends else f"promised: {CLOSE:g}"
    same = found.other or f"the same steps in {found.lines} lines"
    return [
        f"elastic   {' -> '.join(map(str, elastic.ranks))} ranks, {elastic.broken.seconds:.0f} s: {same}",
        f"          losses differ by at most {found.largest:.3g}, at step {found.step} ({promise})",
        *(f"  kill -9 {describe(kill)}" for kill in elastic.broken.kills),
    ]

"""The page: facts, pictures and charts in one HTML file that asks no host for anything.

Everything that a run or a data set says goes through Jinja's escaping, or as JSON into a script element that is not
run; the page's policy lets no script run but report.js, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2

from autodo_dist.errors import AutodoError
from autodo_dist.files import write_text
from autodo_dist.report import charts, facts
from autodo_dist.report.facts import RunFacts
from autodo_dist.report.sections import Section, section

HERE = Path(__file__).parent
SUSPECTS = 300  # suspected labels of a run
# What a page may do; the script is known by its checksum.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "script-src 'sha256-{}'"
)
PHASES = {
    "task": "task steps",
    "hyper": "hyper steps",
    "data": "waiting for data",
    "evaluation": "evaluations",
    "save": "saves that training waited for",
}


def write_report(
    folders: Sequence[Path], out: Path, step: int | None = None, data: Sequence[str] = (), most_suspects: int = SUSPECTS
) -> list[str]:
    """Write the page about these runs; gives what is missing on it.

    `step`: of the checkpoints (None: the newest). `data`: where their data sets may lie by now. AutodoError where
    there is no run, or the page cannot be written.
    """
    runs = [facts.read_run(folder) for folder in {it.resolve(): it for it in folders}.values()]
    names = unique([run.name for run in runs])
    sections = [section(run, f"run{i}", step, data, most_suspects) for i, run in enumerate(runs)]
    text = render(sections, names)
    try:
        write_text(out, text.encode("utf-8", "replace").decode())  # names of files need not be Unicode
    except OSError as error:
        raise AutodoError(
            f"report {out}: cannot be written ({error.strerror}); choose another place by --out"
        ) from error
    return [f"{name}: {what}" for name, part in zip(names, sections, strict=True) for what in part.missing]


def render(sections: Sequence[Section], names: Sequence[str]) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "figure": figure, "seconds": seconds}
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = [part.run for part in sections]
    return environment.get_template("report.html").render(
        sections=sections,
        names=names,
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=script,
        policy=POLICY.format(digest),
        curves=learning_curves(runs, names),
        differing=facts.differing(runs),
        galleries=[
            {
                "id": part.id,
                "store": part.store,
                "file": f"ticks-{name}.csv",
                "suspects": part.suspects,
                "classes": part.learnt.classes if part.learnt and part.suspects else [],
            }
            for part, name in zip(sections, names, strict=True)
        ],
        phases=PHASES,
    )


def learning_curves(runs: Sequence[RunFacts], names: Sequence[str]) -> list[dict[str, str]]:
    """A chart each of error and loss for one run, its parts in one; for several runs one of each part."""
    what = (("error", "%", 100.0), ("loss", " nats", 1.0))
    found = []
    if len(runs) == 1:
        for measure, unit, scale in what:
            lines = [curve(runs[0], f"{part}_{measure}", part, i, scale) for i, part in enumerate(facts.PARTS)]
            found.append((measure, measure, unit, lines))
    else:
        for part in reversed(facts.PARTS):
            for measure, unit, scale in what:
                lines = [
                    curve(run, f"{part}_{measure}", name, i % 8, scale)
                    for i, (run, name) in enumerate(zip(runs, names, strict=True))
                ]
                found.append((f"{part} {measure}", f"{part}-{measure}", unit, lines))
    kept = [(label, id_, unit, [line for line in lines if line.x]) for label, id_, unit, lines in found]
    return [
        {"label": label, "svg": charts.curves(f"curve-{id_}", f"{label}, {unit.strip()}", lines, unit, len(runs) == 1)}
        for label, id_, unit, lines in kept
        if lines
    ]


def curve(run: RunFacts, value: str, name: str, colour: int, scale: float) -> charts.Line:
    """A value of a run over its epochs."""
    points = [(point["epoch"], scale * point[value]) for point in run.points if value in point]
    return charts.Line(name, colour, [x for x, _ in points], [y for _, y in points], run.start_epoch)


def unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: at + 1].count(name)})" for at, name in enumerate(names)
    ]


def percent(share: float | None, digits: int = 2) -> str:
    """A share as the page shows it."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def figure(value: float | None, digits: int = 3) -> str:
    """A number as the page shows it."""
    return "–" if value is None else f"{value:.{digits}g}"


def seconds(value: float) -> str:
    """A time as the page shows it."""
    if value < 120:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"

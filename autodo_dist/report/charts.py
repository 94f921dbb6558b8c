"""Charts as SVG that stands inside a page: drawn by matplotlib, colours and fonts left to the page's style sheet.

matplotlib is given colours that stand for custom properties of the style sheet (`--ink`, `--rule`, `--series-0` …), so
a chart is right in a light and in a dark page. Marks have tooltips; ids begin with the chart's name.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, RULE, BACK = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0102{number:02x}" for number in range(8))
PROPERTIES = {INK: "--ink", RULE: "--rule", BACK: "--back"} | {hex_: f"--series-{i}" for i, hex_ in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
}
MOST_MARKS = 60  # points of a line that have a mark with a tooltip
WIDTH = 4.4  # inches at which fonts have their size


@dataclass(frozen=True)
class Line:
    """A curve with its name; `colour` indexes SERIES; `since`: the epoch from which the hyper step runs."""

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    since: float | None = None


@dataclass(frozen=True)
class Box:
    """Quantiles (5, 25, 50, 75, 95 %) of a group in a row of a box chart."""

    group: str
    colour: int
    values: Sequence[float]


@mpl.rc_context(STYLE)
def curves(name: str, label: str, lines: Sequence[Line], unit: str, alone: bool) -> str:
    """Curves over epochs, each labelled at its end; the hyper step's start is a line (`alone`: one run) or a mark."""
    figure, axes = _figure(2.7)
    tips: dict[str, list[str]] = {}
    top = max((value for line in lines for value in line.y), default=1.0)
    for number, line in enumerate(lines):
        every = max(1, -(-len(line.x) // MOST_MARKS))
        marks = sorted({*range(0, len(line.x), every), len(line.x) - 1})
        axes.plot(line.x, line.y, color=SERIES[line.colour], linewidth=1.6)
        gid = f"line{number}"
        x, y = [line.x[at] for at in marks], [line.y[at] for at in marks]
        axes.plot(x, y, "o", markersize=2.6, color=SERIES[line.colour], gid=gid)
        tips[gid] = [f"{line.name}, epoch {a:g}: {b:.4g}{unit}" for a, b in zip(x, y, strict=True)]
        if line.since is not None and not alone:
            axes.plot(
                [line.since], [0], "^", markersize=6, color=SERIES[line.colour], clip_on=False, gid=f"since{number}"
            )
            tips[f"since{number}"] = [f"{line.name}: hyper steps from epoch {line.since:g} on"]
    starts = [line.since for line in lines if line.since is not None]
    if alone and starts:
        axes.axvline(starts[0], color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
        axes.annotate(
            "hyper steps",
            (starts[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            va="top",
            textcoords="offset points",
        )
    axes.set(xlabel="epoch", ylabel=label, ylim=(0, top * 1.1 or 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(min((line.x[0] for line in lines), default=0) if alone else 0)
    _label_ends(axes, lines)
    return _svg(figure, name, f"{label} over epochs: {', '.join(line.name for line in lines)}", tips)


@mpl.rc_context(STYLE)
def dumbbells(name: str, label: str, rows: Sequence[tuple[str, float | None, float]]) -> str:
    """A row for each (class, before, end): a ring before, a dot at the end."""
    figure, axes = _figure(0.75 + 0.19 * len(rows))
    tips: dict[str, list[str]] = {"end": [], "before": []}
    places = np.arange(len(rows))[::-1]
    both = [(place, before, end) for place, (_, before, end) in zip(places, rows, strict=True) if before is not None]
    for place, before, end in both:
        axes.plot([before, end], [place, place], color=RULE, linewidth=2.4, solid_capstyle="round")
    if both:
        at, before_n, _ = zip(*both, strict=True)
        axes.plot(
            before_n,
            at,
            "o",
            markersize=5,
            markerfacecolor=BACK,
            markeredgecolor=SERIES[1],
            gid="before",
            clip_on=False,
            zorder=3,
        )
        tips["before"] = [f"{name_}: {before:.2f} % before" for name_, before, _ in rows if before is not None]
    axes.plot([end for *_, end in rows], places, "o", markersize=5, color=SERIES[0], gid="end", clip_on=False, zorder=4)
    tips["end"] = [f"{name_}: {end:.2f} % at the end" for name_, _, end in rows]
    _rows(axes, [name_ for name_, *_ in rows], places)
    axes.set(xlabel=label, xlim=(0, None))
    return _svg(figure, name, f"{label} of {len(rows)} classes, before the first hyper step and at the end", tips)


@mpl.rc_context(STYLE)
def boxes(name: str, label: str, rows: Sequence[tuple[str, Sequence[Box]]]) -> str:
    """A row for each name with a box or two: the middle half, the median, a line from the 5 % to the 95 % quantile."""
    figure, axes = _figure(0.75 + 0.24 * len(rows))
    tips: dict[str, list[str]] = {}
    places = np.arange(len(rows))[::-1]
    for place, (row, groups) in zip(places, rows, strict=True):
        height = 0.66 / max(1, len(groups))
        for number, box in enumerate(groups):
            y = place + 0.33 - height * (number + 0.5)
            low, q1, median, q3, high = box.values
            colour, gid = SERIES[box.colour], f"box{place}-{number}"
            axes.plot([low, high], [y, y], color=colour, linewidth=1)
            axes.barh(y, max(q3 - q1, 1e-9), height * 0.8, q1, color=colour, alpha=0.45, gid=gid, linewidth=0)
            axes.plot([median, median], [y - height * 0.4, y + height * 0.4], color=colour, linewidth=2)
            # A bar's gid belongs to its container; the rectangle is what is drawn.
            axes.patches[-1].set_gid(gid)
            tips[gid] = [f"{row}, {box.group}: median {median:.3g}, half within {q1:.3g} to {q3:.3g}"]
    _rows(axes, [row for row, _ in rows], places)
    axes.set(xlabel=label, xlim=(0, None))
    return _svg(figure, name, f"{label}, quantiles for each of {len(rows)} classes", tips)


@mpl.rc_context(STYLE)
def shares(name: str, label: str, edges: Any, groups: Sequence[tuple[str, Any]]) -> str:
    """A histogram: the share of each group's samples that falls into each bin, %."""
    figure, axes = _figure(2.5)
    tips = {}
    for number, (group, share) in enumerate(groups):
        colour, gid = SERIES[number], f"shares{number}"
        axes.stairs(100 * np.asarray(share), edges, fill=True, color=colour, alpha=0.3)
        axes.stairs(100 * np.asarray(share), edges, color=colour, linewidth=1.4, gid=gid)
        tips[gid] = [group]
    axes.set(xlabel=label, ylabel="share of samples, %", xlim=(0, None), ylim=(0, None))
    return _svg(figure, name, f"{label}: share of samples, {', '.join(group for group, _ in groups)}", tips)


def short(text: str, most: int = 22) -> str:
    """A name as a chart can show it: on one line, printable, cut off where it is long."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _rows(axes: Axes, names: Sequence[str], places: Any) -> None:
    """Names beside the rows of a chart."""
    axes.set_yticks(places, [short(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-0.6, len(names) - 0.4)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Each curve's name at its end, moved up where it would cover the one below."""
    low, high = axes.get_ylim()
    least, below = 0.068 * (high - low), -float("inf")
    for line in sorted((line for line in lines if line.y), key=lambda line: line.y[-1]):
        below = max(line.y[-1], below + least)
        axes.annotate(
            short(line.name),
            (1, below),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=SERIES[line.colour],
            annotation_clip=False,
        )


def _svg(figure: Figure, name: str, words: str, tips: Mapping[str, Sequence[str]]) -> str:
    """The figure as an element of a page. `tips`: for an artist's gid, what its marks say, in their order."""
    with io.BytesIO() as file, mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the page has glyphs that matplotlib's fonts, used to measure, have not
        figure.savefig(file, format="svg", metadata={"Date": None})
        root = ElementTree.fromstring(file.getvalue())
    for parent in root.iter():
        for child in [it for it in parent if _local(it.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        if element.get("id") in tips:
            _tip(element, tips[element.attrib["id"]])
    for element in root.iter():
        element.attrib = {_local(key): _own(name, _local(key), value) for key, value in element.attrib.items()}
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.attrib |= {"role": "img", "aria-label": words, "class": "chart", "id": name}
    return ElementTree.tostring(root, encoding="unicode")


def _tip(element: ElementTree.Element, words: Sequence[str]) -> None:
    """Give the marks of an artist their tooltips: its `use` elements, or else itself."""
    marks = [it for it in element.iter() if _local(it.tag) == "use"] or [element]
    for mark, text in zip(marks, words, strict=True):
        title = ElementTree.Element("title")
        title.text = short(text, 200)
        mark.insert(0, title)


def _own(name: str, key: str, value: str) -> str:
    """An attribute's value with ids of this chart alone, the page's colours and the page's font."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value[1:]}"
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        return re.sub(r"#0[0-9a-f]{5}", lambda found: f"var({PROPERTIES.get(found[0], '--ink')})", value)
    return value


def _local(tag: str) -> str:
    """A name without its namespace: HTML has none."""
    return tag.rpartition("}")[2]

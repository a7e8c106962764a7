"""Plots of quality against network passes."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from harness.records import METRICS, NETWORKS, Record
from harness.tables import COLUMNS, ImageSet, split_by_task, write_file
from ncvsd_inverse.tasks import task_title

__all__ = ["Point", "draw_tasks", "pareto_front", "svg_plots", "without_mathematics", "write_plots"]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLOTTED = ("lpips-alex", "psnr")
"""Metrics with a panel each."""

_COLOURS = (
    "#000000",
    "#cc3311",
    "#0077bb",
    "#009988",
    "#ee7733",
    "#aa4499",
    "#33bbee",
    "#999933",
    "#882255",
    "#ddaa33",
    "#cc99bb",
)
"""For methods with a network; their order keeps neighbours apart for colour-blind eyes too."""

_MARKERS = "osD^vPX<>pd"

_GREYS = ("#777777", "#aaaaaa", "#555555", "#999999", "#bbbbbb")
_DASHES = ((0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 2)), (0, (4, 1, 1, 1, 1, 1)))
_GREY_MARKERS = "h*+8H"
"""For methods without network."""

_FRONT = "#ffd24d"
"""Colour of the Pareto front."""


@dataclass(frozen=True)
class _Style:
    """How a method is drawn in every plot of a results folder."""

    title: str
    colour: str
    marker: str
    dashes: tuple[int, tuple[float, ...]] | str


@dataclass(frozen=True)
class Point:
    """A row in a panel: network passes, forward and backward, and a mean with its error."""

    method: str
    calls: float
    value: float
    error: float | None


def write_plots(records: Sequence[Record], out: Path) -> list[Path]:
    """Write `plots/TASK.png` and `.pdf` for each task.

    Args:
        records: rows of any tasks.
        out: the results folder.

    Returns:
        The files.

    Raises:
        ValueError: if a task is unknown.
        OSError: if a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    written: list[Path] = []
    for task, figure in draw_tasks(records).items():
        png, pdf = io.BytesIO(), io.BytesIO()
        FigureCanvasAgg(figure).print_figure(png, dpi=150)
        FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None})
        written.append(write_file(out / "plots" / f"{task}.png", png.getvalue()))
        written.append(write_file(out / "plots" / f"{task}.pdf", pdf.getvalue()))
    return written


def svg_plots(records: Sequence[Record]) -> dict[str, str]:
    """Return the plot of each task as SVG, by task name."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    plots: dict[str, str] = {}
    for task, figure in draw_tasks(records).items():
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": task}):
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        plots[task] = buffer.getvalue()
    return plots


def pareto_front(points: Sequence[Point], better: str) -> list[Point]:
    """Return the points that no other beats or equals with as many or fewer calls.

    Args:
        points: of one panel.
        better: "higher" or "lower".

    Returns:
        The front by rising number of calls.
    """
    sign = -1 if better == "higher" else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.calls, sign * point.value)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return front


def without_mathematics(text: str) -> str:
    """Return a text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")


def draw_tasks(records: Sequence[Record]) -> "dict[str, Figure]":
    """Return a figure for each task that has rows with a plotted metric."""
    styles = _choose_styles(records)
    return {
        task: _draw_task(task, sets, styles)
        for task, sets in split_by_task(records).items()
        if any(_points(rows, metric) for rows in sets.values() for metric in _PLOTTED)
    }


def _choose_styles(records: Sequence[Record]) -> dict[str, _Style]:
    """Return the style of each method: colours with a network, greys without."""
    titles = {
        record.method: without_mathematics(record.title)
        for record in sorted(records, key=lambda each: (NETWORKS.index(each.network), each.method))
    }
    without = {record.method for record in records if record.network == "none"}
    styles: dict[str, _Style] = {}
    for place, method in enumerate(each for each in titles if each not in without):
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
        styles[method] = _Style(titles[method], colour, marker, "-")
    for place, method in enumerate(each for each in titles if each in without):
        at = place % len(_GREYS)
        styles[method] = _Style(titles[method], _GREYS[at], _GREY_MARKERS[at], _DASHES[at])
    return styles


def _points(rows: Sequence[Record], metric: str) -> list[Point]:
    """Return the points of the rows that have the metric, by method and calls."""
    points = [
        Point(row.method, row.forward + row.backward, mean, row.error(metric))
        for row in rows
        if (mean := row.mean(metric)) is not None
    ]
    return sorted(points, key=lambda point: (point.method, point.calls))


def _draw_task(
    task: str, sets: Mapping[ImageSet, Sequence[Record]], styles: Mapping[str, _Style]
) -> "Figure":
    """Draw a row of panels for each image set, a panel for each metric, and one legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = [metric for metric in _PLOTTED if any(_points(rows, metric) for rows in sets.values())]
    used = {record.method for rows in sets.values() for record in rows}
    height = 3.5 * len(sets) + 0.35 + 0.24 * (len(used) // 5 + 1)
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = figure.subplots(len(sets), len(shown), squeeze=False)
    calls = [
        point.calls
        for rows in sets.values()
        for metric in shown
        for point in _points(rows, metric)
        if point.calls
    ]
    span = (min(calls, default=1.0) / 2, max(calls, default=1000.0) * 1.6)
    for (where, rows), line in zip(sets.items(), panels, strict=True):
        for metric, axis in zip(shown, line, strict=True):
            _draw_panel(axis, rows, metric, styles, span)
        line[0].set_title(without_mathematics(where.title), fontsize=9, loc="left", color="0.3")
    for axis in panels[-1]:
        axis.set_xlabel("network passes an image, forward and backward")
    figure.suptitle(task_title(task), fontsize=12, fontweight="bold")
    handles = [
        Line2D(
            [],
            [],
            color=style.colour,
            marker=style.marker,
            linestyle=style.dashes,
            markersize=7,
            label=style.title,
        )
        for method, style in styles.items()
        if method in used
    ]
    handles.append(Line2D([], [], color=_FRONT, linewidth=5, alpha=0.7, label="Pareto front"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=5, frameon=False, handlelength=3.2
    )
    return figure


def _draw_panel(
    axis: "Axes",
    rows: Sequence[Record],
    metric: str,
    styles: Mapping[str, _Style],
    span: tuple[float, float],
) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    points = _points(rows, metric)
    place = _places(points, span[0])
    for method, group in groupby(points, lambda point: point.method):
        style, line = styles[method], list(group)
        without = not any(point.calls for point in line)
        if without:
            axis.axhline(line[0].value, color=style.colour, linestyle=style.dashes, zorder=1.5)
        axis.errorbar(
            [place[point] for point in line],
            [point.value for point in line],
            [point.error or 0.0 for point in line],
            color=style.colour,
            marker=style.marker,
            linestyle="none" if without else "-",
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=1.4,
            capsize=2.5,
            clip_on=not without,
            zorder=3,
        )
    if front := pareto_front(points, METRICS[metric]):
        # A step goes on with its value until a point with more calls is better.
        axis.step(
            [*(place[point] for point in front), span[1]],
            [*(point.value for point in front), front[-1].value],
            where="post",
            color=_FRONT,
            linewidth=5,
            alpha=0.7,
            zorder=1,
        )
    title = next(column.title for column in COLUMNS if column.name == metric)
    unit = " in dB" if metric.startswith("psnr") else ""
    axis.set_ylabel(f"{title}{unit}, {METRICS[metric]} is better")
    axis.set_xscale("log")
    axis.set_xlim(span)
    if metric.startswith("lpips") and all(point.value > 0 for point in points):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.grid(alpha=0.25, which="major")
    axis.spines[["top", "right"]].set_visible(False)
    _name_calls(axis, span)


def _places(points: Sequence[Point], edge: float) -> dict[Point, float]:
    """Return where each point is on the axis of calls: without calls at its left edge.

    Points of equal calls stand side by side around them, so that none hides another.
    """
    places: dict[Point, float] = {}
    by_calls = sorted(points, key=lambda point: point.calls)
    for calls, group in groupby(by_calls, lambda point: point.calls):
        equal = list(group)
        for number, point in enumerate(equal):
            aside = 1.08 ** (number - (len(equal) - 1) / 2)
            places[point] = calls * aside if calls else edge
    return places


def _name_calls(axis: "Axes", span: tuple[float, float]) -> None:
    """Tick the axis at plain numbers of calls, 0 at its left edge."""
    ticks = [n * 10**power for power in range(6) for n in (1, 2, 5)]
    shown = [tick for tick in ticks if span[0] * 1.3 < tick <= span[1]]
    axis.set_xticks([span[0], *shown], ["0", *(f"{tick:g}" for tick in shown)])
    axis.minorticks_off()

"""Charts as SVG for a page: text stays text, ink takes the page's colour, so one picture serves light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

INK = "#010203"  # stands for the page's own text colour until the SVG is written
COLORS = (
    "#3b82f6",
    "#f59e0b",
    "#10b981",
    "#ef4444",
    "#8b5cf6",
    "#ec4899",
    "#14b8a6",
    "#a3a3a3",
)  # read on both grounds
SIZE = (4.8, 3.0)


@dataclass(frozen=True)
class Curve:
    """One line: points, and a band around it where there is one."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Chart:
    """A finished picture. ``svg`` goes into a page as it is; ``marks`` counts lines, bands and points drawn."""

    name: str
    title: str
    svg: str
    marks: int
    note: str = field(default="")


def _axes(figure, xlabel: str, ylabel: str):
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.18, color=INK, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _figure():
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _style():
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "text.parse_math": False,  # names may hold dollars
            "font.size": 9.5,
            "font.family": "sans-serif",
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
        }
    )


def _svg(figure, name: str, title: str) -> str:
    """The drawing alone: no prologue, no fixed size, ids of its own, ink in the page's colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    return text.replace(INK, "currentColor")


def line_chart(
    name: str,
    title: str,
    curves: Mapping[str, Curve],
    *,
    xlabel: str = "update",
    ylabel: str = "",
    limits: tuple[float, float] | None = None,
    whole_x: bool = False,
    note: str = "",
) -> Chart | None:
    """Lines with bands. Curves without a point to draw are left out; None if none is left."""
    curves = {label: curve for label, curve in curves.items() if any(map(math.isfinite, curve.y))}
    if not curves:
        return None
    marks = 0
    with _style():
        figure = _figure()
        axes = _axes(figure, xlabel, ylabel)
        for index, (label, curve) in enumerate(curves.items()):
            color = COLORS[index % len(COLORS)]
            marker = "o" if len(curve.x) < 12 else None
            axes.plot(curve.x, curve.y, color=color, label=label, linewidth=1.7, marker=marker, markersize=3.5)
            marks += 1
            if curve.low is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
                marks += 1
        if limits:
            axes.set_ylim(*limits)
        if whole_x:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(curves) > 1 or next(iter(curves)):
            axes.legend(loc="best")
        return Chart(name, title, _svg(figure, name, title), marks, note)


def area_chart(
    name: str, title: str, parts: Mapping[str, Curve], *, xlabel: str = "update", ylabel: str = ""
) -> Chart | None:
    """Parts of a whole, stacked; they share their points."""
    parts = {label: curve for label, curve in parts.items() if any(map(math.isfinite, curve.y))}
    if not parts:
        return None
    with _style():
        figure = _figure()
        axes = _axes(figure, xlabel, ylabel)
        first = next(iter(parts.values()))
        axes.stackplot(first.x, [p.y for p in parts.values()], labels=list(parts), colors=COLORS, alpha=0.75)
        axes.legend(loc="best")
        return Chart(name, title, _svg(figure, name, title), len(parts))


def interval_chart(
    name: str, title: str, rows: Sequence[tuple[str, float, float, float]], *, xlabel: str, note: str = ""
) -> Chart | None:
    """One point with its interval a row: (label, value, low, high), top to bottom."""
    if not rows:
        return None
    with _style():
        figure = _figure()
        figure.set_figheight(0.9 + 0.36 * len(rows))
        axes = _axes(figure, xlabel, "")
        for place, (_, value, low, high) in enumerate(rows):
            color = COLORS[place % len(COLORS)]
            axes.plot([low, high], [place, place], color=color, linewidth=2.4, solid_capstyle="round")
            axes.plot([value], [place], color=color, marker="o", markersize=6.5)
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        return Chart(name, title, _svg(figure, name, title), 2 * len(rows), note)

"""Curves as pictures: PNG files to pass on, and SVG inside a page, which follows its colours, light or dark.

One plain style for all. The eight colours are told apart by people who see red and green alike, and a curve is never
told by its colour alone: its name stands in the legend, or points carry error bars. The trap is matplotlib's own state
(pyplot, a display, fonts of the machine): figures here are made and drawn directly, under one set of settings.
"""

import io
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cheaptrain.report.series import Numbers, middle, thinned
from cheaptrain.units import human

# Name of the variable in a page's style sheet → the colour on white.
INK = {"ink": "#1f1e1b", "faint": "#6b6862", "line": "#dcd8d0"}
COLOURS = {
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#009e73",
    "c3": "#b5568c",
    "c4": "#b07d00",
    "c5": "#3a9bd4",
    "c6": "#6a51a3",
    "c7": "#5c5c5c",
}
NARROW, WIDE = (4.6, 2.75), (9.2, 3.1)  # inches; in a page each is as wide as its column
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))
_FEW = 30  # points that are marked one by one
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 8.5,
    "axes.edgecolor": INK["faint"],
    "axes.labelcolor": INK["faint"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK["line"],
    "grid.linewidth": 0.5,
    "xtick.color": INK["faint"],
    "ytick.color": INK["faint"],
    "text.color": INK["ink"],
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",  # text stays text: it is searched, read aloud, and drawn in the page's own font
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class Curve:
    """One line. `colour`: its number, the same for the same thing in all pictures. `error`: standard errors, for points
    with bars. `noisy`: shown pale, with the median of its stretches over it. `thin`: one of several that another curve
    is the mean of, without a name of its own."""

    label: str
    colour: int
    x: Numbers
    y: Numbers
    error: Numbers | None = None
    noisy: bool = False
    thin: bool = False


@dataclass(frozen=True)
class Picture:
    """What to draw. `name` is that of its file. `starts`: where stages begin on the axis. `level`: a line to compare
    with, and what it is. `unit` formats the values of the axis."""

    name: str
    title: str
    caption: str
    curves: Sequence[Curve]
    unit: Callable[[float], str] = human
    x_label: str = "tokens"
    starts: Sequence[float] = ()
    level: tuple[float, str] | None = None


def write_png(picture: Picture, path: Path) -> None:
    """Draw it with title and legend, on white."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(picture, NARROW if len(picture.curves) <= 1 else (6.4, 3.6), alone=True)
        FigureCanvasAgg(figure).print_figure(str(path), dpi=150, facecolor="white", metadata={"Software": None})


def svg(picture: Picture, *, wide: bool = False) -> str:
    """Draw it for a page that says its colours as `--ink`, `--faint`, `--line` and `--c0` to `--c7`, and has its title
    and a legend of its own."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{picture.name}{wide}"}):
        figure = _figure(picture, WIDE if wide else NARROW, alone=False)
        written = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None})
    return _for_page(written.getvalue().decode(), picture.title)


def legend(picture: Picture, known: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Labels of its curves with the names of their colours; empty when all are `known` from elsewhere."""
    names = list(COLOURS)
    labels = {curve.label: names[curve.colour % len(names)] for curve in picture.curves}
    return () if labels.keys() <= set(known) else tuple(labels.items())


def _figure(picture: Picture, inches: tuple[float, float], *, alone: bool) -> Figure:
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.add_subplot()
    for curve in picture.curves:
        _draw(axes, curve)
    for start in picture.starts:
        axes.axvline(start, color=INK["faint"], linewidth=0.6, linestyle=(0, (2, 2)), zorder=0.5)
    if picture.level is not None:
        height, label = picture.level
        axes.axhline(height, color=INK["faint"], linewidth=0.9, linestyle=(0, (5, 3)), label=label if alone else None)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: picture.unit(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(picture.x_label)
    if alone:
        axes.set_title(_short(picture.title, 70), pad=8)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside lower center", ncols=4)
    return figure


def _draw(axes: Axes, curve: Curve) -> None:
    colour = list(COLOURS.values())[curve.colour % len(COLOURS)]
    dashes = _DASHES[curve.colour // len(COLOURS) % len(_DASHES)]
    x, y = thinned(curve.x, curve.y)
    over = middle(curve.x, curve.y) if curve.noisy else None
    if curve.error is not None:
        axes.errorbar(
            curve.x, curve.y, yerr=curve.error, marker="o", linestyle=dashes, capsize=2, elinewidth=0.9,
            label=_short(curve.label, 28), color=colour,
        )  # fmt: skip
    elif curve.thin:
        axes.plot(x, y, linewidth=0.7, alpha=0.55, color=colour)
    elif over is not None:
        axes.plot(x, y, linewidth=0.7, alpha=0.45, color=colour)
        axes.plot(*over, linestyle=dashes, label=_short(curve.label, 28), color=colour)
    else:
        marker = "o" if len(x) == 1 or (len(x) <= _FEW and not curve.noisy) else ""
        axes.plot(x, y, marker=marker, linestyle=dashes, label=_short(curve.label, 28), color=colour)


def _short(text: str, most: int) -> str:
    """On one line that leaves room for the picture: names are anybody's."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


_VARIABLES = {colour: f"var(--{name})" for name, colour in {**INK, **COLOURS}.items()}


def _for_page(text: str, title: str) -> str:
    """matplotlib's file as a part of a page: no header, no size of its own, colours by name, the font of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)  # a style would hold for the whole page
    text = re.sub(r'(<svg [^>]*?)\s+width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\s+height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)  # would stand twice in a page of several; nothing refers to them
    text = text.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
    text = re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found.group()], text)
    name = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1).strip()


def errors_of(values: Sequence[float | None]) -> Numbers:
    """Standard errors as a column; 0, which draws no bar, where there is none."""
    return np.array([0.0 if value is None else value for value in values])

"""One figure in the house style, as PNG and as SVG that takes its colours from the page around it."""

import html
import io
import math
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterMathtext,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullFormatter,
)

from lightlm.quantities import format_quantity
from lightlm.report.charts.curves import Floats, thin

# Light and dark: the figure is drawn in the light colours, and in the page each stands for a CSS variable.
INK, MUTED, GRID = ("#1c2330", "#e6e9ee"), ("#5b6472", "#a3acb9"), ("#e4e7eb", "#323945")
# Told apart also by colour-blind readers (after Okabe and Ito, 2008); more runs than these get dashed lines.
RUNS = [
    ("#0b64b4", "#67aef2"),
    ("#d1560b", "#f5924e"),
    ("#12875f", "#45c79a"),
    ("#b04a8f", "#e38cc6"),
    ("#b58a00", "#e5bd3c"),
    ("#5b5bd0", "#a2a2f7"),
    ("#8a3b2e", "#d58a7c"),
    ("#2a8fa3", "#66c5d8"),
]
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)))
_HATCHES = ("", "///", "xxx")  # of bars, where lines are dashed
_SHAPES = "D^svP*hX"  # of figures that are not the runs'

PLOT_HEIGHT = 2.95  # inches, as those below
_WIDTH, _LEFT, _RIGHT, _BOTTOM, _TITLE, _LEGEND_ROW = 6.8, 0.82, 0.22, 0.62, 0.46, 0.25
_FONT = 11.5
_LEGEND_CHARACTERS = 66  # that fit in one row of the legend, where an entry's line takes 6
_STYLE: Any = {  # matplotlib types its keys one by one, and only from 3.11 on
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so pages look alike everywhere
    "font.size": _FONT,
    "axes.edgecolor": MUTED[0],
    "axes.labelcolor": MUTED[0],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED[0],
    "ytick.color": MUTED[0],
    "text.color": INK[0],
    "svg.fonttype": "path",
    "svg.hashsalt": "lightlm",
}


def run_colour(index: int) -> str:
    return RUNS[index % len(RUNS)][0]


def run_dashes(index: int) -> object:
    return _DASHES[index // len(RUNS) % len(_DASHES)]


class Chart:
    """A figure with one pair of axes, filled by `line` and `points` and then rendered.

    Args:
        title: above the axes, on the left.
        x_label, y_label: with units.
        name_all: show a legend also if it has a single entry, as of the one run of several with this metric.
        height: of the axes, in inches.
    """

    def __init__(
        self, title: str, x_label: str, y_label: str, *, name_all: bool = False, height: float = PLOT_HEIGHT
    ) -> None:
        self.title, self.height, self._name_all = title, height, name_all
        with matplotlib.rc_context(_STYLE):
            self.figure = Figure(figsize=(_WIDTH, height))
            self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
            self.axes.set_xlabel(x_label)
            self.axes.set_ylabel(_plain(y_label))
            self.axes.grid(True, color=GRID[0], linewidth=0.8)
            self.axes.set_axisbelow(True)
            self.axes.tick_params(which="both", length=0, pad=5)
        self._entries: dict[str, Artist] = {}
        self._right = _RIGHT

    @property
    def width(self) -> float:
        """Of the axes, in inches."""
        return _WIDTH - _LEFT - self._right

    def line(self, label: str, x: Floats, y: Floats, run: int, *, faint: bool = False, style: object = None) -> None:
        """A curve in a run's colour; `faint` for the raw values behind a smoothed curve, which have no label."""
        x, y = thin(x, y)
        (drawn,) = self.axes.plot(
            x,
            y,
            color=run_colour(run),
            alpha=0.28 if faint else 1.0,
            linewidth=0.8 if faint else 1.9,
            linestyle="-" if faint else style or run_dashes(run),
            marker="o" if len(x) == 1 else "",
            label="_",
        )
        if not faint and len(x):
            self._entries.setdefault(label, drawn)

    def points(self, label: str, x: Floats, y: Floats, run: int, *, joined: bool = True, mark: str = "o") -> None:
        """Figures measured now and then, as marks."""
        x, y = thin(x, y)
        (drawn,) = self.axes.plot(
            x,
            y,
            color=run_colour(run),
            linewidth=1.1 if joined else 0,
            linestyle=(0, (2, 2)) if joined else "none",
            marker=mark,
            markersize=6 if mark == "o" else 7,
            markerfacecolor="#ffffff" if mark == "o" else run_colour(run),
            markeredgecolor=run_colour(run),
            markeredgewidth=1.6,
            label="_",
            zorder=4,
        )
        if len(x):
            self._entries.setdefault(label, drawn)

    def bars(self, label: str, x: Floats, heights: Floats, errors: Floats, run: int, width: float) -> None:
        """Bars in a run's colour, each with an error to either side; none where that is NaN."""
        drawn = self.axes.bar(
            x,
            heights,
            width * 0.9,
            color=run_colour(run),
            hatch=_HATCHES[run // len(RUNS) % len(_HATCHES)],
            edgecolor="#ffffff",
            linewidth=0,
        )
        known = np.isfinite(errors)
        self.axes.errorbar(
            x[known], heights[known], errors[known], fmt="none", ecolor=INK[0], elinewidth=1.1, capsize=3, zorder=4
        )
        self._entries.setdefault(label, drawn[0])

    def shapes(self, label: str, x: Floats, y: Floats, number: int) -> None:
        """Figures from elsewhere, as marks in ink, each source with a shape of its own."""
        (drawn,) = self.axes.plot(
            x,
            y,
            linestyle="none",
            marker=_SHAPES[number % len(_SHAPES)],
            markersize=7,
            markerfacecolor="#ffffff",
            markeredgecolor=INK[0],
            markeredgewidth=1.4,
            zorder=5,
        )
        self._entries.setdefault(label, drawn)

    def levels(self, label: str, x: Floats, y: Floats, width: float) -> None:
        """A dashed level across each of several groups of bars."""
        drawn = self.axes.hlines(
            y, x - width / 2, x + width / 2, colors=MUTED[0], linestyles="dashed", linewidth=1.6, zorder=3
        )
        self._entries.setdefault(label, drawn)

    def quantities(self, axis: str) -> None:
        """Ticks such as 10M on the axis `x` or `y`."""
        chosen = self.axes.xaxis if axis == "x" else self.axes.yaxis
        chosen.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        chosen.set_major_formatter(FuncFormatter(lambda value, _: format_quantity(value)))

    def from_zero(self, axis: str, highest: float) -> None:
        """Let the axis `x` or `y` begin at zero and end a little above its highest value."""
        if axis == "x":
            self.axes.set_xlim(0, highest * 1.03 or 1.0)
        else:
            self.axes.set_ylim(0, highest * 1.15 or 1.0)

    def log_quantities_x(self) -> None:
        """A logarithmic x axis with ticks such as 10M."""
        self.axes.set_xscale("log")
        self.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_quantity(value)))
        self.axes.xaxis.set_minor_formatter(NullFormatter())

    def scientific_y(self) -> None:
        """Ticks such as 2.5e-3, as recipes write learning rates."""
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _exponent(value)))

    def colour_bar(self, image: AxesImage) -> None:
        """The scale of a map of colours, whose values are multiples, in a strip inside the right margin."""
        with matplotlib.rc_context(_STYLE):
            bar = self.figure.colorbar(image, ax=self.axes, cax=self.axes.inset_axes((1.02, 0, 0.025, 1)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.ax.yaxis.set_major_locator(MultipleLocator(0.5))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        self._right = 0.8

    def log_y(self) -> None:
        """A logarithmic y axis with at least two labelled ticks, also when all values lie within one decade."""
        self.axes.set_yscale("log")
        low, high = self.axes.get_ylim()
        if math.log10(high / low) < 1.5:
            self.axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            self.axes.yaxis.set_major_formatter(LogFormatterMathtext())
        self.axes.yaxis.set_minor_formatter(NullFormatter())

    def finish(self) -> "Chart":
        """Give the figure the height its legend needs, and lay it out."""
        labels = list(self._entries) if len(self._entries) > 1 or self._name_all else []
        widest = max((len(label) for label in labels), default=1) + 6
        columns = max(min(_LEGEND_CHARACTERS // widest, len(labels)), 1)
        rows = math.ceil(len(labels) / columns)
        header = _TITLE + rows * _LEGEND_ROW
        height = header + self.height + _BOTTOM
        self.figure.set_size_inches(_WIDTH, height)
        self.axes.set_position((_LEFT / _WIDTH, _BOTTOM / height, self.width / _WIDTH, self.height / height))
        with matplotlib.rc_context(_STYLE):
            left = 0.16 / _WIDTH
            self.figure.text(
                left, 1 - 0.16 / height, _plain(self.title), fontsize=_FONT + 2, fontweight="bold", va="top", ha="left"
            )
            if labels:
                self.figure.legend(
                    list(self._entries.values()),
                    [_plain(label) for label in labels],
                    loc="upper left",
                    bbox_to_anchor=(left, 1 - (_TITLE - 0.02) / height),
                    ncols=columns,
                    frameon=False,
                    fontsize=_FONT - 1,
                    borderpad=0,
                    borderaxespad=0,
                    handlelength=1.8,
                    columnspacing=1.6,
                    labelspacing=0.35,
                )
        return self

    def png(self) -> bytes:
        """The figure on white, 1,020 pixels wide."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(buffer, format="png", dpi=150, facecolor="white")
        return buffer.getvalue()

    def svg(self, prefix: str) -> str:
        """The figure as an `<svg>` element to stand in a page: its ids begin with `prefix`, and its colours are the
        page's CSS variables."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        return _for_page(buffer.getvalue(), prefix, self.title)


def _plain(text: str) -> str:
    """Text of the user's, in which matplotlib would take dollars for the bounds of a formula."""
    return text.replace("$", r"\$")


def colour_variables() -> dict[str, tuple[str, str]]:
    """The CSS variables of a page with figures: name -> (light, dark)."""
    runs = {f"--run-{i}": pair for i, pair in enumerate(RUNS)}
    return {"--ink": INK, "--muted": MUTED, "--grid": GRID, "--paper": ("#ffffff", "#171b22"), **runs}


def _for_page(svg: str, prefix: str, title: str) -> str:
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view, "matplotlib writes a viewBox"
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = re.sub(r"url\(#", f"url(#{prefix}-", rest)
    rest = re.sub(r'xlink:href="(#?)', lambda match: f'href="#{prefix}-' if match[1] else 'href="', rest)
    for name, (light, _) in colour_variables().items():
        rest = rest.replace(light, f"var({name})")
    # Path data to a hundredth of a point is far below a pixel, and a third smaller.
    rest = re.sub(r' d="[^"]*"', lambda path: re.sub(r"-?\d+\.\d{3,}", _shorter, path[0]), rest)
    return f'<svg role="img" aria-label="{html.escape(title)}" {view[0]}>{rest}'


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _exponent(value: float) -> str:
    """2.5e-3 rather than 0.0025 or 2.500e-03."""
    if not value:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value:g}" if power >= -1 else f"{value / 10.0**power:.3g}e{power}"


def spread(values: Floats) -> float:
    """The ratio of the largest to the smallest positive value; 1 if there are none."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(positive.max() / positive.min()) if len(positive) else 1.0

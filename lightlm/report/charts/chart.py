"""One plot in the house style: a PNG, and an SVG that takes its colors from the page around it."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from lightlm import files
from lightlm.quantities import format_quantity
from lightlm.report.curves import Floats

# (light, dark). Plots are drawn in the light colors; in the page a CSS variable replaces each of them.
INK, MUTED, GRID, PAPER = ("#1c2330", "#e6e9ee"), ("#5b6472", "#a3acb9"), ("#e4e7eb", "#323945"), ("#ffffff", "#171b22")
# Color-blind readers can tell these apart (after Okabe and Ito, 2008). Further runs reuse them with dashed lines.
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
# The CSS variables of a page with plots: name -> (light, dark).
COLOR_VARIABLES = {"--ink": INK, "--muted": MUTED, "--grid": GRID, "--paper": PAPER}
COLOR_VARIABLES |= {f"--run-{i}": pair for i, pair in enumerate(RUNS)}
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)))
_HATCHES = ("", "///", "xxx")  # the bars' counterpart of dashed lines
_FLOPS = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))
_SHAPES = "D^svP*hX"  # markers of published scores

PLOT_HEIGHT = 2.95  # inches, like the sizes below
_WIDTH, _LEFT, _RIGHT, _BOTTOM, _TITLE, _LEGEND_ROW = 6.8, 0.82, 0.22, 0.62, 0.46, 0.25
_LEGEND_CHARACTERS = 66  # in one row of the legend; the line before each entry takes 6
_STYLE: Any = dict(matplotlib.rc_params_from_file(Path(__file__).with_name("report.mplstyle"), False, False))
_STYLE |= {"text.color": INK[0], "grid.color": GRID[0]}
_STYLE |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED[0])
# matplotlib reads its settings when it makes a figure, a tick or a file, so each of these runs in the style.
styled = matplotlib.rc_context(_STYLE)


def compute_unit(most: float) -> tuple[float, str]:
    """Return the unit of operations for an axis up to `most`: its size and its name."""
    return next(((size, unit) for size, unit in _FLOPS if most >= size), (1.0, "FLOPs"))


def run_color(index: int) -> str:
    """Return the color of a run's curves."""
    return RUNS[index % len(RUNS)][0]


def _mean_style(run: int) -> dict[str, Any]:
    """Return how the mean of several runs is drawn, with its error bar."""
    bar = {"fmt": "o", "color": run_color(run), "elinewidth": 1.3, "capsize": 3, "zorder": 4}
    return bar | {"markersize": 6, "markerfacecolor": PAPER[0], "markeredgewidth": 1.6}


class Chart:
    """A plot with one pair of axes: fill it with `line`, `points` and so on, then `finish` and render it.

    Args:
        title: text above the axes, on the left.
        x_label, y_label: names of the axes, with units.
        name_all: show the legend even if it has only one entry.
        height: height of the axes in inches.
        left: width of what stands left of the axes, in inches.
        resumes: places on the x axis where training resumed; a dotted line marks each.
    """

    @styled
    def __init__(
        self,
        title: str,
        x_label: str,
        y_label: str,
        *,
        name_all: bool = False,
        height: float = PLOT_HEIGHT,
        left: float = _LEFT,
        resumes: Sequence[float] = (),
    ) -> None:
        self.title, self.height, self._name_all, self._resumes = title, height, name_all, resumes
        self.figure = Figure(figsize=(_WIDTH, height))
        self.axes: Axes = self.figure.subplots()
        self.axes.set_xlabel(x_label)
        self.axes.set_ylabel(_plain(y_label))
        self._entries: dict[str, Artist] = {}
        self._left, self._right = left, _RIGHT

    def _plot(self, label: str, x: Floats, y: Floats, **style: Any) -> None:
        known = np.isfinite(x) & np.isfinite(y)  # a line passes over the steps that lack the metric
        x, y = x[known], y[known]
        if not len(x):
            return
        (drawn,) = self.axes.plot(x, y, **{"marker": "o" if len(x) == 1 else "", "label": "_"} | style)
        if label:
            self._entries.setdefault(label, drawn)

    def line(self, label: str, x: Floats, y: Floats, run: int, *, style: object = None) -> None:
        """Draw a curve in a run's color."""
        dashes = style or _DASHES[run // len(RUNS) % len(_DASHES)]
        self._plot(label, x, y, color=run_color(run), linewidth=1.9, linestyle=dashes)

    def faint(self, x: Floats, y: Floats, run: int) -> None:
        """Draw the raw values behind a smoothed curve, without a legend entry."""
        self._plot("", x, y, color=run_color(run), linewidth=0.8, alpha=0.28)

    def points(self, label: str, x: Floats, y: Floats, run: int, *, joined: bool = True, mark: str = "o") -> None:
        """Draw values that only some steps have, as markers."""
        color = run_color(run)
        line = {"linewidth": 1.1, "linestyle": (0, (2, 2))} if joined else {"linewidth": 0, "linestyle": "none"}
        size, fill = (6, PAPER[0]) if mark == "o" else (7, color)
        mark_style = {"marker": mark, "markersize": size, "markerfacecolor": fill, "markeredgewidth": 1.6}
        self._plot(label, x, y, color=color, zorder=4, **line, **mark_style)

    def shapes(self, label: str, x: Floats, y: Floats, number: int) -> None:
        """Draw published values as markers in ink; each source has its own shape."""
        mark = {"marker": _SHAPES[number % len(_SHAPES)], "markersize": 7, "markerfacecolor": PAPER[0]}
        self._plot(label, x, y, color=INK[0], linestyle="none", markeredgewidth=1.4, zorder=5, **mark)

    def bars(self, label: str, x: Floats, heights: Floats, errors: Floats, run: int, width: float) -> None:
        """Draw bars in a run's color, each with an error bar unless its error is NaN."""
        hatch = _HATCHES[run // len(RUNS) % len(_HATCHES)]
        fill: dict[str, Any] = {"color": run_color(run), "hatch": hatch, "edgecolor": PAPER[0], "linewidth": 0}
        bars = self.axes.bar(x, heights, width * 0.9, **fill)
        known = np.isfinite(errors)
        style: dict[str, Any] = {"fmt": "none", "ecolor": INK[0], "elinewidth": 1.1, "capsize": 3, "zorder": 4}
        self.axes.errorbar(x[known], heights[known], errors[known], **style)
        self._entries.setdefault(label, bars[0])

    def levels(self, label: str, x: Floats, y: Floats, width: float) -> None:
        """Draw a dashed level across each group of bars."""
        ends = x - width / 2, x + width / 2
        drawn = self.axes.hlines(y, *ends, colors=MUTED[0], linestyles="dashed", linewidth=1.6, zorder=3)
        self._entries.setdefault(label, drawn)

    def band(self, x: Floats, low: Floats, high: Floats, run: int) -> None:
        """Fill the range of several curves in a run's color."""
        self.axes.fill_between(x, low, high, color=run_color(run), alpha=0.18, linewidth=0)

    def dots(self, x: Floats, values: Sequence[Sequence[float]], run: int) -> None:
        """Draw the single values behind the mean at each x."""
        at = [place for place, column in zip(x, values, strict=True) for _ in column]
        flat = [value for column in values for value in column]
        self.axes.plot(at, flat, marker="o", linestyle="none", markersize=4, color=run_color(run), alpha=0.45)

    def errors(self, x: Floats, means: Floats, spreads: Floats, run: int) -> None:
        """Draw means, each with a bar of its spread unless that is NaN."""
        style, known = _mean_style(run), np.isfinite(spreads)
        self.axes.errorbar(x[known], means[known], spreads[known], **style)
        self.axes.errorbar(x[~known], means[~known], **style)

    def row(self, row: int, values: Sequence[float], spread: float | None, run: int) -> None:
        """Draw values along a row, counted from the top, with their mean and its spread."""
        self.axes.plot(values, [row] * len(values), "o", markersize=4, color=run_color(run), alpha=0.45)
        self.axes.errorbar([float(np.mean(values))], [row], xerr=spread, **_mean_style(run))

    def rows(self, names: Sequence[str]) -> None:
        """Name the rows of `row` on the y axis."""
        self.axes.set_yticks(range(len(names)), [_plain(name) for name in names])
        self.axes.set_ylim(len(names) - 0.5, -0.5)
        self.axes.grid(False, axis="y")

    def vertical(self, x: float) -> None:
        """Draw a dashed line from top to bottom."""
        self.axes.axvline(x, color=MUTED[0], linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)

    def quantities(self, axis: str) -> None:
        """Write ticks such as 10M on the axis `x` or `y`."""
        chosen = self.axes.xaxis if axis == "x" else self.axes.yaxis
        if chosen.get_scale() == "linear":
            chosen.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        chosen.set_major_formatter(lambda number, _: format_quantity(number))
        chosen.set_minor_formatter(NullFormatter())

    def log_y(self) -> None:
        """Make y logarithmic with at least two labeled ticks, even if all values lie within one decade."""
        self.axes.set_yscale("log")
        low, high = self.axes.get_ylim()
        if high < 30 * low:
            self.axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        self.axes.yaxis.set_major_formatter("{x:g}")
        self.axes.yaxis.set_minor_formatter(NullFormatter())

    @styled
    def color_bar(self, image: AxesImage) -> None:
        """Show the scale of a heat map, whose values are multiples, in the right margin."""
        bar = self.figure.colorbar(image, cax=self.axes.inset_axes((1.02, 0, 0.025, 1)), ticks=MultipleLocator(0.5))
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter("{x:g}×")
        self._right = 0.8

    @styled
    def finish(self) -> "Chart":
        """Add the marks of resumes, title and legend, and give the figure the height that they need."""
        for x in self._resumes:  # here, since an axis without curves must stay without data
            drawn = self.axes.axvline(x, color=MUTED[0], linewidth=1.1, linestyle=(0, (1, 2)), zorder=1)
            self._entries.setdefault("resumed", drawn)
        labels = list(self._entries) if len(self._entries) > 1 or self._name_all else []
        widest = max(map(len, labels), default=1) + 6
        columns = max(min(_LEGEND_CHARACTERS // widest, len(labels)), 1)
        height = _TITLE + math.ceil(len(labels) / columns) * _LEGEND_ROW + self.height + _BOTTOM
        self.figure.set_size_inches(_WIDTH, height)
        width = _WIDTH - self._left - self._right
        self.axes.set_position((self._left / _WIDTH, _BOTTOM / height, width / _WIDTH, self.height / height))
        left = 0.16 / _WIDTH
        self.figure.suptitle(_plain(self.title), x=left, y=1 - 0.16 / height, ha="left")
        if labels:
            place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (left, 1 - (_TITLE - 0.02) / height)}
            self.figure.legend(list(self._entries.values()), list(map(_plain, labels)), ncols=columns, **place)
        return self

    @styled
    def png(self) -> bytes:
        """Return the figure on white, 1,020 pixels wide."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", facecolor="white")
        return buffer.getvalue()

    @styled
    def svg(self, prefix: str) -> str:
        """Return an `<svg>` element for a page; ids begin with `prefix`, colors are the page's CSS variables."""
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        svg = re.sub(
            r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>|<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL
        )
        opening, rest = svg[svg.index("<svg") :].strip().split(">", 1)
        view = re.search(r'viewBox="[^"]*"', opening)
        assert view, "matplotlib writes a viewBox"
        rest = re.sub(r'\b(id="|url\(#)', rf"\g<1>{prefix}-", rest)
        rest = rest.replace('xlink:href="#', f'href="#{prefix}-').replace("xlink:href", "href")
        for name, (light, _) in COLOR_VARIABLES.items():
            rest = rest.replace(light, f"var({name})")
        # Path data to a hundredth of a point: far below a pixel, and a third smaller.
        rest = re.sub(r' d="[^"]*"', lambda path: re.sub(r"-?\d+\.\d{3,}", _shorter, path[0]), rest)
        return f'<svg role="img" aria-label="{html.escape(self.title)}" {view[0]}>{rest}'


def _plain(text: str) -> str:
    """Escape the dollars of a user's text: matplotlib would read a formula between them."""
    return text.replace("$", r"\$")


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def write_charts(folder: Path, charts: Mapping[str, Chart], *, replace: bool) -> dict[str, Path]:
    """Write finished charts as NAME.png, and return the files.

    Args:
        replace: the other PNGs are plots of an earlier report, and are deleted.
    """
    if charts:
        folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.png" for name in charts}
    for name, chart in charts.items():
        files.write_bytes(paths[name], chart.png())
    for path in set(folder.glob("*.png")) - set(paths.values()) if replace else ():
        path.unlink()
    return paths

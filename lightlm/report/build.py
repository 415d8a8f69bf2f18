"""A report on disk: one page, and each figure as a PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightlm import files
from lightlm.evaluate.compare.baselines import Baseline
from lightlm.report.charts.plots import draw_plots
from lightlm.report.page import render_page
from lightlm.report.record import Record, read_records
from lightlm.runs import RUNS

_NAMED = 3  # runs that a comparison's folder is called after


@dataclass(frozen=True)
class Report:
    """What was written, and the runs it is about."""

    page: Path
    plots: dict[str, Path]
    records: list[Record]


def write_report(runs: Sequence[Path], out: Path | None = None, baselines: Sequence[Baseline] = ()) -> Report:
    """Write `report.html` and `plots/*.png` of one run or several.

    Args:
        out: the folder; the run's own, or for several runs `runs/compare-<a>-<b>`, unless given.
        baselines: models whose published figures stand beside the runs' scores.

    Raises:
        CheckpointError: a run has no metrics, or they cannot be read.
        UsageError: a run is named twice.
    """
    records = read_records(list(runs))
    folder = out or (records[0].path if len(records) == 1 else comparison_folder(records))
    plots = draw_plots(records, baselines)
    names = [record.name for record in records]
    title = f"Run {names[0]}" if len(names) == 1 else f"Comparison of {', '.join(names[:-1])} and {names[-1]}"
    page = render_page(title, records, plots, baselines)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    paths = {plot.name: folder / "plots" / f"{plot.name}.png" for plot in plots}
    for plot in plots:
        files.write_bytes(paths[plot.name], plot.chart.png())
    files.write_text(folder / "report.html", page)
    return Report(folder / "report.html", paths, records)


def comparison_folder(records: Sequence[Record]) -> Path:
    """`runs/compare-a-b`; of many runs the first few are named."""
    names = [record.path.resolve().name for record in records]
    rest = [f"and-{len(names) - _NAMED}-more"] if len(names) > _NAMED else []
    return RUNS / "-".join(["compare", *names[:_NAMED], *rest])

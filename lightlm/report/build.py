"""A report on disk: one page, and each plot as a PNG."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightlm import files
from lightlm.evaluate.compare.baselines import Baseline
from lightlm.evaluate.compare.comparison import Comparison
from lightlm.report.charts.chart import write_charts
from lightlm.report.charts.plots import draw_plots
from lightlm.report.page import render_page, shown_baselines
from lightlm.report.record import Record, read_records
from lightlm.report.scores import compare_runs
from lightlm.runs import RUNS

_NAMED = 3  # runs in the name of a comparison's folder
_LONGEST = 60  # characters of each


@dataclass(frozen=True)
class Report:
    """The files that were written, the runs they show, and every run compared with the first."""

    page: Path
    plots: dict[str, Path]
    records: list[Record]
    comparisons: list[Comparison]


def write_report(runs: Sequence[Path], out: Path | None = None, baselines: Sequence[Baseline] = ()) -> Report:
    """Write `report.html` and `plots/*.png` of one run or several.

    Args:
        out: the folder. By default the run's own; for several runs, `runs/compare-<a>-<b>`.
        baselines: models whose published scores are shown beside the runs' scores.

    Raises:
        CheckpointError: a run has no metrics, or they cannot be read.
        UsageError: a run is named twice.
    """
    records = read_records(list(runs))
    folder = out or (records[0].path if len(records) == 1 else comparison_folder(records))
    plots, comparisons = draw_plots(records, baselines), compare_runs(records)
    names = [record.name for record in records]
    title = f"Run {names[0]}" if len(names) == 1 else f"Comparison of {', '.join(names[:-1])} and {names[-1]}"
    page = render_page(title, records, plots, baselines, comparisons)
    replaced = (folder / "report.html").is_file()
    paths = write_charts(folder / "plots", {plot.name: plot.chart for plot in plots}, replace=replaced)
    files.write_text(folder / "report.html", page)
    return Report(folder / "report.html", paths, records, comparisons)


def renew_report(run: Path) -> Path:
    """Write a run's page with what is new in the run, and with the published scores that the page showed; return it.

    Raises:
        CheckpointError: as `write_report`.
    """
    page = run / "report.html"
    shown = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    return write_report([run], baselines=shown_baselines(shown)).page


def refresh_report(run: Path) -> Path | None:
    """Like `renew_report`, but None if the run has no page.

    Raises:
        CheckpointError: as `write_report`.
    """
    return renew_report(run) if (run / "report.html").is_file() else None


def comparison_folder(records: Sequence[Record]) -> Path:
    """Return `runs/compare-a-b`; of many runs, or of long names, the name has the first few and a hash of all."""
    paths = [record.path.resolve() for record in records]
    names = [path.name for path in paths]
    hashed = hashlib.sha256("/".join(map(str, paths)).encode()).hexdigest()[:6]
    shown = [name[:_LONGEST] for name in names[:_NAMED]]
    rest = [f"and-{len(names) - _NAMED}-more"] if len(names) > _NAMED else []
    clear = shown == names and {path.parent for path in paths} == {RUNS.resolve()}
    return RUNS / "-".join(["compare", *shown, *rest, *([] if clear else [hashed])])

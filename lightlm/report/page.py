"""A report as one self-contained HTML file: page.html.jinja is the page, this module its data."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lightlm import __version__
from lightlm.evaluate.compare.baselines import Baseline, find_baseline
from lightlm.evaluate.compare.comparison import Comparison
from lightlm.evaluate.compare.table import score_table
from lightlm.report.charts.chart import COLOR_VARIABLES, RUNS
from lightlm.report.charts.drawing import Plot
from lightlm.report.record import Record
from lightlm.report.scores import score_lines
from lightlm.report.summary import summary_table

_SAMPLES = 6  # of a single run, spread over its training; of several runs, each one's last
_PAGE = ("#f6f7f9", "#0f1217")  # background, light and dark
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # control characters that HTML does not allow


def render_page(
    title: str,
    records: Sequence[Record],
    plots: Sequence[Plot],
    baselines: Sequence[Baseline],
    comparisons: Sequence[Comparison],
) -> str:
    """Return the page: a table of the runs, notes, plots, scores, recipes (or their differences) and samples.

    Args:
        comparisons: every run against the first, see `lightlm.report.scores.compare_runs`.
    """
    names = [record.name for record in records]
    scores = score_table(score_lines(records), names, comparisons, baselines)
    headings, rows = summary_table(records)
    machine = dict.fromkeys(
        key for record in records for key, value in record.machine.items() if key != "earlier" and value is not None
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_allowed,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        version=__version__,
        colors=COLOR_VARIABLES | {"--page": _PAGE},
        run_colors=len(RUNS),
        names=names,
        baselines=[baseline.name for baseline in baselines],  # `shown_baselines` reads them again
        summary={"headings": ["Run", *headings], "rows": list(zip(names, rows, strict=True))},
        notes=[f"{r.name}: {note}" if len(records) > 1 else note for r in records for note in r.notes],
        plots=[(Markup(plot.chart.svg(plot.name)), plot.caption) for plot in plots],
        scores={
            "headings": scores.columns,
            "rows": [(task, cells) for task, *cells in scores.rows],
            "best": {(row, column - 1) for row, column in scores.best},  # the task is a heading
            "sentences": scores.sentences,
            "notes": scores.notes,
        },
        recipe=_recipe([dict(flatten(record.recipe)) for record in records]),
        samples=list(_samples(records)),
        machine=[(key.replace("_", " "), [_shown(r.machine.get(key)) for r in records]) for key in machine],
    )


def shown_baselines(page: str) -> list[Baseline]:
    """Return the models whose published scores a page shows."""
    names = re.search(r'<meta name="lightlm-compare" content="([^"]*)">', page)
    found = (find_baseline(name) for name in names[1].split(",")) if names else ()
    return [baseline for baseline in found if baseline is not None]  # another version may not know one


def _allowed(value: Any) -> Any:
    """Replace the control characters of a text that is not markup."""
    return _FORBIDDEN.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _recipe(flat: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Return all keys of a single recipe, or those in which several differ; `–` where a run lacks the key."""
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, [values.get(key, "–") for values in flat]) for key in keys]
    return rows if len(flat) == 1 else [(key, row) for key, row in rows if key != "name" and len(set(row)) > 1]


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested sections as (dotted key, text)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _samples(records: Sequence[Record]) -> Iterator[tuple[str, str, bool]]:
    """Yield heading, text, and whether the text is shown at first."""
    for record in records:
        last = len(record.samples) - 1
        chosen = {round(i * last / (_SAMPLES - 1)) for i in range(_SAMPLES)} if len(records) == 1 else {last}
        for i in sorted(chosen) if record.samples else []:
            step, text = record.samples[i]
            yield f"Step {step:,}" if len(records) == 1 else f"{record.name}, step {step:,}", text, i == last

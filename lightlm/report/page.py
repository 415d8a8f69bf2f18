"""A report as one HTML file that needs nothing else: style, figures and texts are in it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from lightlm import __version__
from lightlm.evaluate.compare.baselines import Baseline, Legend
from lightlm.evaluate.compare.comparison import NOISE, sentences
from lightlm.report.charts.chart import RUNS, colour_variables
from lightlm.report.charts.drawing import Plot
from lightlm.report.record import Record, Score
from lightlm.report.scores import Line, Scores
from lightlm.report.summary import summary_table

_SAMPLES = 6  # shown of one run, spread over its training; of several runs the last of each
_SAMPLE_CHARACTERS = 2000

_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:88rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
h1{font-size:1.6rem;margin:.2rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .7rem}
p{margin:.3rem 0}.quiet,figcaption,footer{color:var(--muted);font-size:.9rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:1rem}
figure{margin:0;padding:.8rem;background:var(--paper);border:1px solid var(--grid);border-radius:10px}
figure svg{display:block;width:100%;height:auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{padding:.3rem .3rem 0}
.scroll{overflow-x:auto;background:var(--paper);border:1px solid var(--grid);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .8rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
tr:last-child>*{border-bottom:0}thead th{color:var(--muted);font-weight:600;font-size:.85rem}
th:first-child,td.text{text-align:left}tbody th{font-weight:600}td.best{font-weight:700}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
pre{margin:0;padding:.8rem;white-space:pre-wrap;overflow-wrap:anywhere;
font:.88rem/1.5 ui-monospace,Menlo,Consolas,monospace}
details{background:var(--paper);border:1px solid var(--grid);border-radius:10px;margin:.5rem 0}
summary{cursor:pointer;padding:.55rem .8rem;font-weight:600}ul{padding-left:1.2rem;margin:.3rem 0}
footer{margin-top:2.5rem}
""".strip()


def render_page(
    title: str, records: Sequence[Record], plots: Sequence[Plot], baselines: Sequence[Baseline] = ()
) -> str:
    """The page: a table of the runs, notes, figures, scores, recipes (or what differs between them), samples."""
    parts = [
        f"<h1>{_text(title)}</h1>",
        _summary_table(records),
        _notes(records),
        _section("Curves", _figures(plots)),
        _section("Scores", _scores(records, baselines)),
        _section("Recipe" if len(records) == 1 else "Differences between the recipes", _recipes(records)),
        _section("Samples", _samples(records)),
        _section("Machine", _machines(records)),
        f"<footer>Made by LightLM {_text(__version__)}. Losses are nats a token; time is that of training steps, "
        "without validation and saving; the loss in the table is the moving average at the end.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>\n{_colours()}\n{_STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    """Escaped, and without the control characters that HTML forbids."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r\n", "\n")))


def _colours() -> str:
    variables = colour_variables() | {"--page": ("#f6f7f9", "#0f1217")}
    light, dark = (";".join(f"{name}:{pair[i]}" for name, pair in variables.items()) for i in (0, 1))
    return f":root{{{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{_text(heading)}</h2>\n{content}\n</section>" if content else ""


def _table(headings: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    body = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _row(name: str, cells: Iterable[str], *, dot: int | None = None) -> str:
    """A row of a table; `cells` are texts, `dot` is the number of the run that the row belongs to."""
    mark = "" if dot is None else f'<span class="dot" style="background:var(--run-{dot % len(RUNS)})"></span>'
    return (
        f'<tr><th scope="row">{mark}{_text(name)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
    )


def _summary_table(records: Sequence[Record]) -> str:
    headings, rows = summary_table(records)
    lines = (_row(record.name, row, dot=i) for i, (record, row) in enumerate(zip(records, rows, strict=True)))
    return _table(["Run", *headings], lines)


def _notes(records: Sequence[Record]) -> str:
    several = len(records) > 1
    notes = [f"{record.name}: {note}" if several else note for record in records for note in record.notes]
    return _list(notes, "quiet")


def _figures(plots: Sequence[Plot]) -> str:
    figures = (
        f"<figure>\n{plot.chart.svg(plot.name)}\n"
        + (f"<figcaption>{_text(plot.caption)}</figcaption>\n" if plot.caption else "")
        + "</figure>"
        for plot in plots
    )
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _scores(records: Sequence[Record], baselines: Sequence[Baseline]) -> str:
    """Tasks by runs and published figures, and the runs compared in words; of two the better beyond noise in bold."""
    scores = Scores(records)
    if not scores.lines:
        return ""
    names = [record.name for record in records] if len(records) > 1 else ["Value"]
    comparisons = scores.comparisons()
    winners = {(one.task, one.metric): one.winner for one in comparisons} if len(records) == 2 else {}
    legend = Legend()
    rows = []
    for line in scores.lines:
        best = winners.get((line.task, line.metric)) if len(line.scores) == 2 else None
        cells = f'<td class="text">{_text(line.metric)}</td><td>{line.documents}</td>'
        for i in range(len(records)):
            kind = ' class="best"' if i == best else ""
            cells += f"<td{kind}>{_text(_score(line.scores[i])) if i in line.scores else ''}</td>"
        cells += "".join(f"<td>{_text(_published(baseline, line, legend))}</td>" for baseline in baselines)
        rows.append(f'<tr><th scope="row">{_text(line.task)}</th>{cells}</tr>')
    table = _table(["Task", "Metric", "Documents", *names, *(baseline.name for baseline in baselines)], rows)
    noise = [NOISE] if any(comparison.difference for comparison in comparisons) else []
    return table + _list(sentences(comparisons)) + _list([*noise, *legend.lines(baselines)], "quiet")


def _score(score: Score) -> str:
    error = "" if score.row.stderr is None else f" ± {score.row.stderr:.4f}"
    step = "" if score.step is None else f" (step {score.step:,})"
    return f"{score.row.value:.4f}{error}{step}"


def _published(baseline: Baseline, line: Line, legend: Legend) -> str:
    """The baseline's figure in this row, or a dash."""
    score = next(iter(line.scores.values()))
    figures = baseline.find(line.task, line.metric)
    return legend.cell(figures[0], score.protocol.num_fewshot, score.limit) if figures else "–"


def _list(items: Sequence[str], kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f"<ul{style}>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>" if items else ""


def _recipes(records: Sequence[Record]) -> str:
    """The whole recipe of one run, or the keys in which several differ."""
    flat = [dict(flatten(record.recipe)) for record in records]
    if len(records) == 1:
        rows = [_row(key, [value]) for key, value in flat[0].items()]
        table = _table(["Key", "Value"], rows)
        return f"<details><summary>{len(rows)} settings</summary>{table}</details>" if rows else ""
    rows = [_row(key, values) for key, values in differences(flat).items()]
    if not rows:
        return "<p>None.</p>"
    return _table(["Key", *(record.name for record in records)], rows)


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested sections as (dotted key, text)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def differences(flat: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """The keys whose values are not the same everywhere, with each run's; `–` where a run lacks the key."""
    keys = dict.fromkeys(key for values in flat for key in values)
    found = {key: [values.get(key, "–") for values in flat] for key in keys if key != "name"}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _samples(records: Sequence[Record]) -> str:
    if len(records) == 1:
        samples = records[0].samples
        last = len(samples) - 1
        chosen = sorted({round(i * last / (_SAMPLES - 1)) for i in range(_SAMPLES)}) if samples else []
        texts = [(f"Step {samples[i][0]:,}", samples[i][1], i == last) for i in chosen]
    else:
        having = [record for record in records if record.samples]
        texts = [(f"{r.name}, step {r.samples[-1][0]:,}", r.samples[-1][1], True) for r in having]
    return "\n".join(
        f"<details{' open' if shown else ''}><summary>{_text(heading)}</summary>"
        f"<pre>{_text(text[:_SAMPLE_CHARACTERS])}{' …' if len(text) > _SAMPLE_CHARACTERS else ''}</pre></details>"
        for heading, text, shown in texts
    )


def _machines(records: Sequence[Record]) -> str:
    keys = dict.fromkeys(key for record in records for key in record.machine)
    rows = [
        _row(key.replace("_", " "), ["" if (value := r.machine.get(key)) is None else str(value) for r in records])
        for key in keys
    ]
    headings = ["", *(record.name for record in records)]
    return _table(headings, rows) if rows else ""

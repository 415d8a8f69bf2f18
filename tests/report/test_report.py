"""Whole reports, from run folders to files."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lightlm.errors import CheckpointError
from lightlm.report.build import comparison_folder, write_report
from lightlm.report.charts.plots import draw_plots
from lightlm.report.record import read_records
from tests.corpus import TINY_RECIPE
from tests.report.run_folder import rows, write_extras, write_run

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects what the page refers to."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.links, self.ids, self.tags, self.text = [], [], [], set(), ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The report of two runs of different lengths, settings and metrics."""
    folder = tmp_path_factory.mktemp("compared")
    short = write_run(folder / "short", rows(8))
    write_extras(short)
    metrics = rows(40, last_loss=2.5, **{"lr_embedding": 0.3, "memory": 2**31, "moe/load": [[1, 3], [2, 2]]})
    metrics[20] |= {"spike": True, "skipped": True, "loss": None, "grad_norm": 30.0}
    long = write_run(folder / "long", metrics, recipe=TINY_RECIPE.replace("lr: 1e-2", "lr: 2e-2"))
    return write_report([short, long], folder / "out")


def test_the_page_is_whole_and_needs_nothing_else(compared):
    text = compared.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links, "figures refer to their own parts"
    inside = {f"#{name}" for name in page.ids}
    assert {link for link in page.links if not link.startswith("data:")} <= inside
    assert len(page.ids) == len(inside), "two figures share an id"
    assert "http" not in text
    assert not re.search(r"@import|@font-face|<script", text)
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_texts_of_models_are_escaped(compared):
    page = Page(compared.page.read_text(encoding="utf-8"))
    assert not page.tags & {"b", "script"}
    assert 'The <b>old</b> clock & "quote" </pre><script>alert(1)</script> \ufffd' in page.text


def test_figures_scores_and_differences_of_both_runs_are_there(compared):
    page = Page(compared.page.read_text(encoding="utf-8"))
    for text in ("short", "long", "0.3125 ± 0.0100 (step 5)", "optimizer.lr", "0.01", "0.02", "28.8K"):
        assert text in page.text, text
    assert "optimizer.weight_decay" not in page.text
    assert "long: 1 loss spike, 1 skipped." in page.text
    assert "short: Not at its end: 2,048 of 5,120 tokens (40%)." in page.text


def test_plots_are_images_with_both_runs_in_them(compared):
    assert {"loss", "loss_over_time", "loss_log", "learning_rate", "grad_norm", "throughput", "val_bpb"} <= set(
        compared.plots
    )
    assert {"memory", "moe_load_1", "moe_load_over_time_1"} <= set(compared.plots)
    assert not {"mfu", "data_wait"} & set(compared.plots)
    for path in compared.plots.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            width, height = image.size
            assert 900 < width < 1200
            assert 450 < height < 900
            colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
        assert len(colors) > 20, f"{path} is empty"
        if path.stem == "loss":
            assert {(0x0B, 0x64, 0xB4), (0xD1, 0x56, 0x0B)} <= colors


def test_overlaid_curves_end_where_their_runs_end(compared):
    loss = next(plot for plot in draw_plots(compared.records) if plot.name == "loss")
    ends = {line.get_color(): line.get_xdata()[-1] for line in loss.chart.axes.lines if line.get_linewidth() > 1.5}
    assert list(ends.values()) == [8 * 256, 40 * 256]
    validation = next(line for line in loss.chart.axes.lines if line.get_marker() == "o")
    assert validation.get_xdata().tolist() == [5 * 256]
    assert validation.get_ydata().tolist() == pytest.approx([6 - 3 * 4 / 7 + 0.25])


def test_a_mixture_has_a_validation_loss_per_folder(tmp_path):
    metrics = [row | ({"val_loss/a": 2.0, "val_loss/b": 3.0} if "val_loss" in row else {}) for row in rows(10)]
    plots = {plot.name: plot for plot in draw_plots(read_records([write_run(tmp_path / "run", metrics)]))}
    lines = plots["val_loss_by_source"].chart.axes.lines
    assert [line.get_ydata().tolist() for line in lines] == [[2.0, 2.0], [3.0, 3.0]]
    assert "val_loss_by_source" not in {
        plot.name for plot in draw_plots(read_records([write_run(tmp_path / "plain", rows(10))]))
    }


@pytest.mark.parametrize(("seconds", "label", "end"), [(100, "s", 100), (1200, "min", 20), (36_000, "h", 10)])
def test_time_is_in_the_unit_that_the_longest_run_asks_for(tmp_path, seconds, label, end):
    metrics = [row | {"seconds": seconds * row["step"] / 4} for row in rows(4)]
    records = read_records([write_run(tmp_path / "run", metrics)])
    plot = next(plot for plot in draw_plots(records) if plot.name == "loss_over_time")
    assert plot.chart.axes.get_xlabel() == f"training time ({label})"
    assert plot.chart.axes.lines[0].get_xdata()[-1] == end


def test_names_that_mean_something_to_matplotlib_or_html_stay_as_they_are(tmp_path):
    names = ["_a$^{$", "<b>&$"]
    report = write_report([write_run(tmp_path / name, rows(2)) for name in names], tmp_path / "out")
    page = Page(report.page.read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert all(name in page.text for name in names)
    loss = draw_plots(report.records)[0].chart
    assert [text.get_text().replace("\\$", "$") for text in loss.figure.legends[0].get_texts()] == names


def test_summary_figures(compared):
    short, long = (record.summary() for record in compared.records)
    assert (short["parameters"], short["tokens"], short["step"], short["planned_tokens"]) == (28_832, 2048, 8, 5120)
    assert short["tokens_per_second"] == pytest.approx(512)
    assert short["hours"] == pytest.approx(4 / 3600)
    assert short["val_loss"] == pytest.approx(6 - 3 * 4 / 7 + 0.25)
    assert long["loss"] == pytest.approx(2.5 + 3.5 / 39 / 3, abs=1e-4)  # a third of a step behind: 40/30 steps back
    assert (long["spikes"], long["data"], long["device"]) == (1, "tiny", None)


@pytest.mark.parametrize(
    "metrics",
    [
        rows(1, every=9),
        [{"step": 1, "tokens": 4, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.0, "seconds": 0.0}],
        [{"step": 1, "tokens": 4}, {"step": 2, "tokens": 8, "unknown": {"a": 1}, "eval/x": "text"}],
        [{"step": 1, "tokens": 4, "grad_norm": 0.0, "tokens_per_second": 0.0, "moe/dead_experts": 0, "loss": 0.0}],
    ],
    ids=["one step", "no finite values", "no known metrics", "zeros"],
)
def test_runs_with_little_in_them_still_get_a_page(tmp_path, metrics):
    report = write_report([write_run(tmp_path / "poor", metrics)])
    Page(report.page.read_text(encoding="utf-8"))
    assert report.page == tmp_path / "poor/report.html"


def test_a_recipe_of_another_version_costs_only_the_parameters(tmp_path):
    run = write_run(tmp_path / "old", rows(2), recipe=TINY_RECIPE + "future: {a: 1}\n")
    (record,) = read_records([run])
    assert record.parameters == {}
    assert record.recipe["future"] == {"a": 1}
    assert "future" in record.notes[0]


@pytest.mark.parametrize(
    ("text", "message"), [("", "holds no steps yet"), ('{"step": 1}\n', "no steps"), ('{"step": 1, }\n', "is damaged")]
)
def test_a_run_without_metrics_is_refused(tmp_path, text, message):
    run = write_run(tmp_path / "empty", [])
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        write_report([run])
    assert not (run / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [write_run(tmp_path / place / "demo", rows(2)) for place in ("a", "b")]
    assert [record.name for record in read_records(runs)] == [run.as_posix() for run in runs]


def test_comparisons_have_folders_that_every_system_can_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = [write_run(tmp_path / "runs" / name, rows(2)) for name in ("a", "b")]
    assert comparison_folder(read_records(named)) == Path("runs/compare-a-b")
    cells = [[write_run(tmp_path / sweep / f"{'x' * 76}{n}", rows(2)) for n in range(4)] for sweep in ("s", "t")]
    few, many = ([comparison_folder(read_records(paths[:count])).name for paths in cells] for count in (2, 4))
    assert len({*few, *many}) == 4  # those of one sweep do not replace the other's
    assert max(map(len, (*few, *many))) < 255


def test_a_report_leaves_no_plots_of_the_one_that_it_replaces(tmp_path):
    loaded = {"moe/load": [[1, 3], [2, 2]]}
    runs = write_run(tmp_path / "moe", rows(3, **loaded)), write_run(tmp_path / "dense", rows(3))
    (tmp_path / "out" / "plots").mkdir(parents=True)
    (tmp_path / "out" / "plots" / "mine.png").write_bytes(b"")
    before = set(write_report([runs[0]], tmp_path / "out").plots.values())
    assert (tmp_path / "out" / "plots" / "mine.png").is_file()  # the folder was no report's
    after = set(write_report([runs[1]], tmp_path / "out").plots.values())
    assert after < before
    assert set((tmp_path / "out" / "plots").iterdir()) == after


def test_machines_of_earlier_steps_and_what_is_unknown_are_no_rows(tmp_path):
    run = write_run(tmp_path / "moved", rows(2))
    machine = {
        "processor": "Neumann",
        "working_directory_commit": None,
        "earlier": [{"processor": "Zuse", "after_step": 0}],
    }
    (run / "machine.json").write_text(json.dumps(machine), encoding="utf-8")
    page = write_report([run]).page.read_text(encoding="utf-8")
    assert "Neumann" in page
    assert "Zuse" not in page
    assert "working directory commit" not in page


def test_a_file_without_results_becomes_a_note(tmp_path):
    run = write_run(tmp_path / "run", rows(2))
    (run / "eval").mkdir()
    (run / "eval/other.json").write_text(json.dumps([1, 2]), encoding="utf-8")
    (record,) = read_records([run])
    assert record.scores == []
    assert "other.json does not hold lm-eval's results" in " ".join(record.notes)


def test_a_runs_speed_is_read_beside_the_processes_that_made_it(tmp_path):
    one, eight = write_run(tmp_path / "one", rows(3)), write_run(tmp_path / "eight", rows(3))
    (one / "machine.json").write_text('{"device": "H100"}', encoding="utf-8")  # of a version that did not write it
    (eight / "machine.json").write_text('{"device": "H100", "processes": 8}', encoding="utf-8")
    assert [record.summary()["device"] for record in read_records([one, eight])] == ["H100", "8 x H100"]


def test_scheduled_settings_are_drawn_as_they_are(tmp_path):
    metrics = [row | {"momentum": 0.9 + 0.001 * row["step"]} for row in rows(9)]
    records = read_records([write_run(tmp_path / "plain", rows(9)), write_run(tmp_path / "scheduled", metrics)])
    charts = {plot.name: plot.chart for plot in draw_plots(records)}
    assert "weight_decay" not in charts
    (line,) = charts["momentum"].axes.lines
    assert list(line.get_ydata()) == [row["momentum"] for row in metrics]


def test_resumes_are_marked_and_named(tmp_path):
    metrics = rows(40)
    metrics[9] |= {"resumed": True}
    metrics[29] |= {"resumed": True}
    [record] = read_records([write_run(tmp_path / "run", metrics)])
    assert "Resumed after steps 9, 29." in record.notes
    charts = {plot.name: plot.chart for plot in draw_plots([record])}
    marks = [
        line for line in charts["loss"].axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) > 1
    ]
    assert [line.get_xdata()[0] for line in marks] == [9 * 256, 29 * 256]
    assert "mfu" not in charts  # a mark without a curve is not data

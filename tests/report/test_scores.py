"""Scores in a report: bars, published figures, and runs compared from what their evaluations left."""

import html
import json

import numpy as np
import pytest

from lightlm.evaluate.compare.baselines import find_baseline
from lightlm.evaluate.results.documents import Document, documents_file, write
from lightlm.evaluate.settings import Settings
from lightlm.report.build import refresh_report, renew_report, write_report
from lightlm.report.charts.plots import draw_plots
from lightlm.report.record import read_records
from lightlm.report.scores import compare_runs
from tests.report.run_folder import rows, write_run

N = 200


def write_scores(run, tasks, *, shots=0, limit=None, facts=None, documents=True, suffix=""):
    """Write results as `lightlm eval` does; `tasks` gives the number of right documents of each task."""
    (run / "eval").mkdir(exist_ok=True)
    path = run / "eval" / f"step_000005_{'+'.join(tasks)}{limit or ''}_{shots}shot{suffix}.json"
    results, found = {}, []
    count = limit or N
    for task, right in tasks.items():
        share = right / count
        error = (share * (1 - share) / (count - 1)) ** 0.5
        results[task] = {"alias": task, "acc,none": share, "acc_stderr,none": error}
        found += [Document(task, i, f"{task}{i}", {"acc": float(i < right)}) for i in range(count)]
    document = {
        "results": results,
        "n-samples": {task: {"original": N, "effective": count} for task in tasks},
        "higher_is_better": {task: {"acc": True} for task in tasks},
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, shots),
        "config": {"limit": limit},
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    path.with_suffix(".meta.json").write_text(json.dumps(facts or {"dtype": "float32"}), encoding="utf-8")
    if documents:
        write(documents_file(path), found)


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / name, rows(5)) for name in ("first", "second")]


def comparisons_of(runs):
    return compare_runs(read_records(runs))


def page_of(runs, tmp_path, baselines=()):
    return write_report(runs, tmp_path / "out", baselines).page.read_text(encoding="utf-8")


def test_only_a_difference_beyond_noise_is_bold_and_called_better(runs, tmp_path):
    write_scores(runs[0], {"winogrande": 100, "piqa": 100})
    write_scores(runs[1], {"winogrande": 130, "piqa": 103})
    text = page_of(runs, tmp_path)
    assert "second is better than first at winogrande acc by 15.0 points (95% interval 10.0 to 20.0, p &lt;" in text
    assert "second against first: no difference beyond noise at piqa acc (1.5 points better, 95%" in text
    assert text.count('class="best"') == 1
    assert '<td class="best">0.6500 ± 0.0338 (step 5)</td>' in text


def test_published_figures_stay_when_a_run_or_an_evaluation_writes_its_page_anew(runs):
    write_scores(runs[0], {"piqa": 100})
    for refresh in (renew_report, refresh_report):
        write_report(runs[:1], baselines=[find_baseline("gpt2"), find_baseline("pythia-160m")])
        refresh(runs[0])
        text = (runs[0] / "report.html").read_text(encoding="utf-8")
        assert '<th scope="col">gpt2-124m</th>' in text
        assert '<th scope="col">pythia-160m</th>' in text
    write_report(runs[:1])
    assert "gpt2-124m" not in refresh_report(runs[0]).read_text(encoding="utf-8")
    assert refresh_report(runs[1]) is None


def test_runs_are_compared_on_the_documents_that_both_have(runs):
    write_scores(runs[0], {"piqa": 100})
    write_scores(runs[0], {"piqa": 20}, limit=50)
    write_scores(runs[1], {"piqa": 40}, limit=50)
    [comparison] = comparisons_of(runs)
    assert (comparison.documents, comparison.winner) == (50, 1)
    assert comparison.difference.value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"limit": 150}, "different documents (200 and 150)"),
        ({"shots": 5}, "0 and 5 examples in the prompt"),
        ({"documents": False}, "second has no scores per document"),
    ],
)
def test_what_cannot_be_compared_says_why(runs, settings, reason):
    write_scores(runs[0], {"piqa": 100})
    write_scores(runs[1], {"piqa": 140}, **settings)
    [comparison] = comparisons_of(runs)
    assert comparison.difference is None
    assert reason in comparison.sentence()


def test_figures_with_examples_in_the_prompt_are_a_line_of_their_own(runs, tmp_path):
    write_scores(runs[0], {"piqa": 100})
    write_scores(runs[0], {"piqa": 120}, shots=5)
    text = page_of(runs[:1], tmp_path)
    assert "<td>200</td><td>0.5000</td><td>0.5000 ±" in text
    assert "<td>200, 5-shot</td><td>0.5000</td><td>0.6000 ±" in text


def test_the_figure_of_other_documents_is_not_marked_as_better(runs, tmp_path):
    for run, right, few in ((runs[0], 100, 35), (runs[1], 140, 20)):
        write_scores(run, {"piqa": right})
        write_scores(run, {"piqa": few}, limit=50)
    text = page_of(runs, tmp_path)
    assert "second is better than first at piqa acc by 20.0 points" in text
    assert text.count('class="best"') == 1
    assert '<td class="best">0.7000 ± 0.0325 (step 5)</td>' in text


def test_p_values_are_adjusted_for_all_pairs_of_a_page(tmp_path):
    runs = [write_run(tmp_path / name, rows(5)) for name in ("first", "second", "third")]
    for run, right in zip(runs, (100, 106, 107), strict=True):
        write_scores(run, {"piqa": right})
    found = comparisons_of(runs)
    expected = holm_of_two([one.difference.p_value for one in found])
    assert [one.p_value for one in found] == pytest.approx(expected)
    assert found[1].p_value > 1.9 * found[1].difference.p_value


def holm_of_two(p_values):
    """Return Holm's adjusted p-values of two, from the definition."""
    low, high = sorted(p_values)
    adjusted = {low: 2 * low, high: max(2 * low, high)}
    return [adjusted[p_value] for p_value in p_values]


def test_scores_with_other_settings_are_lines_of_their_own(runs, tmp_path):
    write_scores(runs[0], {"piqa": 100})
    chosen = Settings(["piqa"], dtype="bfloat16", bos="yes", data="data/other", include_path="tasks").chosen
    write_scores(runs[0], {"piqa": 140}, facts={"dtype": "bfloat16", "chosen": chosen}, suffix="_bos")
    text = page_of(runs[:1], tmp_path)
    assert "<td>200</td><td>0.5000</td><td>0.5000 ±" in text
    label = "200, bfloat16, with a beginning-of-text token, data other, tasks of tasks"
    assert f"<td>{label}</td><td>0.5000</td><td>0.7000 ±" in text
    assert chart_of(runs[:1]).chart.axes.patches[0].get_height() == 0.5


def test_another_precision_is_noted(runs):
    write_scores(runs[0], {"piqa": 100})
    write_scores(runs[1], {"piqa": 140}, facts={"dtype": "bfloat16"})
    assert "float32 against bfloat16" in comparisons_of(runs)[0].sentence()


def test_a_token_before_every_context_is_noted_whichever_it_is(runs):
    def bos(token):
        return {"bos": {"setting": "auto", "before_contexts": token, "without_context": {"id": 0, "token": "x"}}}

    write_scores(runs[0], {"piqa": 100}, facts=bos([{"id": 1, "token": "<s>"}]))
    write_scores(runs[1], {"piqa": 140}, facts=bos([]))
    assert "BOS yes against no" in comparisons_of(runs)[0].sentence()
    write_scores(runs[1], {"piqa": 140}, facts=bos([{"id": 7, "token": "<bos>"}]))
    assert "BOS" not in comparisons_of(runs)[0].sentence()


def test_damaged_documents_do_not_stop_a_report(runs, tmp_path):
    for run in runs:
        write_scores(run, {"piqa": 100})
    next((runs[1] / "eval").glob("*.documents.jsonl")).write_text("{", encoding="utf-8")
    assert "second has no scores per document" in page_of(runs, tmp_path)


def chart_of(runs, baselines=(), name="scores"):
    return next(plot for plot in draw_plots(read_records(runs), baselines) if plot.name == name)


def test_bars_have_their_heights_errors_chance_and_published_marks(runs):
    write_scores(runs[0], {"winogrande": 100, "boolq": 120})
    write_scores(runs[1], {"winogrande": 110, "boolq": 90})
    plot = chart_of(runs, [find_baseline("mobilellm-125m")])
    axes = plot.chart.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.5, 0.6, 0.55, 0.45])
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    errors = [line for container in axes.containers if hasattr(container, "has_yerr") for line in container[2]]
    low, high = errors[0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(1.96 * (0.25 / (N - 1)) ** 0.5)
    levels = next(c for c in axes.collections if c not in errors)
    assert [segment[0][1] for segment in levels.get_segments()] == [0.5, 0.6217]
    marks = next(line for line in axes.lines if line.get_marker() == "D")
    assert marks.get_ydata().tolist() == pytest.approx([0.531, 0.602])
    assert np.round(marks.get_xdata()).tolist() == [0, 1]
    named = [text.get_text() for text in plot.chart.figure.legends[0].get_texts()]
    assert named == ["first", "second", "chance", "mobilellm-125m, published*"]
    assert "boolq 62.2%, the answer yes to all questions" in plot.caption
    assert "95% intervals" in plot.caption
    assert "protocols that are not the runs'" in plot.caption


def test_published_figures_have_a_column_and_a_legend(runs, tmp_path):
    write_scores(runs[0], {"winogrande": 100, "other": 90})
    text = page_of(runs[:1], tmp_path, [find_baseline("mobilellm-125m")])
    assert "<td>0.531* (a)</td>" in text
    assert "<td>–</td>" in text
    assert "(a) MobileLLM README: MobileLLM's own script, 0-shot, metric not stated" in html.unescape(text)


def test_many_tasks_share_several_charts_evenly(runs):
    tasks = [f"blimp_a_rather_long_name_{i}" for i in range(7)]
    write_scores(runs[0], {task: 100 + i for i, task in enumerate(tasks)})
    plots = [chart_of(runs[:1], name=name) for name in ("scores", "scores_2")]
    assert [len(plot.chart.axes.patches) for plot in plots] == [3, 4]
    plots[0].chart.png()


def test_runs_without_scores_have_no_bars(runs):
    assert not [plot for plot in draw_plots(read_records(runs)) if plot.name.startswith("scores")]


def test_scores_of_the_last_weights_beside_an_average_are_left_out(runs, tmp_path):
    write_scores(runs[0], {"piqa": 100})
    write_scores(runs[0], {"winogrande": 100}, facts={"dtype": "float32", "weights": {"raw.safetensors": "0"}})
    first, _ = read_records(runs)
    assert [score.row.task for score in first.scores] == ["piqa"]


def test_a_run_that_patience_ended_is_not_called_unfinished(tmp_path):
    ended = rows(5)
    ended[-1]["stopped_early"] = True
    assert read_records([write_run(tmp_path / "patient", ended)])[0].notes[0].startswith("Ended by train.patience at")

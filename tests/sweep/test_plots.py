"""What the plots of a sweep show."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightlm.report.curves import Curves
from lightlm.sweep import plots
from lightlm.sweep.cells import Contestant, grid
from lightlm.sweep.plots import values_chart, write_plots
from lightlm.sweep.table import Line, Results
from lightlm.sweep.values import read_settings


def results(path, settings, seeds=(1, 2)):
    """The results of a grid in which the loss is that of its place, plus a hundredth of the seed."""
    lines, curves = [], {}
    for number, entry in enumerate(grid("demo", read_settings(settings))):
        finals = {seed: 3 - number / 10 + seed / 100 for seed in seeds}
        lines.append(Line(entry, finals, dict.fromkeys(seeds, "done"), 100.0, 2.0 * (1 + number), None, "noise"))
        curves[entry.name] = {
            seed: Curves(
                {"step": s, "tokens": 50 * s, "seconds": s * (1.0 + number), "loss": 4.0, "val_loss": final + 2 - s}
                for s in (1, 2)
            )
            for seed, final in finals.items()
        }
    return Results(Path(path), "val_loss", lines[0].contestant.name, lines, curves)


def test_numbers_are_an_axis_logarithmic_if_they_span_a_decade_and_other_keys_are_curves(tmp_path):
    chart = values_chart(results(tmp_path, ["optimizer.lr=1e-3,1e-2,3e-3", "optimizer.name=adamw,muon"]))
    axes = chart.finish().axes
    assert axes.get_xscale() == "log"
    assert sorted(zip(axes.get_xticks(), (t.get_text() for t in axes.get_xticklabels()), strict=True)) == [
        *((1e-3, "1e-3"), (3e-3, "3e-3"), (1e-2, "1e-2"))
    ]
    legend = [text.get_text() for text in chart.figure.legends[0].get_texts()]
    assert legend == ["name=adamw", "name=muon"]
    curve = next(line for line in axes.lines if line.get_linewidth() == 1.9)
    np.testing.assert_allclose(curve.get_xdata(), [1e-3, 3e-3, 1e-2])  # sorted
    np.testing.assert_allclose(curve.get_ydata(), [3.015, 2.615, 2.815])


def test_numbers_within_a_decade_have_a_linear_axis(tmp_path):
    chart = values_chart(results(tmp_path, ["model.num_layers=4,8,6"], seeds=(1,)))
    assert chart.axes.get_xscale() == "linear"


@pytest.mark.parametrize("settings", [["schedule.name=wsd,cosine"], ["optimizer.betas=[0.9,0.95],[0.9,0.99]"]])
def test_other_values_are_rows_in_the_order_of_the_table(tmp_path, settings):
    found = results(tmp_path, settings)
    chart = values_chart(found).finish()
    assert [tick.get_text() for tick in chart.axes.get_yticklabels()] == [line.contestant.name for line in found.lines]
    low, high = chart.axes.get_ylim()
    assert low > high  # the first row is on top


def test_files_are_written_and_time_is_drawn_where_it_differs(tmp_path):
    paths = write_plots(results(tmp_path, ["optimizer.lr=1e-3,1e-2"]))
    assert sorted(paths) == ["curves", "curves_over_time", "values"]
    for path in paths.values():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(write_plots(results(tmp_path, ["optimizer.lr=1e-3"]))) == ["curves", "values"]


def test_without_a_finished_run_nothing_is_drawn(tmp_path):
    line = Line(Contestant("a", "demo"), {}, {1: "waiting"}, None, None, None, "baseline")
    assert write_plots(Results(tmp_path, "val_loss", "a", [line], {"a": {}})) == {}


def test_compute_is_an_axis_where_models_differ(tmp_path):
    found = results(tmp_path, ["model.num_layers=4,8"])
    with_flops = replace(found, flops={"num_layers=4": 1e9, "num_layers=8": 2e9})
    chart = plots._learning_curves(with_flops)["curves_over_compute"]
    assert chart.axes.get_xlabel() == "training GFLOPs"
    ends = [line.get_xdata()[-1] for line in chart.axes.lines if line.get_linewidth() == 1.9]
    np.testing.assert_allclose(ends, [100, 200])  # 100 tokens each


def test_a_metric_of_the_end_only_is_replaced_by_the_training_loss(tmp_path):
    chart = plots._learning_curves(replace(results(tmp_path, ["optimizer.lr=1e-3,1e-2"]), metric="val_bpb"))["curves"]
    assert chart.axes.get_ylabel() == "training loss (nats per token), smoothed"


def test_bands_span_the_seeds(tmp_path):
    chart = plots._learning_curves(results(tmp_path, ["optimizer.lr=1e-3,1e-2"], seeds=(1, 3)))["curves"]
    band = chart.axes.collections[0].get_paths()[0].vertices
    first = band[band[:, 0] == 50][:, 1]
    assert (first.min(), first.max()) == pytest.approx((4.01, 4.03))
    np.testing.assert_allclose(chart.axes.lines[0].get_ydata(), [4.02, 3.02])

"""Plots of a mixture of experts, as drawn."""

import numpy as np
import pytest

from lightlm.quantities import format_quantity
from lightlm.report.charts.plots import draw_plots
from lightlm.report.record import read_records
from lightlm.report.summary import summary_table
from tests.corpus import TINY_RECIPE
from tests.report.run_folder import rows, write_run

LAYERS, EXPERTS, STEPS = 4, 6, 40
RECIPE = TINY_RECIPE.replace(
    "num_layers: 2",
    "num_layers: 5, first_k_dense: 1, num_experts: 6, num_experts_per_tok: 2, moe_intermediate_size: 8",
)


def loads(seed=0, steps=STEPS, layers=LAYERS, experts=EXPERTS):
    """Return loads by step: each layer prefers other experts, less and less over the run."""
    rng = np.random.default_rng(seed)
    lean = rng.normal(size=(layers, experts))
    found = []
    for step in range(steps):
        share = np.exp(lean * 2 * (1 - step / steps))
        found.append(np.round(512 * share / share.sum(1, keepdims=True)).astype(int))
    return np.stack(found)


def write_experts(path, load_SLE, *, dead=0, recipe=RECIPE):
    """Write a run with lists in every second step, like a longer run."""
    metrics = rows(len(load_SLE))
    for row, load_LE in zip(metrics, load_SLE, strict=True):
        violation = load_LE.max(1) / load_LE.mean(1) - 1
        row |= {
            "moe/violation": violation.mean(), "moe/violation_worst": violation.max(),
            "moe/dead_experts": dead, "moe/dropped": 0,
        }  # fmt: skip
        if row["step"] % 2 == 0:
            row |= {"moe/load": load_LE.tolist(), "moe/layer_violation": violation.tolist()}
    return write_run(path, metrics, recipe=recipe)


def plots(*runs):
    return {plot.name: plot for plot in draw_plots(read_records(list(runs)))}


def tick_labels(ticks):
    low, high = sorted(ticks.get_view_interval())
    return [round(place) for place in ticks.get_major_locator()() if low <= place <= high]


def test_the_newest_loads_are_multiples_of_an_equal_share_by_layer_and_expert(tmp_path):
    load = loads()
    plot = plots(write_experts(tmp_path / "run", load))["moe_load"]
    [image] = plot.chart.axes.images
    np.testing.assert_allclose(image.get_array(), load[-1] / load[-1].mean(1, keepdims=True))
    assert image.get_clim() == (0, 2)
    assert tick_labels(plot.chart.axes.yaxis) == [1, 2, 3, 4]  # block 0 is dense
    assert tick_labels(plot.chart.axes.xaxis) == [0, 1, 2, 3, 4, 5]
    assert "step 40" in plot.caption


def test_loads_over_time_show_each_layers_experts_the_busiest_on_top(tmp_path):
    load = loads()
    plot = plots(write_experts(tmp_path / "run", load))["moe_load_over_time"]
    [image] = plot.chart.axes.images
    drawn = image.get_array().reshape(LAYERS, EXPERTS, -1)
    # 200 columns over 40 steps of 256 tokens: ten for each step that has lists.
    assert drawn.shape[2] == 200
    assert image.get_extent() == [0, 40 * 256, 4.5, 0.5]  # layers 1 to 4, the first on top
    relative = load[1::2] / load[1::2].mean(2, keepdims=True)
    order = relative.mean(0).argsort(1)[:, ::-1]
    for column in (0, 9, 10, 105, 199):
        expected = np.take_along_axis(relative[column // 10], order, axis=1)
        np.testing.assert_allclose(drawn[:, :, column], expected)
    assert np.all(np.diff(drawn.mean(2), axis=1) <= 0)
    assert tick_labels(plot.chart.axes.yaxis) == [1, 2, 3, 4]


def test_a_column_of_a_long_run_is_the_mean_of_its_steps(tmp_path):
    load = loads(steps=1000)
    drawn = plots(write_experts(tmp_path / "run", load))["moe_load_over_time"].chart.axes.images[0].get_array()
    relative = load / load.mean(2, keepdims=True)
    order = relative[1::2].mean(0).argsort(1)[:, ::-1]
    expected = np.take_along_axis(relative[[995, 997, 999]].mean(0), order, axis=1)  # steps 996, 998 and 1,000
    np.testing.assert_allclose(drawn[:, -1].reshape(LAYERS, EXPERTS), expected, rtol=1e-6)


def test_violation_of_one_run_has_a_line_for_each_layer_their_mean_and_the_worst(tmp_path):
    load = loads()
    load[:, :, 0] = 400
    chart = plots(write_experts(tmp_path / "run", load))["moe_violation"].chart
    faint = [line for line in chart.axes.lines if line.get_linewidth() < 1]
    violation = load.max(2) / load.mean(2) - 1
    assert len(faint) == LAYERS
    np.testing.assert_allclose(sorted(line.get_ydata()[-1] for line in faint), sorted(violation[-1]))
    assert [text.get_text() for text in chart.figure.legends[0].get_texts()] == ["mean of the layers", "worst layer"]
    mean, worst = (line.get_ydata() for line in chart.axes.lines if line.get_linewidth() > 1)
    assert mean[-1] == pytest.approx(violation[-1].mean(), rel=0.1)
    assert worst[-1] == pytest.approx(violation[-1].max(), rel=0.1)
    low, high = chart.axes.get_ylim()
    assert low < 0
    assert high > violation[-1].max()


def test_a_balanced_run_is_not_blown_up(tmp_path):
    """The axis always includes half a share, so noise of a hundredth does not fill it."""
    chart = plots(write_experts(tmp_path / "run", np.full((STEPS, LAYERS, EXPERTS), 85)))["moe_violation"].chart
    assert chart.axes.get_ylim()[1] >= 0.5


def test_zeros_that_should_be_are_words_and_others_a_figure(tmp_path):
    balanced, dying = (plots(write_experts(tmp_path / name, loads(), dead=dead)) for name, dead in (("a", 0), ("b", 3)))
    assert not {"moe_dead_experts", "moe_dropped"} & set(balanced)
    assert "Dead experts: none in any step. Dropped: none in any step." in balanced["moe_load_over_time"].caption
    assert "moe_dropped" not in dying
    assert "Dead experts: none" not in dying["moe_load_over_time"].caption
    assert dying["moe_dead_experts"].chart.axes.lines[0].get_ydata().tolist() == [3] * STEPS


def test_several_runs_are_compared_and_dense_ones_take_no_part(tmp_path):
    runs = [write_experts(tmp_path / name, loads(seed)) for seed, name in enumerate("ab")]
    found = plots(*runs, write_run(tmp_path / "dense", rows(10)))
    assert {"moe_load_0", "moe_load_1", "moe_load_over_time_0", "moe_load_over_time_1"} <= set(found)
    assert not {"moe_load_2", "moe_load", "moe_entropy"} & set(found)
    chart = found["moe_violation"].chart
    assert [text.get_text() for text in chart.figure.legends[0].get_texts()] == ["a", "b"]
    assert len(chart.axes.lines) == 4  # mean and worst of each run
    assert "b" in found["moe_load_1"].chart.title


def test_a_deep_run_with_many_experts_is_taller_and_its_page_stays_small(tmp_path):
    recipe = RECIPE.replace("num_layers: 5", "num_layers: 30").replace("num_experts: 6", "num_experts: 16")
    found = plots(write_experts(tmp_path / "run", loads(layers=29, experts=16, steps=300), recipe=recipe))
    rows_drawn = found["moe_load_over_time"].chart
    # Two pixels of the PNG (150 per inch) for each expert of each layer.
    assert rows_drawn.height * 150 >= 2 * 29 * 16
    labels = tick_labels(found["moe_load"].chart.axes.yaxis)
    assert len(labels) > 5
    assert set(labels) <= set(range(1, 30))
    assert sum(len(plot.chart.svg(name)) for name, plot in found.items()) < 1_500_000


def test_the_summary_counts_active_parameters_and_operations(tmp_path):
    records = read_records([write_experts(tmp_path / "run", loads())])
    summary = records[0].summary()
    expert = 3 * 8 * 32
    assert summary["parameters"] - summary["active_parameters"] == LAYERS * (EXPERTS - 2) * expert
    # 6 per active weight, where the embedding counts once, as the tied head; 12 x 4 heads x 8 x 32 positions per layer.
    assert summary["flops_per_token"] == 6 * (summary["active_parameters"] - 32) + 5 * 12 * 32 * 32
    headings, [row] = summary_table(records)
    shown = dict(zip(headings, row, strict=True))
    assert shown["Active"] == format_quantity(summary["active_parameters"])
    assert shown["FLOPs per token"] == format_quantity(summary["flops_per_token"])


def test_runs_whose_tokens_cost_differently_are_compared_over_compute(tmp_path):
    sparse, dense = write_experts(tmp_path / "sparse", loads()), write_run(tmp_path / "dense", rows(STEPS))
    found = plots(sparse, dense)
    chart = found["loss_over_compute"].chart
    costs = [record.summary()["flops_per_token"] for record in read_records([sparse, dense])]
    ends = {line.get_color(): line.get_xdata()[-1] for line in chart.axes.lines if line.get_linewidth() > 1.5}
    assert list(ends.values()) == pytest.approx([40 * 256 * cost / 1e9 for cost in costs])
    assert chart.axes.get_xlabel() == "training GFLOPs"
    twin = write_experts(tmp_path / "twin", loads(1))
    assert "loss_over_compute" not in plots(sparse, twin)

import re

import numpy as np

from lightlm.report.charts.chart import Chart


def test_a_long_noisy_curve_stays_small_and_keeps_its_ends_and_extremes():
    steps = 50_000
    x, y = np.arange(steps) + 1.0, np.random.default_rng(0).normal(size=steps)
    y[12_345], y[40_000] = 30.0, -30.0
    chart = Chart("Loss", "step", "loss")
    chart.line("run", x, y, 0)
    svg = chart.finish().svg("loss")
    assert len(svg) < 100_000
    path = max(re.findall(r' d="([^"]*)"', svg), key=len)
    points = np.array([[float(number) for number in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])
    corners = chart.axes.transData.transform([[x[0], 30.0], [x[-1], -30.0]]) * 72 / chart.figure.dpi
    corners[:, 1] = chart.figure.get_figheight() * 72 - corners[:, 1]  # y of an SVG points down
    np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], corners, atol=0.5)

import math

import numpy as np

from lightlm.report.curves import Curves, focus, smooth
from tests.report.run_folder import rows

NAN = math.nan


def test_columns_have_gaps_where_a_step_lacks_the_metric():
    curves = Curves([{"step": 1, "tokens": 8, "loss": 5.0}, {"step": 2, "tokens": 16, "loss": 4.0, "val_loss": 4.5}])
    assert curves.tokens.tolist() == [8, 16]
    np.testing.assert_equal(curves.column("val_loss"), [NAN, 4.5])
    assert (curves.last("val_loss"), curves.last("loss"), curves.last("mfu")) == (4.5, 4.0, None)
    assert curves.keys() == ["step", "tokens", "loss", "val_loss"]


def test_values_that_are_not_finite_numbers_are_gaps_and_counted_as_lost():
    values = [5.0, None, NAN, math.inf, True, "4.0", [1]]
    curves = Curves([{"step": i, "tokens": i, "loss": value} for i, value in enumerate(values)] + [{"step": 99}, 7])
    np.testing.assert_equal(curves.column("loss"), [5.0, NAN, NAN, NAN, NAN, NAN, NAN])
    assert (len(curves), curves.lost("loss"), curves.lost("val_loss")) == (7, 6, 0)


def test_smoothing_is_the_unbiased_moving_average():
    """By hand: with a decay of 1/2, which holds from the twentieth value on, half of each new value counts."""
    constant = smooth(np.full(50, 3.25), 10)
    np.testing.assert_allclose(constant, 3.25, rtol=1e-12)
    values = np.concatenate([np.zeros(20), [8.0, 0.0]])
    np.testing.assert_allclose(smooth(values, 2)[-2:], [4.0, 2.0], rtol=0.02)
    np.testing.assert_array_equal(smooth(values, 1), values)


def test_smoothing_skips_gaps_and_follows_a_young_curve_closely():
    smoothed = smooth(np.array([1.0, NAN, 1.0, 1.0]), 5)
    np.testing.assert_equal(smoothed, [1.0, NAN, 1.0, 1.0])
    fall = np.linspace(10, 0, 200)  # by 0.05 per step
    lag = smooth(fall, 100) - fall
    assert lag[50] < 0.35  # seven steps behind, where an average of full length would be 25
    assert np.all(lag >= 0)


def test_limits_leave_out_the_first_fall_but_not_of_a_short_run():
    long = np.concatenate([np.linspace(11, 4, 50), np.linspace(4, 3, 950)])
    low, high = focus([long])
    assert 2.8 < low < 3
    assert 3.9 < high < 4.2
    low, high = focus([np.array([11.0, 5.0, NAN, 4.0])])
    assert low < 4
    assert high > 11
    assert focus([np.array([NAN])]) is None
    low, high = focus([np.array([2.0])])
    assert low < 2 < high


def test_lists_are_found_in_the_steps_that_have_them():
    loads = [[1, 2], [3, 4]]
    curves = Curves(
        [row | extra for row, extra in zip(rows(3), [{"moe/load": loads}, {}, {"moe/load": loads}], strict=True)]
    )
    indices, tables = curves.arrays("moe/load")
    assert indices.tolist() == [0, 2]
    assert tables.tolist() == [loads, loads]
    assert curves.arrays("moe/other") is None

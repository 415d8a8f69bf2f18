import math

import pytest

from lightlm.recipe import ScheduleSection
from lightlm.train.schedules import learning_rate_factor


def factors(tokens, total=1000, **schedule):
    section = ScheduleSection(**schedule)
    return [learning_rate_factor(section, at, total) for at in tokens]


def test_wsd_warms_up_stays_and_decays_to_its_floor():
    got = factors([0, 50, 100, 500, 800, 900, 1000], name="wsd", warmup="10%", decay="20%", min_lr_ratio=0.1)
    assert got == pytest.approx([0, 0.5, 1, 1, 1, 0.55, 0.1])


def test_wsd_decays_over_a_fifth_unless_told():
    assert factors([799, 900], name="wsd", warmup="0%") == pytest.approx([1, 0.5])


def test_cosine_reaches_its_floor_at_the_end():
    got = factors([100, 550, 1000], name="cosine", warmup="100", min_lr_ratio=0.1)
    assert got == pytest.approx([1, 0.55, 0.1])


def test_gpt3_schedule_stays_at_a_tenth_after_its_decay():
    """arXiv 2005.14165: warm-up over 375M tokens, cosine to 10% over 260B, constant afterwards."""
    schedule = {"name": "cosine", "warmup": "375M", "decay": "260B", "min_lr_ratio": 0.1}
    total = 300 * 10**9
    quarter = 375 * 10**6 + 65 * 10**9
    got = factors([187_500_000, quarter, 261 * 10**9, 299 * 10**9], total, **schedule)
    assert got == pytest.approx([0.5, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.1, 0.1])


def test_wsd_may_decay_as_one_minus_a_square_root():
    """arXiv 2405.18392: it falls steeply at first. 1 - sqrt(0.25) after a quarter of the decay."""
    got = factors([800, 850, 1000], name="wsd", warmup="0%", decay="20%", decay_shape="sqrt", min_lr_ratio=0.2)
    assert got == pytest.approx([1, 0.2 + 0.8 * 0.5, 0.2])


def test_linear_falls_from_the_warmup_to_its_floor():
    got = factors([50, 100, 550, 1000], name="linear", warmup="10%", min_lr_ratio=0.1)
    assert got == pytest.approx([0.5, 1, 0.55, 0.1])
    got = factors([100, 200, 300, 900], name="linear", warmup="100", decay="200", min_lr_ratio=0.5)
    assert got == pytest.approx([1, 0.75, 0.5, 0.5])


def test_constant_ignores_nothing_but_warms_up():
    assert factors([10, 500, 1000], name="constant", warmup="2%") == pytest.approx([0.5, 1, 1])

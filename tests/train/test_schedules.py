import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.recipe import ScheduleSection, load_recipe, shipped_recipes
from lightlm.train.schedules import (
    batch_plan,
    corner_points,
    describe_schedule,
    learning_rate_factor,
    note_on_repeats,
)
from tests.corpus import STEADY
from tests.shapes import without_hub


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


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear", "constant"])
@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_every_schedule_trains_every_shipped_recipe_at_half_time(path, name):
    recipe = load_recipe(path, [f"schedule.name={name}"], lambda _: None, without_hub)
    total = batch_plan(recipe).remaining()[1]
    assert learning_rate_factor(recipe.schedule, total // 2, total) > 0.01


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            [],
            "0 -> 0.003 at step 8 (30.1K tokens), constant to step 294 (1.2M tokens), -> 0 at step 367 (1.5M tokens)",
        ),
        (
            ["schedule={name: cosine, warmup: 0%, min_lr_ratio: 0.1}"],
            "0.003 -> 0.0003 at step 367 (1.5M tokens) (cosine decay)",
        ),
        (["schedule={name: constant, warmup: 0%}"], "0.003, constant to step 367 (1.5M tokens)"),
        (
            ["schedule={name: constant, rewarmup: 500K, rewarmup_from: 503808}"],
            "0 -> 0.003 at step 8 (30.1K tokens), constant to step 123 (504K tokens), from 0 again, "
            "-> 0.003 at step 245 (1M tokens), constant to step 367 (1.5M tokens)",
        ),
    ],
)
def test_the_corner_points_in_words(overrides, text):
    assert describe_schedule(load_recipe(STEADY, overrides)) == text


@settings(max_examples=25)
@given(st.sampled_from(["wsd", "cosine", "linear", "constant"]), st.integers(0, 60), st.integers(1, 40))
def test_between_corner_points_the_rate_rises_falls_or_stays(name, warmup, decay):
    values = {"name": name, "warmup": f"{warmup}%", "min_lr_ratio": 0.1, "decay": f"{decay}%"}
    shown = ", ".join(f"{k}: {v}" for k, v in values.items() if name != "constant" or k in ("name", "warmup"))
    recipe = load_recipe(STEADY, [f"schedule={{{shown}}}"])
    points, total = corner_points(recipe), batch_plan(recipe).remaining()[1]
    assert (points[0]["step"], points[-1]["step"]) == (0, batch_plan(recipe).remaining()[0])
    for left, right in itertools.pairwise(points):
        ends = sorted((left["lr"], right["lr"]))
        for part in range(1, 10):
            tokens = round(left["tokens"] + (right["tokens"] - left["tokens"]) * part / 10)
            if left["tokens"] < tokens < right["tokens"]:
                rate = recipe.optimizer.lr * learning_rate_factor(recipe.schedule, tokens, total)
                assert ends[0] - 1e-12 <= rate <= ends[1] + 1e-12


def test_a_rewarmup_multiplies_the_schedule_by_a_rise_from_zero():
    schedule = {"name": "constant", "warmup": "0%", "rewarmup": "10%", "rewarmup_from": 500}
    assert factors([0, 499, 500, 525, 550, 600, 601], **schedule) == pytest.approx([1, 1, 0, 0.25, 0.5, 1, 1])


def test_data_that_a_run_repeats_too_often_is_named():
    assert note_on_repeats(4000, 1000) is None
    assert "reads the 1K tokens of books 4.2 times" in note_on_repeats(4200, 1000, "books")
    assert "reads its 1K tokens of data 25 times" in note_on_repeats(25_000, 1000)
    assert note_on_repeats(0, 0, "books") is None
    assert note_on_repeats(1000, 0, "books") == "books has no train split: it is for scoring models only"

"""Settings on the command line: what is an override and what a path, numbers that are none, and what a plan prints."""

import json

import pytest

from lightlm.cli.app import with_resume_value
from lightlm.cli.train import NEWEST
from lightlm.data.prepare.options import Options
from lightlm.errors import UsageError
from lightlm.generate.sampling import Sampling
from tests.cli.runner import Runner
from tests.corpus import TINY_RECIPE


@pytest.fixture
def lightlm(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return Runner(monkeypatch, capsys)


@pytest.mark.parametrize("path", ["my=recipe.yaml", "lr=1/tiny.yaml"])
def test_a_recipes_path_may_hold_an_equals_sign(lightlm, tmp_path, path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(TINY_RECIPE, encoding="utf-8")
    shown = json.loads(lightlm("train", path, "train.tokens=2560", "--dry-run", "--json").stdout)
    assert (shown["name"], shown["tokens"]) == ("tiny", 2560)
    assert shown["schedule"].startswith("0 -> 0.01 at step 1")
    lightlm("train", "train.tokens=1K", "--dry-run").assert_one_message("name a recipe")
    lightlm("train", "missing=recipe.yaml", "--dry-run").assert_one_message("name a recipe")


def test_resume_takes_a_run_or_an_override(lightlm, tmp_path):
    (tmp_path / "lr=1").mkdir()
    assert with_resume_value(["train", "--resume", "lr=1"]) == ["train", "--resume", "lr=1"]
    assert with_resume_value(["train", "--resume", "lr=2"]) == ["train", "--resume", NEWEST, "lr=2"]


def test_a_plan_prints_the_schedule_and_what_an_override_left_out(lightlm):
    text = lightlm("plan", "tiny.yaml", "schedule.name=cosine", "--no-probe").stdout
    assert "Learning rate: 0 -> 0.01 at step 2 (512 tokens), -> 0 at step 20 (5.12K tokens) (cosine decay)" in text
    assert "Note: schedule.decay 20% of tiny.yaml is that of wsd, and is left out" in text
    plan = json.loads(lightlm("plan", "tiny.yaml", "--no-probe", "--json").stdout)
    assert [point["step"] for point in plan["run"]["learning_rates"]] == [0, 2, 16, 20]
    assert [point["lr"] for point in plan["run"]["learning_rates"]] == pytest.approx([0, 0.01, 0.01, 0])


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_no_option_takes_what_is_no_finite_number(number):
    value = float(number)
    for refused in (
        lambda: Sampling(temperature=value),
        lambda: Sampling(top_p=value),
        lambda: Options("gpt2", val_fraction=value).check(),
    ):
        with pytest.raises(UsageError):
            refused()

"""Published figures: names, place in tables, and marks for other protocols."""

from pathlib import Path

import pytest
import yaml

from lightlm.errors import UsageError
from lightlm.evaluate.compare import baselines
from lightlm.evaluate.compare.baselines import Legend, find_baseline, load_baselines, split_names
from lightlm.evaluate.compare.chance import chance_of
from lightlm.evaluate.compare.comparison import Protocol
from lightlm.evaluate.results import board

PLAIN = Protocol(num_fewshot=0)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("gpt2", "gpt2-124m"),
        ("GPT-2", "gpt2-124m"),
        ("gpt2_124M", "gpt2-124m"),
        ("MobileLLM-LS-125M", "mobilellm-ls-125m"),
        ("smollm2-135m", "smollm2-135m"),
        ("pythia160m", "pythia-160m"),
    ],
)
def test_names_are_matched_as_people_write_them(given, name):
    found = find_baseline(given)
    assert found is not None
    assert found.name == name


def test_models_and_figures_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "gpt2").mkdir()
    found, models = split_names("gpt2, demo,HuggingFaceTB/SmolLM2-135M,./gpt2,GPT-2,")
    assert [baseline.name for baseline in found] == ["gpt2-124m"]
    assert models == ["demo", "HuggingFaceTB/SmolLM2-135M", "./gpt2"]


def test_an_unknown_name_is_answered_with_near_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--compare mobilelm-125: .*did you mean mobilellm-125m"):
        split_names("mobilelm-125")


def test_every_name_is_unique_and_every_figure_a_share():
    names = [name for baseline in load_baselines() for name in (baseline.name, *baseline.other_names)]
    assert len(set(names)) == len(names)
    for baseline in load_baselines():
        assert all(find_baseline(name) is baseline for name in (baseline.name, *baseline.other_names))
        assert baseline.figures
        for figure in baseline.figures:
            if figure.task == "open_slm":
                assert figure.metric in ("index", "part_index")
                assert 2 < figure.value < 40
            else:
                assert 15 < figure.percent < 80
                assert figure.metric in (None, "acc", "acc_norm", "acc_tokens")


def test_every_figure_and_token_count_has_a_source_and_every_source_a_protocol():
    content = yaml.safe_load(Path(baselines.__file__).with_name("baselines.yaml").read_text(encoding="utf-8"))
    for source in content["sources"].values():
        assert source.keys() == {"title", "url", "harness", "num_fewshot"}  # null means not stated
        assert source["title"]
        assert source["url"].startswith("https://")
    for baseline in load_baselines():
        assert all(figure.source.url for figure in baseline.figures)
        assert bool(baseline.tokens) == bool(baseline.tokens_source)
        assert baseline.tokens_source is None or baseline.tokens_source.startswith("https://")


def test_published_indices_follow_from_the_published_scores():
    """The leaderboard rounds the mean of the two ARC scores before it normalizes it."""
    checked = 0
    for baseline in load_baselines():
        for figure in baseline.figures:
            if figure.metric != "index" or figure.computed:
                continue
            scores = {
                task: other.value
                for task, part in board.PARTS.items()
                for other in baseline.find(task, part.metric)
                if other.source == figure.source
            }
            if board.metric_of(scores) == "index":
                assert figure.value == pytest.approx(board.index(scores), abs=0.011), baseline.name
                checked += 1
    assert checked >= 9


def test_a_missing_index_is_computed_from_the_scores_of_one_source():
    [index], [part] = (find_baseline("mobilellm-r1").find("open_slm", metric) for metric in ("index", "part_index"))
    hellaswag, arc, piqa, arithmark = 33.84, (49.92 + 24.74) / 2, 63.22, 65.70
    three = (hellaswag - 25) / 0.75 + (arc - 25) / 0.75 + (piqa - 50) / 0.5
    assert part.value == pytest.approx(three / 3)
    assert index.value == pytest.approx((three + 0.65 * (arithmark - 25) / 0.75) / 3.65)
    assert index.computed
    assert "computed from its scores" in (legend := Legend()).cell(index, PLAIN, None) + "".join(legend.lines())
    assert [figure.value for figure in find_baseline("speck1").find("open_slm", "index (off-protocol)")] == [18.15]


def test_models_are_ordered_by_their_tokens():
    found, _ = split_names("smollm2-135m,gpt2,minueza-3-95m,speck1-140m,boris-2-preview-1")
    order = ["minueza-3-95m", "speck1-140m", "boris-2-preview-1", "smollm2-135m", "gpt2-124m"]
    assert [one.name for one in found] == order  # unknown last


def test_a_figure_stands_beside_its_own_metric():
    gpt2, mobile = find_baseline("gpt2"), find_baseline("mobilellm-125m")
    assert [figure.percent for figure in gpt2.find("hellaswag", "acc")] == [28.92]
    assert [figure.percent for figure in gpt2.find("hellaswag", "acc_norm")] == [
        31.14,
        30.9,
        31.26,
    ]  # the first one's metric is stated, and its source is the oldest
    assert [figure.percent for figure in mobile.find("hellaswag", "acc_norm")] == [38.9]
    assert mobile.find("hellaswag", "acc") == []
    assert [figure.percent for figure in mobile.find("winogrande", "acc")] == [53.1]  # which has no acc_norm
    assert gpt2.find("winogrande", "acc") == []
    assert [figure.percent for figure in gpt2.find("lambada_openai", "acc")] == [32.3]


def test_what_differs_from_the_run_is_marked_and_explained():
    [mobile] = find_baseline("mobilellm-125m").find("piqa", "acc_norm")
    assert mobile.differences(0, None) == ["MobileLLM's own script", "metric not stated"]
    assert mobile.differences(5, 100) == ["MobileLLM's own script", "0-shot", "metric not stated", "all documents"]
    arc, _ = find_baseline("gpt2").find("arc_easy", "acc_norm")
    assert arc.differences(10, None) == ["CORE", "metric not stated"]
    assert "prompts as text" in arc.differences(10, None, "with a chat template")
    legend = Legend()
    assert legend.lines() == []
    assert legend.cell(mobile, PLAIN, None) == "0.653* (a)"
    assert legend.cell(arc, PLAIN, None) == "0.412* (b)"
    assert legend.cell(find_baseline("gpt2").find("hellaswag", "acc")[0], PLAIN, None) == "0.2892* (c)"
    text = "\n".join(legend.lines([find_baseline("smollm-135m")]))
    assert "use all documents" not in text
    legend.cell(mobile, PLAIN, 100)
    assert "Published figures use all documents; this run uses fewer." in legend.lines()[0]
    for part in (
        "(a) MobileLLM README: MobileLLM's own script, 0-shot, metric not stated",
        "(b) nanochat, dev/estimate_gpt3_core.ipynb: CORE, 10-shot, metric not stated",
        "(c) build-nanogpt, hellaswag.py: lm-eval, examples in the prompt not stated",
        "smollm-135m: 600B tokens; ARC is an average of 42.4 in the SmolLM2 card",
    ):
        assert part in text


def test_chance_says_which_level_it_is():
    assert [chance_of(task).value for task in ("hellaswag", "piqa", "blimp_causative", "boolq")] == [
        0.25,
        0.5,
        0.5,
        0.6217,
    ]
    assert "yes to all" in chance_of("boolq").reason
    assert chance_of("lambada_openai") is None

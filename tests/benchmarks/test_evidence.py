"""What benchmarks/evidence.py, evidence_page.py and evidence_figure.py say of results, against scipy and numpy."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BUDGET = 10_000_000
SEEDS = (1, 2, 3)
NOISE = {1: 0.020, 2: -0.005, 3: -0.015}  # of all contestants alike, so that pairing removes it


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def evidence():
    import evidence

    return evidence


@pytest.fixture
def evidence_page():
    import evidence_page

    return evidence_page


@pytest.fixture
def evidence_figure():
    import evidence_figure

    return evidence_figure


def entry(recipe, ends, *, tokens=BUDGET, flops=6e6, speed=1000.0, points=20, embedding=500):
    """A contestant whose loss falls to these values by seed, a straight line over log(tokens)."""
    at = np.linspace(tokens / points, tokens, points)
    runs = {
        str(seed): [
            [float(t), float(t / speed), end + 0.5 * math.log(tokens / t), (end + 0.5 * math.log(tokens / t)) / 3]
            for t in at
        ]
        for seed, end in ends.items()
    }
    parameters = {"total": 2000, "active": 1500, "embedding": embedding, "flops_per_token": flops}
    return {
        "recipe": recipe,
        "changes": [],
        "runs": runs,
        "tokens_per_second": dict.fromkeys(runs, speed),
        "parameters": parameters,
    }


def record(contestants, **values):
    known = {"study": "decisive", "question": "Which?", "metric": "val_loss", "settings": []}
    known |= {"machine": {"processor": "Abacus"}, "curve": ["tokens", "seconds", "val_loss", "val_bpb"]}
    return known | values | {"contestants": contestants}


def losses(mean, extra=(0, 0, 0)):
    return {seed: mean + NOISE[seed] + more for seed, more in zip(SEEDS, extra, strict=True)}


DENSE_40, DENSE_60 = losses(5.06, (0.010, -0.004, 0)), losses(4.96, (-0.006, 0.006, 0.012))
TUNED = losses(5.00, (0.003, -0.003, 0))


@pytest.fixture
def decisive():
    return record(
        {
            "GPT-2, 1e-3": entry("gpt2", losses(4.95, (0, 0, 0.2))),  # the best median, and a worse mean
            "GPT-2, 4e-3": entry("gpt2", TUNED),
            "GPT-2, 8e-3": entry("gpt2", {1: 4.90}),  # one lucky seed is not a tuned baseline
            "dense at 60%": entry("small", DENSE_60, tokens=0.6 * BUDGET, flops=9e6, speed=500.0),
            "dense at 40%": entry("small", DENSE_40, tokens=0.4 * BUDGET, flops=9e6, speed=500.0),
            "moe at 30%": entry("moe", losses(4.95), tokens=0.3 * BUDGET),
            "moe at 45%": entry("moe", losses(4.90), tokens=0.45 * BUDGET),
        }
    )


def test_the_baseline_is_the_best_of_the_rates_with_all_seeds(evidence, decisive):
    assert evidence.baseline(decisive, "val_loss") == "GPT-2, 4e-3"
    assert evidence.families(decisive) == {
        "dense": ["dense at 40%", "dense at 60%"],
        "moe": ["moe at 30%", "moe at 45%"],
    }


def test_the_share_of_tokens_is_where_the_means_of_the_ends_cross_the_baseline(evidence, decisive):
    found = evidence.reach(decisive, "dense")
    above = np.array([[ends[seed] - TUNED[seed] for seed in SEEDS] for ends in (DENSE_60, DENSE_40)])
    expected = np.interp(0.0, above.mean(1), np.log([0.6, 0.4]))
    assert found.share == pytest.approx(math.exp(expected))
    assert (found.flops, found.seconds) == pytest.approx((1.5, 2.0))
    # The loss of each seed at the crossing, over the slope of the means: the interval of scipy's test of one mean.
    at_crossing = [np.interp(expected, np.log([0.4, 0.6]), above[::-1, i]) for i in range(len(SEEDS))]
    slope = (above[0].mean() - above[1].mean()) / math.log(0.6 / 0.4)
    interval = stats.ttest_1samp(expected - np.array(at_crossing) / slope, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert found.low < found.share < found.high


def test_ends_on_one_side_give_a_bound(evidence, evidence_page, decisive):
    assert evidence.reach(decisive, "moe").bound == "at most 30%"
    assert "moe reaches" in evidence_page.sentences(decisive)
    decisive["contestants"]["moe at 30%"] = entry("moe", losses(5.3), tokens=0.3 * BUDGET)
    decisive["contestants"]["moe at 45%"] = entry("moe", losses(5.1), tokens=0.45 * BUDGET)
    assert evidence.reach(decisive, "moe").bound == "more than 45%"
    assert "moe would reach" in evidence_page.sentences(decisive)
    assert "(+0.100 nats per token there)" in evidence_page.sentences(decisive)


def test_sentences_say_the_share_with_its_interval_and_what_is_compared(evidence, evidence_page, decisive):
    dense, moe, ends, sizes = evidence_page.sentences(decisive).splitlines()
    assert ends.startswith(
        "Ends beside it, nats per token: dense at 40% +0.062, dense at 60% -0.036, moe at 30% -0.050"
    )
    found = evidence.reach(decisive, "dense")
    assert dense.startswith("dense reaches the final loss of GPT-2, 4e-3 (5.000 (0.020) nats per token, 3 seeds) with ")
    assert f"with {found.share:.1%} of its tokens (95% interval {found.low:.1%} to {found.high:.1%})" in dense
    assert f"{1.5 * found.share:.0%} of its FLOPs and {2 * found.share:.0%} of its time." in dense
    assert moe.endswith("with at most 30% of its tokens (-0.050 nats per token there).")
    assert "GPT-2, 4e-3 1,000, dense 1,000, moe 1,000" in sizes  # 1,500 active, of which 500 are tables


def test_times_are_those_of_one_machine(evidence, evidence_page, evidence_figure, decisive, tmp_path):
    zuse, dense = {"processor": "Zuse"}, decisive["contestants"]["dense at 40%"]
    dense["elsewhere"] = {"2": zuse}
    dense["tokens_per_second"]["2"] = 1e6
    assert evidence.reach(decisive, "dense").seconds == pytest.approx(2.0)
    dense["elsewhere"] = dict.fromkeys(("1", "2", "3"), zuse)
    assert evidence.reach(decisive, "dense").seconds == pytest.approx(2.0), "the other end was trained here"
    decisive["contestants"]["dense at 60%"]["elsewhere"] = dense["elsewhere"]
    assert math.isnan(evidence.reach(decisive, "dense").seconds)
    sentence = evidence_page.sentences(decisive).splitlines()[0]
    assert "of its FLOPs." in sentence
    assert "time" not in sentence
    assert len(evidence_figure.draw(decisive, tmp_path / "all.png")) == 3


def test_an_end_with_a_seed_less_takes_no_seed_from_the_others(evidence, decisive):
    before = evidence.reach(decisive, "dense")
    decisive["contestants"]["dense at 50%"] = entry("small", {1: 4.9}, tokens=0.5 * BUDGET)
    assert evidence.reach(decisive, "dense") == before


def test_the_spread_of_a_study_is_pooled_over_paired_differences(evidence, evidence_page):
    first = {1: 5.0, 2: 5.1, 3: 4.9}
    others = {
        "clear": {1: 4.80, 2: 4.92, 3: 4.71},
        "noise": {1: 5.01, 2: 5.09, 3: 4.90},
        "bad": {1: 5.30, 2: 5.41},
        "lucky": {1: 4.70},
        "flat": {1: 5.005},
    }
    study = record({"base": entry("small", first)} | {name: entry("small", ends) for name, ends in others.items()})
    differences = {name: [value - first[seed] for seed, value in ends.items()] for name, ends in others.items()}
    groups = [group for group in differences.values() if len(group) > 1]
    # A one-way analysis of variance estimates the same spread within groups.
    centered = np.concatenate([np.array(group) - np.mean(group) for group in groups])
    freedom = len(centered) - len(groups)
    std = math.sqrt((centered**2).sum() / freedom)
    assert freedom == 5
    rows = {row.name: row for row in evidence.rows(study, [], "val_loss")}
    for name, group in differences.items():
        margin = stats.t.interval(0.95, freedom, scale=std / math.sqrt(len(group)))[1]
        assert rows[name].difference == pytest.approx(np.mean(group))
        assert rows[name].margin == pytest.approx(margin)
    assert {name: row.verdict for name, row in rows.items()} == {
        "base": "baseline",
        "lucky": "lower, one seed",
        "clear": "better",
        "noise": "noise",
        "flat": "noise",
        "bad": "higher, two seeds",
    }
    assert list(rows) == ["base", "lucky", "clear", "noise", "flat", "bad"]  # best first
    assert f"| clear | 4.810 (0.105) | 3 | -0.190 ± {rows['clear'].margin:.3f} | better |" in evidence_page.table(study)


def test_a_study_of_single_seeds_borrows_the_spread_of_the_others_of_its_metric(evidence, evidence_page):
    alone = record({"base": entry("small", {1: 5.0}), "change": entry("small", {1: 4.99})})
    assert evidence.rows(alone, [alone], "val_loss")[1].verdict == "one seed"
    noisy = record({"a": entry("small", losses(5)), "b": entry("small", losses(5, (0.03, -0.02, 0.05)))})
    noisy["contestants"]["c"] = entry("small", losses(5, (-0.03, 0.02, 0.04)))
    noisy["study"] = "noisy"
    other = record(noisy["contestants"], metric="val_bpb", study="other")
    assert evidence.rows(alone, [alone, noisy], "val_loss")[1].verdict == "noise"
    assert evidence.rows(alone, [alone, other], "val_loss")[1].verdict == "one seed"
    assert "of all studies" in evidence_page.table(alone, [alone, noisy])


def test_a_study_is_shown_in_its_own_metric_with_every_contestant(evidence_page):
    study = record(
        {
            "8k": entry("small", {1: 5.1, 2: 5.1}),
            "4k": entry("small", {1: 4.5, 2: 4.5}),
            "hot": entry("small", {}) | {"states": {"1": "diverged"}},
        },
        metric="val_bpb",
        settings=["optimizer.name=muon"],
    )
    text = evidence_page.table(study)
    assert "| contestant | bits per byte |" in text
    assert "| 4k | 1.5000 (0.0000) | 2 | -0.2000 ±" in text
    assert "| hot |  | 0 |  | diverged |" in text
    assert "`python benchmarks/learning.py --work WORK decisive`; small.yaml, `optimizer.name=muon`, 10M tokens" in text
    assert "| 4k | 4.500 " in evidence_page.table(study, metric="val_loss")


def test_the_summary_has_a_row_per_study_and_the_machine(evidence_page, decisive):
    vocabulary = record(
        {"8k": entry("small", {1: 5.1}), "4k": entry("small", {1: 4.5})}, study="vocabulary", metric="val_bpb"
    )
    text = evidence_page.summary([decisive, vocabulary])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| decisive", "| vocabulary"))]
    assert [row[0] for row in rows] == ["| decisive", "| vocabulary"]
    assert rows[0][1:3] == ["GPT-2, 4e-3", "GPT-2, 8e-3"]
    assert rows[0][6] == "19 |"
    longer = {"longer": entry("small", {1: 4.0}, tokens=2 * BUDGET), "wide": entry("small", {1: 5.0})}
    longer = record({"base": entry("small", {1: 5.1})} | longer)
    assert "| base | wide |" in evidence_page.summary([longer]), "more tokens are no gain"
    assert rows[1][3] == "-0.2000 bits per byte"
    assert text.count("processor Abacus") == 1


def test_the_page_has_every_study_with_its_finding(evidence_page, decisive):
    other = record({"8k": entry("small", {1: 5.1}), "4k": entry("small", {1: 4.5})}, study="vocabulary")
    decisive["contestants"] |= {"moe at 50%": {"runs": {}}, "GPT-2, 1": {"runs": {}}}
    questions = {"vocabulary": "Which size?", "depth": "How deep?"}  # as they are today, not when the study ran
    text = evidence_page.page([decisive, other], {"vocabulary": "Fewer tokens."}, questions)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# The ladder",
        "## All studies",
        "## decisive: Which?",
        "## vocabulary: Which size?",
        "## Studies without results yet",
    ]
    assert text.endswith("\n- `depth`: How deep?\n")
    assert "\nNot trained yet: moe at 50%; GPT-2, 1.\n" in text
    assert "## vocabulary: Which size?\n\nFewer tokens.\n\n`python benchmarks/learning.py" in text
    assert all((f"| {name} |" in text) == bool(entry["runs"]) for name, entry in decisive["contestants"].items())


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_the_figure_shows_the_tuned_baseline_the_families_and_where_they_cross(
    evidence, evidence_figure, decisive, tmp_path
):
    decisive["contestants"]["moe in float32 at 30%"] = entry("moe", {1: 4.9}, tokens=0.3 * BUDGET)  # has one seed
    chart = evidence_figure._chart(decisive, "Loss", "tokens", lambda name: 1.0)
    evidence_figure._mark_shares(chart, decisive)
    chart.finish()
    legend = [text.get_text() for text in chart.figure.legends[0].get_texts()]
    ends = [f"{name}: ends of trainings" for name in ("GPT-2, tuned", "LightLM, dense", "LightLM, moe")]
    assert legend == [*ends, "final loss of GPT-2"]
    joined = [line.get_xydata() for line in chart.axes.lines if line.get_marker() == "o" and line.get_zorder() == 4]
    ends = {tuple(point) for points in joined for point in points}
    means = {1.0: TUNED, 0.4: DENSE_40, 0.6: DENSE_60, 0.3: losses(4.95), 0.45: losses(4.90)}
    for (x, y), (share, values) in zip(sorted(ends), sorted(means.items(), key=lambda item: item[0]), strict=True):
        assert (x, y) == pytest.approx((share * BUDGET, np.mean(list(values.values()))))
    [diamond] = [line for line in chart.axes.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(
        diamond.get_xydata(), [[evidence.reach(decisive, "dense").share * BUDGET, np.mean(list(TUNED.values()))]]
    )
    assert [text.get_text() for text in chart.axes.texts] == [f"{evidence.reach(decisive, 'dense').share:.1%}"]
    paths = evidence_figure.draw(decisive, tmp_path / "learning.png")
    assert [path.name for path in paths] == ["learning.png", "learning-flops.png", "learning-time.png"]
    assert all(png_size(path)[0] == 1020 for path in paths)


def test_studies_with_other_seeds_are_one_with_all_seeds(evidence, decisive):
    again = json.loads(json.dumps(decisive))
    for each in again["contestants"].values():
        for key in ("runs", "tokens_per_second"):
            each[key] = {str(int(seed) + 3): value for seed, value in each[key].items()}
    again |= {"study": "again", "machine": {"processor": "Zuse"}}
    both = evidence.merge([decisive, again])
    assert len(evidence.finals(both, "val_loss")["dense at 40%"]) == 6
    one, two = evidence.reach(decisive, "dense"), evidence.reach(both, "dense")
    assert two.share == pytest.approx(one.share)
    assert (two.low, two.high) != (one.low, one.high)
    assert two.seconds == one.seconds, "the times of the other machine do not count"
    assert list(both["contestants"]["GPT-2, 4e-3"]["elsewhere"]) == ["4", "5", "6"]
    assert list(decisive["contestants"]["dense at 40%"]["runs"]) == ["1", "2", "3"]
    with pytest.raises(SystemExit, match="decisive and decisive both have seed 1"):
        evidence.merge([decisive, decisive])
    # Each is judged by the spread of both.
    freedom = evidence.pool([decisive], "val_loss").freedom
    assert evidence.spread_of(decisive, [decisive, again], "val_loss").freedom == 2 * freedom


def test_a_change_is_compared_with_the_contestant_that_it_changes(evidence, evidence_page):
    entries = {
        "base": (5.5, []),
        "2K": (5.4, ["train.batch_tokens=2K"]),
        "rate": (5.6, ["optimizer.lr=1e-2"]),
        "2K, rate": (5.41, ["train.batch_tokens=2K", "optimizer.lr=1e-2"]),
        "2K, rate, deep, wide, old": (5.0, ["train.batch_tokens=2K", "optimizer.lr=2e-2", "a=1", "b=2", "c=3"]),
    }
    study = record({name: entry("small", {1: end, 2: end}) | {"changes": how} for name, (end, how) in entries.items()})
    assert evidence.nearest(study, "val_loss") == {"2K, rate": "rate"}  # the last of those with one change less
    step = next(row.step for row in evidence.rows(study, [], "val_loss") if row.name == "2K, rate")
    assert (step.name, step.difference) == ("rate", pytest.approx(-0.19))
    assert "| beside the nearest |" in evidence_page.table(study)
    assert "rate: -0.190 ± 0.000, lower, two seeds |" in evidence_page.table(study)


def test_the_operations_of_muon_are_counted(evidence):
    """From the definition: a step of the iteration is X X^T, A A and B X of every matrix of the blocks."""

    def products(rows, columns):
        low, high = sorted((rows, columns))
        return 5 * (2 * low * high * low + 2 * low * low * low + 2 * low * low * high)

    shape = ("model.num_layers=1", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2")
    shape += ("model.intermediate_size=96", "train.batch_tokens=1K")
    matrices = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    expected = sum(products(*matrix) for matrix in matrices) / 1024
    assert evidence.optimizer_flops("demo", shape) == pytest.approx(expected)
    assert evidence.optimizer_flops("demo", (*shape, "optimizer={name: adamw, lr: 1e-3}")) == 0
    both = record({"plain": entry("demo", {1: 5.0}) | {"changes": [*shape]}})
    assert evidence.cost_of(both, "plain", "flops") == pytest.approx(6e6 + expected)


def test_the_commands_read_committed_results_and_name_what_is_missing(evidence, tmp_path, decisive, monkeypatch):
    import learning

    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="no results of decisive"):
        learning.show(
            learning.argparse.Namespace(table=False, page=None, figure=None, sentence=True, studies=[], metric=None)
        )
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "learning.py"), "--list"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "decisive.json").write_text(json.dumps(decisive), encoding="utf-8")
    assert evidence.read(tmp_path, ["decisive"]) == [decisive]

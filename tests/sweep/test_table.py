"""The statistics of a sweep, against scipy's own paired test and Holm's procedure by hand."""

import json

import numpy as np
import pytest
from scipy import stats

from lightlm.errors import UsageError
from lightlm.sweep.cells import Cell, Contestant
from lightlm.sweep.folder import Definition, End, Entry
from lightlm.sweep.table import more_is_better, read_results
from tests.sweep.fleet import folder

BASE = {1: 3.00, 2: 3.05, 3: 2.95, 4: 3.02}
BETTER = {seed: value - gain for (seed, value), gain in zip(BASE.items(), (0.050, 0.052, 0.047, 0.055), strict=True)}
NOISE = {seed: value + gain for (seed, value), gain in zip(BASE.items(), (0.03, -0.02, 0.01, -0.03), strict=True)}
WORSE = {seed: value + 0.2 + 0.01 * seed for seed, value in BASE.items()}


@pytest.fixture
def results(tmp_path):
    """Return the results of contestants with these values by seed; None is a run that diverged."""

    def read(values, metric="val_loss", baseline=None):
        sweep, entries = folder(tmp_path / "sweep"), {}
        for name, finals in values.items():
            entry = Entry(
                Contestant(name, "demo", (), {"key": name.partition("=")[2]}), list(finals), {"train": {}, "model": {}}
            )
            entries[name] = entry
            for seed, value in finals.items():
                cell = Cell(entry.contestant, seed)
                run = sweep.run(cell)
                run.mkdir()
                (run / "recipe.yaml").write_text("train: {tokens: 1000}")
                rows = [{"step": 1, "tokens": 500, "seconds": 1.0, "val_loss": 9.0, "eval/quiz/acc": 0.1}]
                rows += [{"step": 2, "tokens": 1000, "seconds": 2.0, "val_loss": value, "eval/quiz/acc": value}]
                (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                sweep.record(cell, End("diverged" if value is None else "done", 5.0))
        return read_results(sweep, Definition(entries), metric, baseline)

    return read


def verdicts(found):
    return {line.contestant.name: line.verdict for line in found.lines}


def test_differences_are_paired_by_seed_and_adjusted_for_all_comparisons(results):
    found = results({"k=base": BASE, "k=better": BETTER, "k=noise": NOISE, "k=worse": WORSE})
    lines = {line.contestant.name: line for line in found.lines}
    base = np.array(list(BASE.values()))
    raw = {}
    for name, values in (("k=better", BETTER), ("k=noise", NOISE), ("k=worse", WORSE)):
        test = stats.ttest_rel(list(values.values()), base)
        raw[name], interval = test.pvalue, test.confidence_interval(0.95)
        paired = lines[name].paired
        assert paired.value == pytest.approx(np.mean(list(values.values())) - base.mean())
        assert (paired.low, paired.high) == pytest.approx(tuple(interval))
        assert (paired.value - paired.margin, paired.value + paired.margin) == pytest.approx(tuple(interval))
        assert lines[name].std == pytest.approx(np.std(list(values.values()), ddof=1))
    ordered = sorted(raw, key=raw.get)
    running = 0.0
    for rank, name in enumerate(ordered):
        running = max(running, min(raw[name] * (3 - rank), 1.0))
        assert lines[name].paired.p_value == pytest.approx(running)
    assert verdicts(found) == {"k=base": "baseline", "k=better": "better", "k=noise": "noise", "k=worse": "worse"}
    assert next(line.contestant.name for line in found.best_first()) == "k=better"
    assert lines["k=base"].tokens == 1000
    assert lines["k=base"].seconds == 2.0


def test_of_an_accuracy_more_is_better(results):
    found = results({"k=base": BASE, "k=better": BETTER, "k=worse": WORSE}, metric="eval/quiz/acc")
    assert verdicts(found) == {"k=base": "baseline", "k=better": "worse", "k=worse": "better"}
    more = ["eval/hellaswag/acc_norm", "eval/ifeval/prompt_level_strict_acc", "eval/qa/em", "tokens_per_second"]
    less = ["eval/heldout/bits_per_byte", "eval/wikitext/word_perplexity", "eval/mt/ter", "loss", "val_bpb", "seconds"]
    assert [more_is_better(metric) for metric in more] == [True] * len(more)
    assert [more_is_better(metric) for metric in less] == [False] * len(less)


def test_one_seed_has_no_test_and_a_missing_or_diverged_run_no_part_in_it(results):
    found = results({"k=a": {1: 3.0, 2: 3.1}, "k=b": {1: 2.9}, "k=c": {3: 2.0}, "k=d": {1: 2.0, 2: None}})
    lines = {line.contestant.name: line for line in found.lines}
    assert verdicts(found) == {"k=a": "baseline", "k=b": "one seed", "k=c": "missing", "k=d": "diverged"}
    assert lines["k=b"].paired.value == pytest.approx(-0.1)
    assert lines["k=b"].paired.p_value is None
    assert lines["k=b"].paired.margin is None
    assert lines["k=d"].finals == {1: 2.0}
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_equal_runs_are_noise(results):
    assert verdicts(results({"k=a": BASE, "k=b": BASE})) == {"k=a": "baseline", "k=b": "noise"}


def test_the_baseline_is_named_by_name_or_value(results):
    assert results({"k=a": BASE, "k=b": BETTER}, baseline="b").baseline == "k=b"


def test_an_unknown_baseline_or_metric_is_refused(results):
    with pytest.raises(UsageError, match="--baseline c: no such contestant; there are k=a, k=b"):
        results({"k=a": BASE, "k=b": BETTER}, baseline="c")


def test_an_unknown_metric_is_refused_with_those_that_the_runs_have(results):
    with pytest.raises(
        UsageError, match=r"--metric val_acc: no run has this metric; they have step, tokens, .*val_loss"
    ):
        results({"k=a": BASE}, metric="val_acc")

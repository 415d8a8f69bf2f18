"""What benchmarks/study_scores.py says of the scores of a study."""

import statistics
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def study_scores(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study_scores

    return study_scores


def test_differences_are_paired_by_seed(study_scores):
    plain, taught = {1: 0.30, 2: 0.34, 3: 0.40}, {1: 0.35, 3: 0.42, 4: 0.9}
    scores = {
        name: {seed: {"cloze acc": value, "cloze acc_norm": 0.5} for seed, value in values.items()}
        for name, values in (("tokens only", plain), ("taught", taught))
    }
    first, second = study_scores.table(scores, ["cloze acc", "cloze acc_norm"]).splitlines()[2:]
    assert first.startswith(f"| tokens only | 3 | 0.3467 ({statistics.stdev(plain.values()):.4f}) | 0.5000")
    assert f"| +{0.035:.4f} ({statistics.stdev([0.05, 0.02]):.4f}) |" in second.replace(", +", " | +")


def test_scores_that_a_run_has_are_not_computed_again(study_scores, tmp_path):
    (tmp_path / "eval").mkdir()
    results = '{"results": {"heldout_cloze": {"alias": "heldout_cloze", "acc,none": 0.5, "acc_stderr,none": 0.1}}}'
    for name in ("heldout", "heldout+piqa_books"):
        (tmp_path / "eval" / f"step_000733_{name}.json").write_text(results, encoding="utf-8")
    assert study_scores.scores_of(tmp_path, "heldout") == {"heldout_cloze acc": 0.5}
    assert study_scores.scores_of(tmp_path, "heldout,piqa", Path("data/books")) == {"heldout_cloze acc": 0.5}

"""The table of scores as data, for the terminal and the report."""

from lightlm.evaluate.compare.baselines import find_baseline
from lightlm.evaluate.compare.comparison import NOISE, compare_all
from lightlm.evaluate.compare.table import Line, Score, score_lines, score_table
from tests.evaluate.compare.test_comparison import BETTER, RIGHT, accuracy, bits


def test_models_have_a_column_each_and_the_better_figure_is_marked():
    models = [[accuracy("a", RIGHT), bits("a", [-10.0], [20])], [accuracy("b", BETTER)]]
    lines = score_lines([[Score(None, None, answer) for answer in model] for model in models])
    table = score_table(lines, ["a", "b"], compare_all(models))
    assert table.columns == ["Task", "Metric", "Documents", "a", "b"]
    assert table.rows[0] == ["quiz", "acc", "100", "0.6000", "0.7500"]
    assert table.rows[1][-1] == ""  # b was not scored on it
    assert table.best == {(0, 4)}
    assert table.sentences[0].startswith("b is better than a")
    assert table.notes == [NOISE]


def test_one_model_stands_beside_published_figures():
    answers = accuracy("a", RIGHT, task="hellaswag", metric="acc_norm")
    score = {0: Score(5, None, answers)}
    lines = [Line("hellaswag", "acc_norm", "100", score), Line("other", "acc_norm", "100", score)]
    table = score_table(lines, ["a"], baselines=[find_baseline("mobilellm")])
    assert table.columns[2:] == ["Documents", "Value ± Stderr", "mobilellm-125m"]
    assert [row[3:] for row in table.rows] == [["0.6000 (step 5)", "0.389* (a)"], ["0.6000 (step 5)", "–"]]
    assert not table.best
    assert table.notes[0].startswith("Published figures, not measured here")

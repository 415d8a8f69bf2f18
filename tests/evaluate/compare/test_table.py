"""The table of scores as data, for the terminal and the report."""

from dataclasses import replace

from lightlm.cli.displays.evaluation import printable
from lightlm.evaluate.compare.baselines import find_baseline
from lightlm.evaluate.compare.comparison import NOISE, compare_all
from lightlm.evaluate.compare.table import ARROW_NOTE, Line, Score, score_lines, score_table
from lightlm.evaluate.results.truncation import Truncation
from tests.evaluate.compare.test_comparison import BETTER, RIGHT, accuracy, bits


def test_models_have_a_column_each_and_the_better_figure_is_marked():
    models = [[accuracy("a", RIGHT), bits("a", [-10.0], [20])], [accuracy("b", BETTER)]]
    lines = score_lines([[Score(None, None, answer) for answer in model] for model in models])
    table = score_table(lines, ["a", "b"], compare_all(models))
    assert table.columns == ["Task", "Metric", "Documents", "a", "b"]
    assert table.rows[0] == ["quiz", "acc ↑", "100", "0.6000", "0.7500"]
    assert table.rows[1][-1] == ""  # b was not scored on it
    assert table.best == {(0, 4)}
    assert table.sentences[0].startswith("b is better than a")
    assert table.rows[1][1] == "bits_per_byte ↓"
    noise, meanings = table.notes
    assert noise == NOISE
    assert meanings.startswith(ARROW_NOTE)
    assert "bits_per_byte: bits that the model needs" in meanings


def test_one_model_stands_beside_published_figures():
    answers = accuracy("a", RIGHT, task="hellaswag", metric="acc_norm")
    score = {0: Score(5, None, answers)}
    lines = [Line("hellaswag", "acc_norm", "100", score), Line("other", "acc_norm", "100", score)]
    table = score_table(lines, ["a"], baselines=[find_baseline("mobilellm")])
    assert table.columns[2:] == ["Documents", "Chance", "Value ± Stderr", "mobilellm-125m\n1T tokens"]
    figure = "0.6000 (step 5)"
    assert [row[3:] for row in table.rows] == [["0.2500", figure, "0.389* (a)"], ["", figure, "–"]]
    assert not table.best
    assert table.notes[1].startswith("Published figures, not measured here")


def test_chance_cut_prompts_and_a_baseline_without_figures_are_told():
    answers = replace(accuracy("a", RIGHT), truncation=Truncation(200, 50, 500, 20), chance=0.5)
    table = score_table(score_lines([[Score(None, None, answers)]]), ["a"], baselines=[find_baseline("gpt2")])
    assert table.rows[0][3] == "0.5000"
    cut, _, missing = table.notes
    assert cut.startswith("quiz: the beginning of 50 of 200 requests was cut to fit the model's context (10 tokens on")
    assert missing.startswith("gpt2-124m has no published figure for these rows; it has some for")


def test_signs_that_a_stream_lacks_are_replaced():
    assert printable("acc ↑ 0.5 ± 0.1 –", "utf-8") == "acc ↑ 0.5 ± 0.1 –"
    assert printable("acc ↑ 0.5 ± 0.1 –", "cp1252") == "acc ^ 0.5 ± 0.1 –"
    assert printable("loss ↓ 0.5 ± 0.1 –", "ascii") == "loss v 0.5 +- 0.1 -"

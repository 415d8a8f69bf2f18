"""Comparisons of two models' scores on the same documents."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lightlm.evaluate.compare.comparison import Answers, Protocol, compare, compare_all, sentences
from lightlm.evaluate.results.documents import Document, documents_file, of_samples, read, write
from lightlm.evaluate.results.rows import Row
from lightlm.evaluate.results.truncation import Truncation

SAME = Protocol(version=1.0, num_fewshot=0, dtype="float32", bos="yes")


def accuracy(model, right, *, task="quiz", metric="acc", protocol=SAME, salt=""):
    """A model's answers: 1 where right."""
    row = Row(task, metric, float(np.mean(right)), None, len(right), True)
    return Answers(model, row, protocol, {i: (f"{salt}{i}", float(value)) for i, value in enumerate(right)})


def bits(model, log_likelihoods, sizes, metric="bits_per_byte"):
    value = -sum(log_likelihoods) / sum(sizes) / math.log(2)
    value = value if metric == "bits_per_byte" else 2**value
    pairs = {i: (str(i), pair) for i, pair in enumerate(zip(log_likelihoods, sizes, strict=True))}
    return Answers(model, Row("heldout", metric, value, None, len(sizes), False), SAME, pairs)


RIGHT = [1] * 60 + [0] * 40
BETTER = [1] * 75 + [0] * 25
CLOSE = [0] * 2 + [1] * 61 + [0] * 37


def test_the_better_model_comes_first_whichever_was_named_first():
    words = "b is better than a at quiz acc by 15.0 points (95% interval 8.0 to 22.0, p < 0.001, 100 documents)"
    assert compare(accuracy("a", RIGHT), accuracy("b", BETTER)).sentence() == words
    words = "b is better than a at quiz acc by 15.0 points (95% interval 8.0 to 22.0, p < 0.001, 100 documents)"
    assert compare(accuracy("b", BETTER), accuracy("a", RIGHT)).sentence() == words


def test_a_small_difference_is_not_called_better():
    found = compare(accuracy("a", RIGHT), accuracy("b", CLOSE))
    assert found.winner is None
    assert found.sentence().startswith("b against a: no difference beyond noise at quiz acc (1.0 points better, 95%")
    assert " worse to " in found.sentence()


def test_fewer_bits_per_byte_are_better():
    rng = np.random.default_rng(1)
    sizes = rng.integers(100, 2000, 50)
    first = [float(-size) for size in sizes]
    second = [float(-0.9 * size * rng.uniform(0.97, 1.03)) for size in sizes]
    found = compare(bits("a", first, sizes), bits("b", second, sizes))
    assert found.winner == 1
    assert "b is better than a at heldout bits_per_byte by 0.14" in found.sentence()
    assert " bits per byte (95% interval 0.13" in found.sentence()
    assert found.difference is not None
    assert found.difference.value == pytest.approx((sum(first) - sum(second)) / sum(sizes) / math.log(2))


def test_a_difference_is_better_or_worse_in_words_and_never_by_its_sign():
    found = compare(bits("a", [-10.0] * 8, [20] * 8), bits("b", [-11.0] * 4 + [-9.5] * 4, [20] * 8))
    assert found.winner is None
    assert " at heldout bits_per_byte (0.0180 bits per byte worse, 95% interval " in found.sentence()
    assert found.to_dict()["difference"] > 0  # more bits are worse
    assert found.to_dict()["higher_is_better"] is False


def test_too_few_documents_are_said_to_be_too_few_without_an_interval():
    for count in (1, 5):
        found = compare(bits("a", [-10.0] * count, [20] * count), bits("b", [-11.0] * count, [20] * count))
        assert found.sentence().startswith("b against a: too few documents to tell at heldout bits_per_byte (")
        assert "interval" not in found.sentence()
        assert found.to_dict()["too_few_documents"]


def test_cut_prompts_are_named_beside_a_comparison():
    first, second = accuracy("a", RIGHT), accuracy("b", BETTER)
    cut = replace(second, truncation=Truncation(200, 50, 500, 20))
    assert "0% and 25% of requests cut" in compare(first, cut).sentence()
    assert "cut" not in compare(first, second).sentence()


def test_two_forms_of_one_figure_are_compared_once():
    models = [
        [bits(name, values, [20, 30], metric) for metric in ("bits_per_byte", "byte_perplexity")]
        for name, values in (("a", [-10.0, -9.0]), ("b", [-11.0, -8.0]))
    ]
    assert [comparison.metric for comparison in compare_all(models)] == ["bits_per_byte"]


def test_among_many_comparisons_each_must_be_the_clearer():
    # 8 documents to 0 give p = 0.008, which is likely to occur by chance among ten comparisons.
    first, second = [0] * 8 + [1] * 30, [1] * 38
    assert compare(accuracy("a", first), accuracy("b", second)).winner == 1
    tasks = [f"quiz{i}" for i in range(10)]
    models = [
        [accuracy("a", first if i == 3 else RIGHT, task=task) for i, task in enumerate(tasks)],
        [accuracy("b", second if i == 3 else RIGHT, task=task) for i, task in enumerate(tasks)],
    ]
    found = compare_all(models)
    assert [comparison.winner for comparison in found] == [None] * 10
    assert found[3].p_value == pytest.approx(10 * 2 / 2**8)
    [line] = sentences(found)
    assert line.startswith("b against a: no difference beyond noise at quiz0 acc (")
    assert "quiz3 acc (21.1 points better, p = 0.078, 38 documents)" in line  # its interval would say otherwise


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"protocol": Protocol(2.0, 0, "float32", "yes")}, "task versions 1.0 and 2.0"),
        ({"protocol": Protocol(1.0, 5, "float32", "yes")}, "0 and 5 examples in the prompt"),
        ({"protocol": replace(SAME, chat="with a chat template")}, "prompts as text and with a chat template"),
        ({"salt": "other"}, "different documents (100 and 100)"),
    ],
)
def test_figures_of_different_tasks_are_not_compared(changed, reason):
    found = compare(accuracy("a", RIGHT), accuracy("b", BETTER, **changed))
    assert (found.winner, found.difference) == (None, None)
    assert "b and a are not compared at quiz acc" in found.sentence()
    assert reason in found.sentence()
    assert reason in found.to_dict()["refused"]


def test_other_documents_and_results_without_any_are_refused():
    assert "different documents (100 and 50)" in compare(accuracy("a", RIGHT), accuracy("b", RIGHT[:50])).reason
    empty = Answers("b", accuracy("b", RIGHT).row, SAME, {})
    assert "b has no scores per document" in compare(accuracy("a", RIGHT), empty).reason


def test_precision_and_bos_are_noted():
    other = Protocol(1.0, 0, "bfloat16", "no")
    sentence = compare(accuracy("a", RIGHT), accuracy("b", BETTER, protocol=other)).sentence()
    assert "b is better" in sentence
    assert "float32 against bfloat16, BOS yes against no)" in sentence


def test_a_figure_that_is_not_a_mean_over_documents_is_refused():
    answers = [accuracy("a", RIGHT), accuracy("b", BETTER)]
    wrong = [Answers(a.model, Row("quiz", "f1", 0.123, None, 100, True), SAME, a.documents) for a in answers]
    for pair in (wrong, (wrong[0], answers[1]), (answers[0], wrong[1])):
        assert "not a mean over documents" in compare(*pair).reason


def test_groups_of_tasks_are_left_to_their_tasks():
    row = Row("group", "acc", 0.5, None, None, True)
    assert compare_all([[Answers("a", row, SAME, {})], [Answers("b", row, SAME, {})]]) == []


def test_documents_survive_the_disk(tmp_path):
    quiz, heldout = {"doc_id": 0, "doc_hash": "x"}, {"doc_id": 4, "doc_hash": "y", "filter": "none"}
    samples = {
        "quiz": [
            quiz | {"filter": "none", "metrics": ["acc", "f1"], "acc": np.float64(1), "f1": "no"},
            quiz | {"filter": "strict", "metrics": ["acc"], "acc": False},
        ],
        "heldout": [heldout | {"metrics": ["bits_per_byte"], "bits_per_byte": (-2.5, 11), "doc": {"text": "long"}}],
    }
    expected = [
        Document("quiz", 0, "x", {"acc": 1.0, "acc (strict)": 0.0}),
        Document("heldout", 4, "y", {"bits_per_byte": (-2.5, 11.0)}),
    ]
    path = documents_file(tmp_path / "step_7_quiz.json")
    assert of_samples(samples) == expected
    write(path, of_samples(samples))
    assert read(path) == expected
    assert "long" not in path.read_text(encoding="utf-8")
    assert read(tmp_path / "missing.documents.jsonl") == []
    path.write_text('{"task": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold scores of documents"):
        read(path)

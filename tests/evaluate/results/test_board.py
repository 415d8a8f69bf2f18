"""The leaderboard's index: published rows, and its error against a simulation."""

import math

import numpy as np
import pytest

from lightlm.evaluate.results.board import PARTS, add_index, index, metric_of, standard_error
from lightlm.evaluate.results.rows import rows
from lightlm.evaluate.settings import Settings

# Percent in the order of PARTS, and the index that the leaderboard or the models' cards give for them.
PUBLISHED = {
    "SmolLM2-135M": ((43.22, 58.63, 29.69, 68.44, 39.20), 27.13),
    "BananaMind-2-Pro": ((42.78, 53.58, 27.82, 67.52, 38.20), 24.96),
    "GPT-X2.5-135M": ((40.57, 51.81, 29.18, 69.42, 38.40), 25.17),
    "Supra2-100M-Base": ((35.98, 47.81, 24.83, 65.40, 36.90), 19.41),
    "Speck1-140M": ((35.03, 46.68, 25.94, 63.87, 36.60), 18.15),
}
DOCUMENTS = {task: part.documents for task, part in PARTS.items()}


def scores_of(percent: tuple[float, ...]) -> dict[str, float]:
    return {task: value / 100 for task, value in zip(PARTS, percent, strict=True)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_scores_give_the_published_index(model: str) -> None:
    percent, published = PUBLISHED[model]
    scores = scores_of(percent)
    assert metric_of(scores) == "index"
    assert index(scores) == pytest.approx(published, abs=0.006)


def test_the_part_index_is_the_mean_of_three_above_chance() -> None:
    hellaswag, easy, challenge, piqa, _ = PUBLISHED["SmolLM2-135M"][0]
    scores = scores_of(PUBLISHED["SmolLM2-135M"][0])
    del scores["arithmark_3"]
    above = [(hellaswag - 25) / 75, ((easy + challenge) / 2 - 25) / 75, (piqa - 50) / 50]
    assert metric_of(scores) == "part_index"
    assert index(scores) == pytest.approx(100 * sum(above) / 3)
    del scores["piqa"]
    assert metric_of(scores) is None


def test_guessing_is_0_and_perfection_100() -> None:
    assert index({task: part.chance for task, part in PARTS.items()}) == pytest.approx(0)
    assert index(dict.fromkeys(PARTS, 1.0)) == pytest.approx(100)


@pytest.mark.parametrize("left_out", [(), ("arithmark_3",)])
def test_the_error_is_the_spread_over_drawn_documents(left_out: tuple[str, ...]) -> None:
    scores = {task: value for task, value in scores_of((43, 58, 30, 68, 39)).items() if task not in left_out}
    generator = np.random.default_rng(0)
    drawn = [
        {task: generator.binomial(DOCUMENTS[task], value) / DOCUMENTS[task] for task, value in scores.items()}
        for _ in range(4_000)
    ]
    spread = np.std([index(one) for one in drawn])
    assert standard_error(scores, DOCUMENTS) == pytest.approx(spread, rel=0.04)


def test_the_error_of_few_documents_is_that_of_lm_eval() -> None:
    """lm-eval divides the variance of a task's documents by their number minus 1."""
    answers = {task: np.arange(5 + n) % 3 == 0 for n, task in enumerate(PARTS)}
    scores = {task: float(right.mean()) for task, right in answers.items()}
    hellaswag, easy, challenge, piqa, arithmark = (
        100 * right.std(ddof=1) / np.sqrt(len(right)) for right in answers.values()
    )
    points = [hellaswag / 0.75, easy / 2 / 0.75, challenge / 2 / 0.75, piqa / 0.5, 0.65 * arithmark / 0.75]
    counts = {task: len(right) for task, right in answers.items()}
    assert standard_error(scores, counts) == pytest.approx(float(np.linalg.norm(points)) / 3.65)


def test_one_document_per_task_has_no_error() -> None:
    assert standard_error(scores_of((43, 58, 30, 68, 39)), dict.fromkeys(PARTS, 1)) is None


def results_of(scores: dict[str, float], documents: dict[str, int], shots: int = 0) -> dict:
    """lm-eval's results with these scores."""
    return {
        "results": {task: {f"{PARTS[task].metric},none": value} for task, value in scores.items()},
        "n-samples": {task: {"original": DOCUMENTS[task], "effective": documents[task]} for task in scores},
        "n-shot": dict.fromkeys(scores, shots),
        "versions": {},
        "higher_is_better": {},
    }


def test_the_index_is_a_group_in_the_results() -> None:
    scores = scores_of(PUBLISHED["SmolLM2-135M"][0])
    results = results_of(scores, DOCUMENTS)
    assert add_index(results, "float32", Settings(["open_slm"])) == []
    first = rows(results)[0]
    assert (first.task, first.metric, first.documents, first.higher_is_better) == ("open_slm", "index", None, True)
    assert first.value == pytest.approx(27.13, abs=0.006)
    assert first.stderr == pytest.approx(0.78, abs=0.01)
    assert results["group_subtasks"]["open_slm"] == list(PARTS)


@pytest.mark.parametrize(
    ("documents", "shots", "dtype", "prompts", "said"),
    [
        (dict.fromkeys(PARTS, 50), 0, "float32", {}, ["50 documents per task"]),
        (DOCUMENTS | {"piqa": 1_837}, 0, "float32", {}, ["1,837 of 1,838 documents of piqa"]),
        (DOCUMENTS, 5, "float32", {}, ["5 examples in the prompt"]),
        (DOCUMENTS, 0, "bfloat16", {"bos": "no"}, ["bfloat16 instead of float32", "--bos no"]),
        (DOCUMENTS, 0, "float32", {"apply_chat_template": True}, ["chat template"]),
        (DOCUMENTS, 0, "float32", {"system_instruction": "Be brief."}, ["system instruction"]),
    ],
)
def test_another_protocol_does_not_give_the_index(documents, shots, dtype, prompts, said) -> None:
    results = results_of(scores_of((43, 58, 30, 68, 39)), documents, shots)
    assert add_index(results, dtype, Settings(["open_slm"], **prompts)) == said
    assert rows(results)[0].metric == "index (off-protocol)"
    assert math.isfinite(rows(results)[0].value)


def test_without_the_scores_there_is_no_index() -> None:
    results = results_of({"hellaswag": 0.4, "piqa": 0.6}, DOCUMENTS)
    assert add_index(results, "float32", Settings(["open_slm"])) == []
    assert "open_slm" not in results["results"]

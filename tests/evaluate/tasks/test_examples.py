"""The texts of evaluation sets that decontamination removes from training data."""

import json
from pathlib import Path

import pytest

from lightlm.data.select.decontamination import Decontaminator
from lightlm.errors import DataError, UsageError
from lightlm.evaluate.tasks import manager
from lightlm.evaluate.tasks.examples import scored_examples
from lightlm.evaluate.tasks.references import SELECTIONS, Selection
from tests.evaluate.tiny_run import write_quiz, write_world

WINOGRANDE_LIKE = """
task: blanks
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/blanks.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: gold
doc_to_target: "{{{{rest}}}}"
doc_to_choice: "{{{{[start + a, start + b]}}}}"
"""


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Skips lm-eval's index: 5 s.
    monkeypatch.setattr(manager, "_OURS", {"heldout", "quiz.yaml", "blanks.yaml"})
    write_quiz(tmp_path)


def test_every_text_and_the_answered_prompt() -> None:
    examples = scored_examples(["quiz.yaml"])["quiz"]
    assert len(examples) == 6
    assert set(examples[1]) >= {"The cat number 1 sat", " on the mat", " after it ran", " faster"}
    assert any("The cat number 1 sat" in text and text.endswith("after it ran") for text in examples[1])


def test_prompts_that_are_chosen_by_number(tmp_path: Path) -> None:
    record = {"start": "The trophy is bigger than the box because the ", "a": "trophy", "b": "box", "gold": 0}
    record["rest"] = "is so very large"
    (tmp_path / "blanks.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (tmp_path / "blanks.yaml").write_text(WINOGRANDE_LIKE.format(folder=tmp_path.as_posix()), encoding="utf-8")
    examples = scored_examples(["blanks.yaml"])
    assert f"{record['start']}trophy is so very large" in examples["blanks"][0]
    found_in = Decontaminator(examples).found_in
    assert found_in("As we know, the trophy is bigger than the box because the trophy is so very large.") == ["blanks"]
    assert found_in("As we know, the trophy is bigger than the box because it is so very large.") == []


def test_a_group_is_searched_without_heldout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SELECTIONS, "small_lm", Selection(("quiz.yaml", "heldout"), frozenset(["heldout"])))
    monkeypatch.setattr(manager, "_OURS", {"small_lm"})
    write_world(Path.cwd())  # a run with data of its own, in which heldout would look
    assert list(scored_examples(["small_lm"])) == ["quiz"]
    for named in ("heldout", "heldout_cloze"):
        with pytest.raises(UsageError, match="--decontaminate heldout"):
            scored_examples(["small_lm", named])


def test_tasks_without_usable_texts() -> None:
    with pytest.raises(UsageError, match="--decontaminate heldout"):
        scored_examples(["heldout"])
    text = Path("quiz.yaml").read_text(encoding="utf-8")
    Path("blanks.yaml").write_text(text.replace("dataset_path: json", "dataset_path: nobody/nothing"), encoding="utf-8")
    with pytest.raises(DataError, match="nobody/nothing"):
        scored_examples(["blanks.yaml"])

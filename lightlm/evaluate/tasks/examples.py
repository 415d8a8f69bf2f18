"""The texts that tasks score, for removing them from training data."""

from collections.abc import Iterator, Sequence
from typing import Any

from lightlm.errors import UsageError
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.evaluate.tasks.patches import quiet
from lightlm.evaluate.tasks.references import CLOZE, HELDOUT


def scored_examples(names: Sequence[str]) -> dict[str, list[list[str]]]:
    """Return by task the scored examples of these tasks, groups or globs, each as a list of texts.

    The split is the one that lm-eval scores, after the task's own cleaning. The texts are all fields of a record
    (question, passage, every answer), and the prompt with the right answer, since many questions are short. Of a group,
    heldout and its cloze are left out: their documents come from the training data.

    Raises:
        UsageError: lm-eval has no such task, or heldout is named, which comes from the training data.
        DataError: a data set cannot be read.
    """
    tasks = Tasks(Settings(list(names)))
    if not {HELDOUT, CLOZE}.isdisjoint(names) or not tasks.foreign:
        raise UsageError(f"--decontaminate {HELDOUT}: its documents come from the data folder; leave it out")
    with quiet():
        loaded = tasks.load(tasks.foreign)["tasks"]
        return {
            name: [[*_texts(record), *_answered(task, record)] for record in task.eval_docs]
            for name, task in loaded.items()
        }


def _answered(task: Any, record: Any) -> Iterator[str]:
    """Yield prompts with right answers; lm-eval gives either as text or as the number of a choice."""
    choices = task.doc_to_choice(record) if task.config.doc_to_choice is not None else []
    prompt, target = task.doc_to_text(record), task.doc_to_target(record)
    prompts = [prompt] if isinstance(prompt, str) else choices
    for answer in target if isinstance(target, list) else [target]:
        if isinstance(answer, int) and 0 <= answer < len(choices):
            answer = choices[answer]
        yield from (f"{prompt} {answer}" for prompt in prompts)


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in a record, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

"""The texts that a task's score is made of, for finding them in training data."""

from collections.abc import Iterator, Sequence
from typing import Any

from lightlm.errors import UsageError
from lightlm.evaluate.runner import Settings, Tasks, quiet
from lightlm.evaluate.tasks.heldout import HELDOUT


def scored_examples(names: Sequence[str]) -> dict[str, list[list[str]]]:
    """For each lm-eval task, group or glob: its task's scored examples, each as the texts in its fields.

    The split is the one that lm-eval scores, after the task's own cleaning. All texts of a record are taken (question,
    passage, every answer), and the prompt with the right answer: many questions are too short to be looked for alone.

    Raises:
        UsageError: lm-eval has no such task, or heldout is among them, which is made of the training data itself.
        DataError: a data set cannot be reached.
    """
    tasks = Tasks(Settings(list(names)))
    if tasks.read_data:
        raise UsageError(f"--decontaminate {HELDOUT}: its documents come from the data folder itself; leave it out")
    with quiet():
        loaded = tasks.load(tasks.names)["tasks"]
        return {
            name: [[*_texts(record), *_answered(task, record)] for record in task.eval_docs]
            for name, task in loaded.items()
        }


def _answered(task: Any, record: Any) -> Iterator[str]:
    """An example's prompts, each with a right answer; lm-eval gives either as text or as the number of a choice."""
    choices = task.doc_to_choice(record) if task.config.doc_to_choice is not None else []
    prompt, target = task.doc_to_text(record), task.doc_to_target(record)
    prompts = [prompt] if isinstance(prompt, str) else choices
    for answer in target if isinstance(target, list) else [target]:
        if isinstance(answer, int) and 0 <= answer < len(choices):
            answer = choices[answer]
        yield from (f"{prompt} {answer}" for prompt in prompts)


def _texts(value: Any) -> Iterator[str]:
    """All strings in a record, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)

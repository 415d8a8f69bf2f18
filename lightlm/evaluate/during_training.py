"""lm-eval's tasks on a model in training: the figures of `eval.tasks`."""

from pathlib import Path

from lightlm.checkpoint import LoadedModel
from lightlm.data.tokenizer import Tokenizer
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.results import rows
from lightlm.evaluate.runner import Settings, Tasks, quiet, run_tasks
from lightlm.model.transformer import Transformer
from lightlm.recipe import EvalSection


class TaskScores:
    """Scores a model as `lightlm eval` would: each task's own number of examples, weights in float32.

    Args:
        section: the recipe's, with its tasks and limit.
        data: the data folder, for the task heldout.

    Raises:
        UsageError: there is no such task.
        DataError: a task's data set cannot be reached.
    """

    def __init__(self, section: EvalSection, data: Path) -> None:
        self._tasks = Tasks(Settings(list(section.tasks), section.limit, data=str(data)))
        with quiet():
            self._tasks.load(self._tasks.names)  # now rather than hours later, and into the cache

    def __call__(self, model: Transformer, tokenizer: Tokenizer, path: Path) -> dict[str, float]:
        """Every metric of every task and group, as `task/metric`; leaves the model in evaluation mode.

        Args:
            path: what lm-eval calls the model.
        """
        lm = LightLM(LoadedModel(model, tokenizer, path), show_progress=False)
        document = run_tasks(lm, self._tasks)
        return {f"{row.task}/{row.metric.replace(' ', '')}": row.value for row in rows(document)}

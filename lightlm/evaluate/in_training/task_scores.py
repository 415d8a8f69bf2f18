"""Scores of lm-eval's tasks during training, for the recipe's `eval.tasks`."""

import threading
from collections.abc import Callable
from pathlib import Path

from lightlm.checkpoint import LoadedModel
from lightlm.data.folder import DataFolder
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import UsageError
from lightlm.evaluate.in_training.sharing import Exchange, Peers, SharedLightLM, StoppedError
from lightlm.evaluate.results.rows import rows
from lightlm.evaluate.runner import run_tasks
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.evaluate.tasks.patches import quiet, results_in_every_process
from lightlm.model.transformer import Transformer
from lightlm.recipe import EvalSection


class TaskScores:
    """Scorer of a model, as by `lightlm eval`: each task's default number of examples, weights in float32.

    Args:
        section: the recipe's `eval`, with tasks and limit.
        data: the data folder, for the task heldout and its cloze.
        peers: the processes that share the work; each has its own scorer.

    Attributes:
        take_notes: returns new notes about the tasks for the user.

    Raises:
        UsageError: a task or the folder `eval.data_dir` does not exist.
        DataError: a task's data set cannot be read.
    """

    def __init__(self, section: EvalSection, data: Path, peers: Peers) -> None:
        if section.data_dir is not None and not Path(section.data_dir).is_dir():
            raise UsageError(
                f"eval.data_dir {section.data_dir} is not a folder; "
                f"`lightlm eval --prefetch {','.join(section.tasks)} --data-dir {section.data_dir}` makes it"
            )
        self._tasks = Tasks(Settings(list(section.tasks), section.limit, data=str(data), data_dir=section.data_dir))
        self._peers = peers
        with quiet():
            self._tasks.load(self._tasks.names)  # so that mistakes show now, and data are cached
        self.take_notes = self._tasks.take_notes

    def __call__(
        self, model: Transformer, tokenizer: Tokenizer, path: Path, stop: threading.Event
    ) -> dict[str, float] | None:
        """Return every metric of every task and group, as `task/metric`; leaves the model in evaluation mode.

        All processes must call this, each with the whole model. All get the figures, or all an error.

        Args:
            path: the model's name in lm-eval's results.
            stop: once set in any process, the evaluation ends within seconds, and the result is None.

        Raises:
            PeerFailedError: the evaluation failed in another process.
        """
        exchange = Exchange(self._peers, stop)
        lm = SharedLightLM(LoadedModel(model, tokenizer, path), exchange)
        try:
            with exchange.broadcasting_failure(), results_in_every_process():
                document = run_tasks(lm, self._tasks, bootstrap_iters=0)
        except StoppedError:
            return None
        return {f"{row.task}/{row.metric.replace(' ', '')}": row.value for row in rows(document)}


def task_evaluator(
    section: EvalSection, data: DataFolder, peers: Peers, note: Callable[[str], None]
) -> Callable[[Transformer, Path, threading.Event], dict[str, float] | None]:
    """Return what scores `eval.tasks` in a training run (see `TaskScores`); notes go to `note`.

    It loads the tasks now, so that a mistake shows before training; the writer first, which downloads what is missing.
    """
    loaded: list[TaskScores] = []

    def load() -> None:
        loaded.append(TaskScores(section, data.path, peers))

    peers.from_writer(load)
    if not peers.is_writer:
        load()

    def pass_notes() -> None:
        for message in loaded[0].take_notes():
            if peers.is_writer:
                note(message)

    def evaluator(model: Transformer, path: Path, stop: threading.Event) -> dict[str, float] | None:
        scores = loaded[0](model, data.tokenizer, path, stop)
        pass_notes()
        return scores

    pass_notes()
    return evaluator

"""Scores of lm-eval's tasks during training, for the recipe's `eval.tasks`."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from lightlm.checkpoint import LoadedModel
from lightlm.data.folder import DataFolder
from lightlm.data.tokenizer import Tokenizer
from lightlm.evaluate.in_training.sharing import Exchange, SharedLightLM, StoppedError
from lightlm.evaluate.results.rows import rows
from lightlm.evaluate.runner import run_tasks
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks.checks import describe
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.evaluate.tasks.patches import quiet
from lightlm.model.transformer import Transformer
from lightlm.recipe import EvalSection

if TYPE_CHECKING:
    from lightlm.train.distributed import World


class TaskScores:
    """Scorer of a model, as by `lightlm eval`: each task's default number of examples, weights in float32.

    It loads the tasks now, so that a mistake shows before training; the writer first, which downloads what is missing.

    Args:
        section: the recipe's `eval`, with tasks and limit.
        data: the run's data, whose folder is that of the task heldout and its cloze.
        tokenizer: that of the model.
        peers: the processes that share the work; each has its own scorer.
        note: called in the writer with notes about the tasks for the user.

    Raises:
        UsageError: a task or the folder `eval.data_dir` does not exist.
        DataError: a task's data set cannot be read.
    """

    def __init__(
        self,
        section: EvalSection,
        data: DataFolder,
        tokenizer: Tokenizer,
        peers: "World",
        note: Callable[[str], object],
    ) -> None:
        self._tokenizer, self._peers = tokenizer, peers
        self._cut: set[str] = set()  # tasks whose cut prompts are noted
        self._note = note if peers.is_writer else lambda message: None
        settings = Settings(list(section.tasks), section.limit, data=str(data.path), data_dir=section.data_dir)

        def load() -> None:
            self._tasks = Tasks(settings, self._note)
            with quiet():
                self._tasks.load(self._tasks.names)

        peers.from_writer(load)
        if not peers.is_writer:
            load()

    def __call__(
        self,
        model: Transformer,
        path: Path,
        stop: threading.Event,
        finished: Callable[[float], None] = lambda share: None,
    ) -> dict[str, float] | None:
        """Return every metric of every task and group, as `task/metric`; leaves the model in evaluation mode.

        A task that fails is left out and noted. How prompts were cut is noted once.

        All processes must call this, each with the whole model. All get the figures, or all an error.

        Args:
            path: the model's name in lm-eval's results.
            stop: once set in any process, the evaluation ends within seconds, and the result is None.
            finished: receives the finished share every few seconds.

        Raises:
            DataError: all tasks failed.
            PeerFailedError: the evaluation failed in another process.
        """
        exchange = Exchange(self._peers, stop)
        lm = SharedLightLM(LoadedModel(model, self._tokenizer, path), exchange, finished)
        # lm-eval returns results only where LOCAL_RANK is 0.
        results_everywhere = mock.patch.dict(os.environ, LOCAL_RANK="0")
        try:
            with exchange.broadcasting_failure(), results_everywhere:
                outcome = run_tasks(lm, self._tasks, bootstrap_iters=0, around=exchange.broadcasting_failure)
        except StoppedError:
            return None
        if outcome.failed:
            self._note(f"eval.tasks at {path.name}: {describe(outcome.failed)}")
        for task, cut in outcome.truncated.items():
            if cut.cut and task not in self._cut:
                self._cut.add(task)
                self._note(f"eval.tasks: {cut.sentence(task, outcome.results['n-shot'].get(task))}")
        return {f"{row.task}/{row.metric.replace(' ', '')}": row.value for row in rows(outcome.results)}

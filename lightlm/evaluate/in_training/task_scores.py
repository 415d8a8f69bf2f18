"""lm-eval's tasks on a model in training: the figures of `eval.tasks`."""

import os
import threading
from pathlib import Path
from unittest import mock

from lightlm.checkpoint import LoadedModel
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import UsageError
from lightlm.evaluate.in_training.sharing import Meetings, Peers, SharedLightLM, StoppedError
from lightlm.evaluate.results.store import rows
from lightlm.evaluate.runner import Settings, Tasks, quiet, run_tasks
from lightlm.model.transformer import Transformer
from lightlm.recipe import EvalSection


class TaskScores:
    """Scores a model as `lightlm eval` would: each task's own number of examples, weights in float32.

    Args:
        section: the recipe's, with its tasks and limit.
        data: the data folder, for the task heldout and its cloze.
        peers: the processes that share the work; each has an object of its own.

    Attributes:
        take_notes: gives what the user should know of the tasks and has not been told yet.

    Raises:
        UsageError: there is no such task, or no folder `eval.data_dir`.
        DataError: a task's data set cannot be reached.
    """

    def __init__(self, section: EvalSection, data: Path, peers: Peers) -> None:
        if section.data_dir is not None and not Path(section.data_dir).is_dir():
            raise UsageError(
                f"eval.data_dir {section.data_dir} is no folder; "
                f"`lightlm eval --prefetch {','.join(section.tasks)} --data-dir {section.data_dir}` makes it"
            )
        self._tasks = Tasks(Settings(list(section.tasks), section.limit, data=str(data), data_dir=section.data_dir))
        self._peers = peers
        with quiet():
            self._tasks.load(self._tasks.names)  # now rather than hours later, and into the cache
        self.take_notes = self._tasks.take_notes

    def __call__(
        self, model: Transformer, tokenizer: Tokenizer, path: Path, stop: threading.Event
    ) -> dict[str, float] | None:
        """Every metric of every task and group, as `task/metric`; leaves the model in evaluation mode.

        All processes must call it, each with the whole model, and all get the figures, or an error.

        Args:
            path: what lm-eval calls the model.
            stop: set in any process, it ends the evaluation within seconds, and the result is None.

        Raises:
            PeerFailedError: it failed in another process.
        """
        meetings = Meetings(self._peers, stop)
        lm = SharedLightLM(LoadedModel(model, tokenizer, path), meetings)
        try:
            # lm-eval gives results to the process with LOCAL_RANK 0 alone; here each has all answers.
            with meetings.attended(), mock.patch.dict(os.environ, LOCAL_RANK="0"):
                document = run_tasks(lm, self._tasks, bootstrap_iters=0)
        except StoppedError:
            return None
        return {f"{row.task}/{row.metric.replace(' ', '')}": row.value for row in rows(document)}

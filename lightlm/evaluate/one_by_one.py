"""Tasks checked together and scored one after the other, so that a failing task costs only its own results."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

from lightlm.errors import DataError
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.results.truncation import Truncation
from lightlm.evaluate.tasks.checks import (
    Findings,
    build_requests,
    check_requests,
    check_settings,
    describe,
    prepared,
    reason_of,
)

Around = Callable[[], contextlib.AbstractContextManager[None]]
_evaluate = evaluator.evaluate


@dataclass
class OneByOne:
    """Replacement for lm-eval's `evaluate`, which scores all tasks together.

    Args:
        note: called with each oddity of a task.
        around: makes a context manager for the scoring of a task; what it raises counts as the task's failure.
        on_done: called with the results so far after each task.

    Attributes:
        failed: reasons by task.
        truncated: how the requests were cut, by task.
        chances: the accuracy that guessing reaches, by task with choices.
        interruption: what ended the evaluation early, such as Ctrl-C. The tasks that were finished have results.
    """

    note: Callable[[str], object]
    around: Around = contextlib.nullcontext
    on_done: Callable[[dict[str, Any]], object] = lambda results: None
    failed: dict[str, str] = field(default_factory=dict)
    truncated: dict[str, Truncation] = field(default_factory=dict)
    chances: dict[str, float] = field(default_factory=dict)
    interruption: BaseException | None = None

    def __call__(self, lm: LightLM, task_dict: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Check all tasks, then score each, and return lm-eval's results for those that worked.

        Raises:
            DataError: some tasks cannot be scored, found before any is; or all failed.
        """
        tasks: dict[str, Task] = task_dict["tasks"]
        self._check(lm, tasks, options)
        finished: dict[str, dict[str, Any]] = {}
        for name, task in tasks.items():
            lm.begin(name)
            try:
                with self.around(), prepared(task):
                    finished[name] = _evaluate(lm=lm, task_dict={"tasks": {name: task}, "groups": {}}, **options)
            except Exception as error:
                self.failed[name] = reason_of(error)
                continue
            except (KeyboardInterrupt, SystemExit) as error:
                if not finished:
                    raise
                self.interruption = error
                break
            finally:
                task._instances = None  # the requests and documents of a large task are hundreds of megabytes
            self.truncated[name] = lm.truncation
            if len(finished) < len(tasks):
                self.on_done(_merge(finished, task_dict["groups"]))
        if not finished:
            raise DataError(describe(self.failed))
        return _merge(finished, task_dict["groups"])

    def _check(self, lm: LightLM, tasks: Mapping[str, Task], options: Mapping[str, Any]) -> None:
        """Build all requests, and raise the problems of all tasks together."""
        findings = Findings()
        for name, task in tasks.items():
            wrong = len(findings.problems)
            check_settings(task, lm, findings)
            if len(findings.problems) > wrong or not build_requests(task, lm, options, findings):
                continue
            chance = check_requests(task, lm, findings)
            if chance is not None:
                self.chances[name] = chance
        findings.raise_problems()
        for note in findings.notes:
            self.note(note)


def _merge(finished: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of tasks as those of one evaluation, with the groups of which no task is missing."""

    def all_of(key: str) -> dict[str, Any]:
        return {name: value for results in finished.values() for name, value in results.get(key, {}).items()}

    whole = {
        name: group
        for name, group in groups.items()
        if {task.task_name for task in group.get_all_tasks()} <= {*finished}
    }
    merged = EvalAcc(
        metrics=all_of("results"),
        configs=all_of("configs"),
        versions=all_of("versions"),
        num_fewshot=all_of("n-shot"),
        higher_is_better=all_of("higher_is_better"),
        n_samples=all_of("n-samples"),
        groups=whole,
    )
    return dict(aggregate_groups(merged)._to_eval_results(samples=all_of("samples") or None))

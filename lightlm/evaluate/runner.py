"""Stock lm-eval tasks and `heldout` on one model: loading, running, and errors that a user can act on."""

import contextlib
import difflib
import functools
import logging
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lightlm.data.hub import hub_answers, offline, quiet_libraries
from lightlm.errors import DataError, UsageError
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.heldout import HELDOUT, TASKS
from lightlm.evaluate.templates import compiled_once

_OURS = {path.stem for path in TASKS.glob("*.yaml")}
_CHATTY = ("lm_eval", "filelock", "urllib3", "evaluate")


@dataclass(frozen=True)
class Settings:
    """What is asked of every model.

    Args:
        tasks: tasks, groups, tags, glob patterns or YAML files, as in lm-eval's `--tasks`.
        limit: documents a task; None runs all.
        num_fewshot: examples in the prompt; None is each task's own default.
        data: the data folder of the task heldout; None is that of the model's run.
    """

    tasks: list[str]
    limit: int | None = None
    num_fewshot: int | None = None
    data: str | None = None


class Tasks(TaskManager):
    """lm-eval's tasks and ours, and the names chosen among them.

    Raises:
        UsageError: a name matches no task, there is none, or heldout is to have examples in its prompt.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.tasks:
            raise UsageError("--tasks names no task; for example --tasks heldout,hellaswag")
        # lm-eval reads thousands of YAML files to know its tasks (several seconds); heldout alone needs none of them.
        # lm-eval hands this very dict to every task that it builds, so `for_model` can change it.
        metadata = {"pretrained": ""} | ({"data": settings.data} if settings.data else {})
        super().__init__(include_path=[TASKS], include_defaults=not set(settings.tasks) <= _OURS, metadata=metadata)
        self.settings = settings
        self._about_model = metadata
        self.names = [match for name in settings.tasks for match in self._match(name)]
        if settings.num_fewshot and HELDOUT in self.names:
            raise UsageError(
                f"--num-fewshot {settings.num_fewshot}: the task {HELDOUT} reads documents as they are, without "
                "examples before them; leave the option out, or score the other tasks in a call of their own"
            )

    def _match(self, name: str) -> list[str]:
        if name.endswith(".yaml") and Path(name).is_file():
            return [name]
        if matches := self.match_tasks([name]):
            return sorted(matches)
        near = difflib.get_close_matches(name, self.all_tasks, n=5) or [t for t in self.all_tasks if name in t][:5]
        hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
        raise UsageError(f"lm-eval has no task '{name}'; {hint}")

    def for_model(self, path: Path) -> "Tasks":
        """Tell the tasks which model they will see, as lm-eval's own command does."""
        self._about_model["pretrained"] = str(path)
        return self

    def load(self, task_list: Any) -> Any:
        """lm-eval's load.

        Raises:
            DataError: a task's data set cannot be reached, or a package that the task needs is missing.
        """
        try:
            with self._no_vain_retries():
                return super().load(task_list)
        except ImportError as error:
            raise DataError(f"a task in {', '.join(self.names)} needs a package: {error}") from None
        except (OSError, ValueError) as error:
            raise DataError(self._unreachable(error)) from None

    def _no_vain_retries(self) -> contextlib.AbstractContextManager[object]:
        """Let `datasets` look into its cache at once where the Hub gives no answer: it would try for 30 s first."""
        if set(self.names) <= {HELDOUT} or hub_answers():
            return contextlib.nullcontext()
        return offline()

    def _unreachable(self, error: Exception) -> str:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        name = re.search(r"[\w.-]+/[\w.-]+", reason)
        if name is None:
            return f"the tasks {', '.join(self.names)} cannot be loaded: {reason}"
        if "OfflineModeIsEnabled" in reason and not constants.HF_HUB_OFFLINE:  # our doing, see `load`
            reason = f"no answer from {constants.ENDPOINT}, and it is not in the cache"
        return (
            f"the data set {name[0]}, needed for {', '.join(self.names)}, cannot be reached ({reason}). "
            f"To work offline, put its files into a folder {name[0]} below the current directory and set "
            f"HF_HUB_OFFLINE=1, or run once online to fill the cache. The task heldout needs nothing from outside."
        )


def run_tasks(lm: LightLM, tasks: Tasks, *, log_samples: bool = False) -> dict[str, Any]:
    """Evaluate one model; returns lm-eval's own results document, as its command would write it.

    Args:
        log_samples: add `samples`: of each task its documents with prompts, answers and figures.

    Raises:
        DataError: a data set cannot be reached.
        LightLMError: the model's context is too short for a task.
    """
    path = lm.loaded.path
    tracker = EvaluationTracker()
    arguments = {"pretrained": str(path), "dtype": str(lm.model.embed_tokens.weight.dtype).removeprefix("torch.")}
    with quiet(), compiled_once():
        results: dict[str, Any] = simple_evaluate(
            model=lm,
            model_args=arguments,
            tasks=tasks.names,
            task_manager=tasks.for_model(path),
            limit=tasks.settings.limit,
            num_fewshot=tasks.settings.num_fewshot,
            batch_size=lm.limits.sequences or "auto",
            device=str(lm.device),
            evaluation_tracker=tracker,
            log_samples=log_samples,
        )
    tracker.general_config_tracker.log_end_time()
    results["task_hashes"] = {}
    results.update(asdict(tracker.general_config_tracker))
    results["config"]["model"] = results["model_source"] = "lightlm"
    return results


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval and the Hub's libraries below errors, and keep what they print off standard output."""
    with (
        quiet_libraries(*_CHATTY, level=logging.ERROR),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        # lm-eval asks git for a commit; outside a repository git's complaint would go to the terminal.
        mock.patch.object(
            subprocess, "check_output", functools.partial(subprocess.check_output, stderr=subprocess.DEVNULL)
        ),
    ):
        yield

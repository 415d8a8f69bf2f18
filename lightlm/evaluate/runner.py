"""Stock lm-eval tasks and `heldout` on one model: loading, running, and errors that a user can act on."""

import contextlib
import difflib
import functools
import logging
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from lightlm.data.sources.hub.client import first_line, hub_answers, hub_errors, offline, quiet_libraries
from lightlm.errors import DataError, UsageError
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.tasks.data_sets import DataSets, find_data_dir, unreadable
from lightlm.evaluate.tasks.heldout import CLOZE, HELDOUT, TASKS, TooFewDocumentsError, load_cloze
from lightlm.evaluate.tasks.index import check_tasks_folder, stock_tasks
from lightlm.evaluate.tasks.needs import Need, needs_of
from lightlm.evaluate.tasks.templates import compiled_once

_OURS = {path.stem for path in TASKS.glob("*.yaml")}
BOS = {"auto": None, "yes": True, "no": False}  # as the harness's `add_bos_token`
warn = logging.getLogger("lightlm").warning
_CHATTY = ("lm_eval", "filelock", "urllib3", "evaluate")


@dataclass(frozen=True)
class Settings:
    """What is asked of every model.

    Args:
        tasks: tasks, groups, tags, glob patterns or YAML files, as in lm-eval's `--tasks`.
        limit: documents a task; None runs all.
        num_fewshot: examples in the prompt; None is each task's own default.
        data: the data folder of heldout and its cloze; None is that of the model's run.
        include_path: a folder with tasks beside lm-eval's own, which they replace where names are the same.
        data_dir: a folder with data sets, laid out like the Hub; None is the environment's LIGHTLM_EVAL_DATA, if set.
        bos: what stands before contexts: `auto`, `yes` or `no` (see `LightLM`).
        dtype: what was asked for as the models' precision, for the results' names.
    """

    tasks: list[str]
    limit: int | None = None
    num_fewshot: int | None = None
    data: str | None = None
    include_path: str | None = None
    data_dir: str | None = None
    bos: str = "auto"
    dtype: str = "auto"


class Tasks(TaskManager):
    """lm-eval's tasks and ours, and the names chosen among them; with `heldout` comes its cloze.

    Attributes:
        names: the tasks. A cloze that came with `heldout` is left out, with a note, where data or model have none.

    Raises:
        UsageError: a name matches no task, there is none, heldout is to have examples in its prompt, or a folder that
            the settings name is not there.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.tasks:
            raise UsageError("--tasks names no task; for example --tasks heldout,hellaswag")
        if settings.bos not in BOS:
            raise UsageError(f"--bos {settings.bos}: choose {', '.join(BOS)}")
        self.settings = settings
        self.data_sets = DataSets(find_data_dir(settings.data_dir))
        folders = [TASKS]
        if settings.include_path is not None:
            folders.append(check_tasks_folder(Path(settings.include_path)))
        # lm-eval hands this very dict to every task that it builds, so `for_model` can change it.
        self._about_model = {"pretrained": ""} | ({"data": settings.data} if settings.data else {})
        super().__init__(include_path=folders, include_defaults=False, metadata=self._about_model)
        if not set(settings.tasks) <= _OURS:
            self._add_stock_tasks()
        self.names = [match for name in settings.tasks for match in self._match(name)]
        self._notes: dict[str, bool] = {}  # and whether it was taken
        self._cloze_may_lack = HELDOUT in self.names and CLOZE not in self.names
        if self._cloze_may_lack:
            self.names.insert(self.names.index(HELDOUT) + 1, CLOZE)
        if settings.num_fewshot and self.read_data:
            raise UsageError(
                f"--num-fewshot {settings.num_fewshot}: the task {HELDOUT} reads documents as they are, without "
                "examples before them; leave the option out, or score the other tasks in a call of their own"
            )

    @property
    def read_data(self) -> bool:
        """Whether some of them are made of a data folder."""
        return not {HELDOUT, CLOZE}.isdisjoint(self.names)

    def _add_stock_tasks(self) -> None:
        """What `include_defaults` does, without reading thousands of files each time."""
        stock = stock_tasks()
        if replaced := sorted(name for name in self._index if name in stock and self._index[name].kind is not Kind.TAG):
            warn(f"{self.settings.include_path}: {', '.join(replaced)} replace lm-eval's tasks of the same name")
        self._index: dict[str, Entry] = stock | self._index
        kinds = {name: entry.kind for name, entry in self._index.items()}
        self._all_tasks = sorted(kinds)
        self._all_subtasks = sorted(name for name, kind in kinds.items() if kind in (Kind.TASK, Kind.PY_TASK))
        self._all_groups = sorted(name for name, kind in kinds.items() if kind is Kind.GROUP)
        self._all_tags = sorted(name for name, kind in kinds.items() if kind is Kind.TAG)

    def _match(self, name: str) -> list[str]:
        if name.endswith(".yaml") and Path(name).is_file():
            return [name]
        if matches := self.match_tasks([name]):
            return sorted(matches)
        near = difflib.get_close_matches(name, self.all_tasks, n=5) or [t for t in self.all_tasks if name in t][:5]
        hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
        raise UsageError(f"lm-eval has no task '{name}'; {hint}")

    @property
    def foreign(self) -> list[str]:
        """The chosen names of lm-eval's tasks and a user's: all but ours, which know their data from the model."""
        return [name for name in self.names if name not in _OURS]

    def for_model(self, path: Path) -> "Tasks":
        """Tell the tasks which model they will see, as lm-eval's own command does."""
        self._about_model["pretrained"] = str(path)
        return self

    def load(self, task_list: Any) -> Any:
        """lm-eval's load.

        Raises:
            DataError: data sets cannot be read (the message lists all), or a package that the task needs is missing.
        """
        if self._cloze_may_lack and CLOZE in task_list:
            task_list = self._without_lacking_cloze(task_list)
        try:
            with self._no_vain_retries(), self.data_sets.in_use():
                return super().load(task_list)
        except ImportError as error:
            raise DataError(f"a task in {', '.join(self.names)} needs a package: {error}") from None
        except hub_errors() as error:
            self.require_data()
            raise DataError(f"the tasks {', '.join(self.names)} cannot be loaded: {first_line(error)}") from None

    def _without_lacking_cloze(self, names: list[str]) -> list[str]:
        try:
            load_cloze(**self._about_model)
        except TooFewDocumentsError as error:
            self._notes.setdefault(str(error), False)
            return [name for name in names if name != CLOZE]
        return names

    def fitting(self, lm: LightLM) -> list[str]:
        """The names, without a cloze that came with `heldout` and has endings longer than the model's context."""
        names = self.names
        if self._cloze_may_lack:
            names = self._without_lacking_cloze(names)
        if not self._cloze_may_lack or CLOZE not in names:
            return names
        endings = (ending for row in load_cloze(**self._about_model)["validation"] for ending in row["endings"])
        longest = max(len(lm.tok_encode(f" {ending}")) for ending in endings)
        if longest <= lm.max_length:
            return names
        self._notes.setdefault(
            f"{CLOZE} is left out: its endings have up to {longest} tokens, the model's context {lm.max_length}", False
        )
        return [name for name in names if name != CLOZE]

    def take_notes(self) -> list[str]:
        """What the user should know of the tasks and has not been told yet."""
        new = [note for note, taken in self._notes.items() if not taken]
        self._notes = dict.fromkeys(self._notes, True)
        return new

    def needs(self) -> list[Need]:
        """The data sets that the tasks read, without those of a task's own making, as heldout's.

        Raises:
            DataError: a task cannot be read, or a package that it needs is missing.
        """
        try:
            return needs_of(self, self.names, self._about_model)
        except ImportError as error:
            raise DataError(f"a task in {', '.join(self.names)} needs a package: {error}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"the tasks {', '.join(self.names)} cannot be loaded: {first_line(error)}") from None

    def require_data(self) -> None:
        """Read every data set that the tasks need, so that all those missing are known before a model is loaded.

        Raises:
            DataError: some cannot be read; see also `needs`.
        """
        with quiet():
            needs = self.needs()
            with self._no_vain_retries(needs):
                missing = self.data_sets.missing(needs)
        if missing:
            raise unreadable(missing, ",".join(self.settings.tasks), self.settings.include_path, self.data_sets.folder)

    def _no_vain_retries(self, needs: list[Need] | None = None) -> contextlib.AbstractContextManager[object]:
        """Let `datasets` look into its cache at once where the Hub gives no answer: it would try for 30 s first."""
        if needs is None:
            needs = self.needs()
        all_here = all(self.data_sets.is_local(need) for need in needs)
        # Without any need, a task of lm-eval's fetches its data by code of its own.
        if (all_here and (needs or not self.foreign)) or hub_answers():
            return contextlib.nullcontext()
        return offline()


def run_tasks(
    lm: LightLM, tasks: Tasks, *, bootstrap_iters: int = 100_000, log_samples: bool = False
) -> dict[str, Any]:
    """Evaluate one model; returns lm-eval's own results document, as its command would write it.

    Args:
        bootstrap_iters: resamples for standard errors, by default as many as lm-eval's; 0 leaves all of them out.
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
            tasks=tasks.for_model(path).fitting(lm),
            task_manager=tasks,
            limit=tasks.settings.limit,
            bootstrap_iters=bootstrap_iters,
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

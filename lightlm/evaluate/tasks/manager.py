"""lm-eval's tasks and ours, chosen by name and checked before any model loads."""

import contextlib
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from lightlm.data.sources.hub.client import first_line, hub_answers, hub_errors, offline
from lightlm.errors import DataError, UsageError
from lightlm.evaluate.settings import BOS, Settings
from lightlm.evaluate.tasks.data_sets import DataSets, find_data_dir, unreadable
from lightlm.evaluate.tasks.heldout import CLOZE, HELDOUT, TASKS, TooFewDocumentsError, load_cloze
from lightlm.evaluate.tasks.index import check_tasks_folder, index_from_cache
from lightlm.evaluate.tasks.needs import Need, needs_of
from lightlm.evaluate.tasks.patches import quiet

_OURS = {path.stem for path in TASKS.glob("*.yaml")}


class Tasks(TaskManager):
    """lm-eval's tasks and ours, and the names chosen among them. The task `heldout` adds its cloze.

    Attributes:
        names: the chosen tasks.

    Raises:
        UsageError: a name matches no task, no name is given, heldout is to have examples in its prompt, or a folder
            that the settings name does not exist.
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
        # lm-eval passes this very dict to every task that it builds, so `for_model` can change it.
        self._about_model = {"pretrained": ""} | ({"data": settings.data} if settings.data else {})
        with index_from_cache(include_stock=not set(settings.tasks) <= _OURS):
            super().__init__(include_path=folders, metadata=self._about_model)
        self.names = [match for name in settings.tasks for match in self._match(name)]
        self._notes: dict[str, bool] = {}  # True once taken
        self._cloze_optional = HELDOUT in self.names and CLOZE not in self.names
        if self._cloze_optional:
            self.names.insert(self.names.index(HELDOUT) + 1, CLOZE)
        if settings.num_fewshot and self.read_data:
            raise UsageError(
                f"--num-fewshot {settings.num_fewshot}: the task {HELDOUT} takes no examples in its prompt; "
                "leave the option out, or score the other tasks in a separate call"
            )

    @property
    def read_data(self) -> bool:
        """Whether a chosen task is made from a data folder."""
        return not {HELDOUT, CLOZE}.isdisjoint(self.names)

    @property
    def foreign(self) -> list[str]:
        """The chosen names without ours, which get their data from the model's run."""
        return [name for name in self.names if name not in _OURS]

    def _match(self, name: str) -> list[str]:
        if name.endswith(".yaml") and Path(name).is_file():
            return [name]
        if matches := self.match_tasks([name]):
            return sorted(matches)
        near = difflib.get_close_matches(name, self.all_tasks, n=5) or [t for t in self.all_tasks if name in t][:5]
        hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
        raise UsageError(f"lm-eval has no task '{name}'; {hint}")

    def for_model(self, path: Path) -> "Tasks":
        """Set the model that the tasks are for, as lm-eval's own command does."""
        self._about_model["pretrained"] = str(path)
        return self

    def load(self, task_list: Any) -> Any:
        """Build tasks as lm-eval's `load` does.

        Raises:
            DataError: data sets cannot be read (the message lists all), or a task needs a package that is missing.
        """
        if self._cloze_optional and CLOZE in task_list:
            task_list = self._without_missing_cloze(task_list)
        try:
            with self._without_retries(), self.data_sets.in_use():
                return super().load(task_list)
        except ImportError as error:
            raise self._lacks_package(error) from None
        except hub_errors() as error:
            self.require_data()
            raise self._cannot_load(error) from None

    def _lacks_package(self, error: ImportError) -> DataError:
        return DataError(f"a task in {', '.join(self.names)} needs a package: {error}")

    def _cannot_load(self, error: BaseException) -> DataError:
        return DataError(f"the tasks {', '.join(self.names)} cannot be loaded: {first_line(error)}")

    def _without_missing_cloze(self, names: list[str]) -> list[str]:
        try:
            load_cloze(**self._about_model)
        except TooFewDocumentsError as error:
            return self._without_cloze(names, str(error))
        return names

    def _without_cloze(self, names: list[str], note: str) -> list[str]:
        self._notes.setdefault(note, False)
        return [name for name in names if name != CLOZE]

    def fitting(self, count_tokens: Callable[[str], int], max_length: int) -> list[str]:
        """Return the names, without an optional cloze whose endings exceed the model's context of `max_length`."""
        if not self._cloze_optional:
            return self.names
        names = self._without_missing_cloze(self.names)
        if CLOZE not in names:
            return names
        rows = load_cloze(**self._about_model)["validation"]
        longest = max(count_tokens(f" {ending}") for row in rows for ending in row["endings"])
        if longest <= max_length:
            return names
        note = f"{CLOZE} is left out: its endings have up to {longest} tokens, the model's context has {max_length}"
        return self._without_cloze(names, note)

    def take_notes(self) -> list[str]:
        """Return notes for the user that were not returned before."""
        new = [note for note, taken in self._notes.items() if not taken]
        self._notes = dict.fromkeys(self._notes, True)
        return new

    def needs(self) -> list[Need]:
        """Return the data sets that the tasks read, except those that a task makes itself, such as heldout.

        Raises:
            DataError: a task cannot be read, or needs a package that is missing.
        """
        try:
            return needs_of(self, self.names, self._about_model)
        except ImportError as error:
            raise self._lacks_package(error) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._cannot_load(error) from None

    def require_data(self) -> None:
        """Read every data set that the tasks need, so that all missing ones are reported before a model loads.

        Raises:
            DataError: some cannot be read; see also `needs`.
        """
        with quiet():
            needs = self.needs()
            with self._without_retries(needs):
                missing = self.data_sets.missing(needs)
        if missing:
            raise unreadable(missing, ",".join(self.settings.tasks), self.settings.include_path, self.data_sets.folder)

    def _without_retries(self, needs: list[Need] | None = None) -> contextlib.AbstractContextManager[object]:
        """Make `datasets` use its cache at once if the Hub does not answer; otherwise it retries for 30 s."""
        if needs is None:
            needs = self.needs()
        all_here = all(self.data_sets.is_local(need) for need in needs)
        # Tasks without a need may fetch their data with code of their own.
        if (all_here and (needs or not self.foreign)) or hub_answers():
            return contextlib.nullcontext()
        return offline()

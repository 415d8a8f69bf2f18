"""lm-eval's tasks and ours, chosen by name and checked before any model loads."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from datasets.exceptions import DatasetGenerationError
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager, _factory

from lightlm.data.sources.hub.client import first_line, hub_answers, hub_errors, offline
from lightlm.errors import DataError, LightLMError, UsageError
from lightlm.evaluate.results import board
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks import heldout
from lightlm.evaluate.tasks.checks import describe, explain, reason_of
from lightlm.evaluate.tasks.data_sets import DataSets, Need, fetch_command, unreadable, why_missing
from lightlm.evaluate.tasks.heldout import TooFewDocumentsError, common_folder, load_cloze
from lightlm.evaluate.tasks.index import check_tasks_folder, index_from_cache
from lightlm.evaluate.tasks.patches import quiet
from lightlm.evaluate.tasks.references import CLOZE, HELDOUT, SELECTIONS, TASKS, find_data_dir, unknown_task
from lightlm.evaluate.tasks.references import SELF_CONTAINED as _OURS
from lightlm.names import warn

_NAMED_TASKS = 5  # in a message
_BLIMP_TIES = "blimp_ties"  # scores BLiMP's own tasks with another metric beside theirs


class _Described(ConfigurableTask):
    """A task with its configuration and without data."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.source = config.pop("class", None)
        self._config = TaskConfig(**config)


class _Describer(_factory.TaskFactory):
    """lm-eval's factory, stopped before it loads data."""

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Task:
        config = self._load_full_config(entry, overrides)
        # Tasks in Python may have further keys.
        known = TaskConfig.__dataclass_fields__.keys() - {"tag"} | {"class"}
        return _Described({key: value for key, value in config.items() if key in known})


class _Builder(_factory.TaskFactory):
    """lm-eval's factory that notes the tasks it cannot build, instead of stopping at the first.

    Args:
        failed: receives (task, reason, whether its data could not be read).
    """

    def __init__(self, meta: dict[str, Any], failed: list[tuple[str, str, bool]]) -> None:
        super().__init__(meta=meta)
        self._failed = failed

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Task:
        try:
            return super()._build_task(entry, overrides)
        except (ImportError, LightLMError):
            raise
        except Exception as error:
            name = (overrides or {}).get("task", entry.name)
            self._failed.append((name, reason_of(error), isinstance(error, hub_errors())))
            return _Described({"task": name})

    def configurable(self) -> type[ConfigurableTask]:
        """Return the class for tasks in YAML, which stay incomplete when they fail."""
        failed = self._failed

        class Explained(ConfigurableTask):
            def __init__(self, *args: Any, config: dict[str, Any], **options: Any) -> None:
                try:
                    super().__init__(*args, config=config, **options)
                except (ImportError, LightLMError):
                    raise
                except Exception as error:
                    if self.config is None:
                        self._config = TaskConfig(task=config["task"])
                    unread = not hasattr(self, "dataset") and isinstance(error, hub_errors())
                    failed.append((config["task"], explain(self, error), unread))

        return Explained


class Tasks(TaskManager):
    """lm-eval's tasks and ours, and the names chosen among them. The task `heldout` adds its cloze.

    Args:
        note: called once with each note for the user.

    Attributes:
        names: the chosen tasks. Those that a selection such as `open_slm` may miss leave it, with a note, once their
            data cannot be read.
        board: whether the leaderboard's index is asked for.

    Raises:
        UsageError: a name matches no task, heldout is to have examples in its prompt, or a folder
            that the settings name does not exist.
    """

    def __init__(self, settings: Settings, note: Callable[[str], object] = warn) -> None:
        self.settings, self._report, self._noted = settings, note, set[str]()
        self._lm: TemplateLM | None = None
        self.data_sets = DataSets(find_data_dir(settings.data_dir))
        folders = [TASKS]
        if settings.include_path is not None:
            folders.append(check_tasks_folder(Path(settings.include_path)))
        # lm-eval passes this very dict to every task that it builds, so `for_model` can change it.
        self._about_model = {"pretrained": ""} | ({"data": settings.data} if settings.data else {})
        with index_from_cache(include_stock=not set(settings.tasks) <= _OURS):
            super().__init__(include_path=folders, metadata=self._about_model)
        chosen = [SELECTIONS[name] for name in settings.tasks if name in SELECTIONS]
        self.board = any(set(board.PARTS) <= set(selection.tasks) for selection in chosen)
        self.names = list(dict.fromkeys(match for name in settings.tasks for match in self._match(name)))
        if _BLIMP_TIES in self.names:  # with it come the others' figures
            self.names = [name for name in self.names if name == _BLIMP_TIES or not name.startswith("blimp")]
        # Optional in all selections that have them, and not named by themselves.
        required = {task for selection in chosen for task in selection.tasks if task not in selection.optional}
        required.update(match for name in settings.tasks if name not in SELECTIONS for match in self._match(name))
        self._optional = [name for name in self.names if name not in required]
        self._left_out, self._optional_checked = set[str](), False
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
        """The chosen names without those that get their data from the model's run."""
        return [name for name in self.names if name not in (HELDOUT, CLOZE)]

    @property
    def dtype(self) -> str:
        """The precision to load models in: what the settings say, and the leaderboard's instead of `auto`."""
        return board.DTYPE if self.board and self.settings.dtype == "auto" else self.settings.dtype

    def find_data(self, models: Sequence[str | Path | None], data: str | None = None) -> Path | None:
        """Return the folder of heldout's documents for these models (see `common_folder`); None if none is needed.

        Raises:
            UsageError: the models' runs have different folders.
            DataError: there is no folder, or none with documents to score; without `data`, heldout may be left out.
        """
        if not self.read_data:
            return None
        try:
            folder = common_folder(models, data)
            if HELDOUT in self._optional:
                heldout.load(data=str(folder))
            return folder
        except DataError as error:
            if HELDOUT not in self._optional or data:
                raise
            self._leave_out(HELDOUT, str(error))
            return None

    def _leave_out(self, name: str, reason: str) -> None:
        """Score the other tasks without this one, which is optional, and say so."""
        self._left_out |= {name, CLOZE} if name == HELDOUT else {name}
        self.names = [other for other in self.names if other not in self._left_out]
        self.note(f"{', '.join(self.settings.tasks)}: {name} is left out: {reason}")

    def _leave_out_unreadable(self) -> None:
        """Leave out optional tasks whose data cannot be read; checked once, since a training run loads tasks often."""
        if self._optional_checked:
            return
        self._optional_checked = True
        for name in [name for name in self.names if name in self._optional and name != HELDOUT]:
            if missing := next(self._unread([name]), None):
                (need, reason), command = missing, fetch_command(self.settings, self.data_sets.folder)
                self._leave_out(name, f"{need.title}: {why_missing(reason)}; with a connection, `{command}` fetches it")

    def _match(self, name: str) -> list[str]:
        if name in SELECTIONS:
            return list(SELECTIONS[name].tasks)
        if name.endswith(".yaml") and Path(name).is_file():
            return [name]
        if matches := self.match_tasks([name]):
            return sorted(matches)
        raise unknown_task(name, self.all_tasks)

    def note(self, message: str) -> None:
        """Report a note, each once."""
        if message not in self._noted:
            self._noted.add(message)
            self._report(message)

    def for_model(self, lm: TemplateLM, path: Path, data: Path | None = None) -> None:
        """Set the model that the tasks are for, as lm-eval's own command does, and the data folder of heldout."""
        self._lm, self._about_model["pretrained"] = lm, str(path)
        if data is not None:
            self._about_model["data"] = str(data.resolve())

    def load(self, task_list: Sequence[str]) -> Any:
        """Build tasks as lm-eval's `load` does, without a cloze that the data or the model does not allow.

        Raises:
            DataError: tasks cannot be built (the message lists all, with the data sets that cannot be read), or a task
                needs a package that is missing.
        """
        self._check_examples()
        self._leave_out_unreadable()
        if HELDOUT in self._optional and HELDOUT in task_list and HELDOUT not in self._left_out:
            try:
                heldout.load(**self._about_model)
            except DataError as unusable:
                self._leave_out(HELDOUT, str(unusable))
        names = [name for name in task_list if name not in self._left_out]
        if self._cloze_optional and CLOZE in names and (problem := self._cloze_problem()):
            names.remove(CLOZE)
            self.note(problem)
        needs, failed = self.needs(), list[tuple[str, str, bool]]()
        builder = _Builder(self._about_model, failed)
        with (
            self._reading(),
            mock.patch.object(self, "_factory", builder),
            mock.patch.object(_factory, "ConfigurableTask", builder.configurable()),
            self._without_retries(needs),
            self.data_sets.in_use(),
        ):
            loaded = super().load(names)
        if failed:
            problems = {task: reason for task, reason, _ in failed}
            if any(unread for *_, unread in failed) and (missing := self._missing()):
                unread_tasks = {task for need, _ in missing for task in need.tasks}
                others = {task: reason for task, reason in problems.items() if task not in unread_tasks}
                message = str(unreadable(missing, self.settings, self.data_sets.folder))
                raise DataError("\n".join([message, *([describe(others)] if others else [])]))
            raise DataError(describe(problems))
        return loaded

    def _cloze_problem(self) -> str:
        """Return why the cloze is left out, or an empty text."""
        try:
            rows = load_cloze(**self._about_model)["validation"]
        except TooFewDocumentsError as error:
            return str(error)
        if self._lm is None:
            return ""
        longest = max(len(self._lm.tok_encode(f" {ending}")) for row in rows for ending in row["endings"])
        if longest <= self._lm.max_length:
            return ""
        return (
            f"{CLOZE} is left out: its endings have up to {longest} tokens, the model's context {self._lm.max_length}"
        )

    def needs(self, names: Sequence[str] | None = None) -> list[Need]:
        """Return the data sets that the tasks read, each once, without loading any. None: those of all chosen tasks.

        Data that a task makes itself, such as heldout, or fetches with code of its own are not included.

        Raises:
            DataError: a task cannot be read, or needs a package that is missing.
        """
        needs: dict[str, Need] = {}
        for task_name, task in self._described(self.names if names is None else names).items():
            config, source = task.config, task.source
            path = config.dataset_path or getattr(source, "DATASET_PATH", None)
            name = config.dataset_name or getattr(source, "DATASET_NAME", None)
            fetches_itself = source is not None and source.download not in (Task.download, ConfigurableTask.download)
            if config.custom_dataset is not None or path is None or fetches_itself:
                continue
            # lm-eval's own `download` drops this argument, which `datasets` no longer takes.
            options = {key: value for key, value in (config.dataset_kwargs or {}).items() if key != "trust_remote_code"}
            key = repr((path, name, sorted(options.items())))
            needs.setdefault(key, Need(path, name, options)).tasks.append(task_name)
        return list(needs.values())

    def _described(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the tasks by name, with their configuration and without data."""
        # A group builds the tasks defined in its own file from ConfigurableTask.
        with (
            self._reading(),
            mock.patch.object(self, "_factory", _Describer(meta=self._about_model)),
            mock.patch.object(_factory, "ConfigurableTask", _Described),
        ):
            return dict(super().load(list(names))["tasks"])

    def _check_examples(self) -> None:
        """Refuse examples for tasks that fix their number at 0: lm-eval would leave them out without a word."""
        if not self.settings.num_fewshot:
            return
        fixed = [name for name, task in self._described(self.foreign).items() if task.config.num_fewshot == 0]
        if fixed:
            few = [*fixed[:_NAMED_TASKS], *([f"{len(fixed) - _NAMED_TASKS} more"] if len(fixed) > _NAMED_TASKS else [])]
            raise UsageError(
                f"--num-fewshot {self.settings.num_fewshot}: no examples can stand in the prompt of {', '.join(few)} "
                "(defined with num_fewshot: 0); leave the option out, or score the other tasks in a separate call"
            )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        names = ", ".join(self.names)
        expected: tuple[type[BaseException], ...] = (*hub_errors(), TypeError, KeyError)
        try:
            yield
        except ImportError as error:
            raise DataError(f"a task in {names} needs a package: {error}") from None
        except expected as error:
            raise DataError(f"the tasks {names} cannot be loaded: {first_line(error)}") from None

    def require_data(self) -> None:
        """Read every data set that the tasks need, so that all missing ones are reported before a model loads.

        Raises:
            DataError: some cannot be read; see also `needs`.
            UsageError: examples are asked for, and a task takes none; or a folder for heldout without this task.
        """
        if self.settings.data is not None and not self.read_data:
            raise UsageError(
                f"--data {self.settings.data}: only {HELDOUT} and {CLOZE} read it, and neither is among the tasks "
                f"{', '.join(self.settings.tasks)}; leave the option out, or add {HELDOUT}"
            )
        self._check_examples()
        self._leave_out_unreadable()
        if missing := self._missing():
            self.load(self.foreign)  # raises, with what else is wrong with the tasks
            raise unreadable(missing, self.settings, self.data_sets.folder)

    def _missing(self) -> list[tuple[Need, str]]:
        """Return the data sets that cannot be read, each with the reason."""
        return list(self._unread(self.names))

    def _unread(self, names: Sequence[str]) -> Iterator[tuple[Need, str]]:
        needs = self.needs(names)
        for need in needs:
            with quiet(), self._without_retries(needs):
                try:
                    self.data_sets.load(need.path, need.name, **need.options)
                    continue
                except hub_errors() as error:
                    # `datasets` says that reading failed, and in the cause what is wrong with the file.
                    damage = error.__cause__ if isinstance(error, DatasetGenerationError) else None
                    reason = first_line(damage or error)
            yield need, reason

    def _without_retries(self, needs: list[Need]) -> contextlib.AbstractContextManager[object]:
        """Make `datasets` use its cache at once if the Hub does not answer; otherwise it retries for 30 s."""
        # Tasks without a need may fetch their data with code of their own.
        all_here = all(map(self.data_sets.is_local, needs)) and (needs or not self.foreign)
        return contextlib.nullcontext() if all_here or hub_answers() else offline()

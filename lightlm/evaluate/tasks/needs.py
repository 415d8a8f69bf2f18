"""The data sets that tasks read, found from the tasks' configurations only."""

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager, _factory


@dataclass(frozen=True)
class Need:
    """A data set that tasks read.

    Args:
        path: a Hub id, or a format of `datasets` such as `json`.
        name: the configuration.
        options: further arguments of `load_dataset`.
        tasks: names of the tasks.
    """

    path: str
    name: str | None
    options: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """`allenai/ai2_arc (ARC-Easy)`."""
        return f"{self.path} ({self.name})" if self.name else self.path


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


def needs_of(manager: TaskManager, names: list[str], metadata: dict[str, Any]) -> list[Need]:
    """Return the data sets of tasks, groups and tags, each once, without loading any.

    Data that a task fetches with code of its own are not included.
    """
    needs: dict[str, Need] = {}
    # A group builds the tasks defined in its own file from ConfigurableTask.
    with (
        mock.patch.object(manager, "_factory", _Describer(meta=metadata)),
        mock.patch.object(_factory, "ConfigurableTask", _Described),
    ):
        tasks = TaskManager.load(manager, names)["tasks"]
    for task_name, task in tasks.items():
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

"""The `heldout` task: bits per byte on the validation documents of a data folder (see tasks/heldout.yaml).

Documents are decoded to text, so models with different tokenizers can be compared: bytes do not depend on a vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from lightlm.checkpoint import RUNS, find_run, run_of
from lightlm.data.shards import DataFolder, resolve_dataset
from lightlm.errors import DataError, LightLMError, UsageError

HELDOUT = "heldout"
TASKS = Path(__file__).parent / "tasks"  # for lm-eval's TaskManager(include_path=...)


def load(**metadata: Any) -> dict[str, Dataset]:
    """The task's documents, one row `text` each; lm-eval calls this with the TaskManager's metadata.

    Args:
        metadata: `data`, a data folder; without it `pretrained`, a run or one of its checkpoints.

    Raises:
        DataError: there is no data folder, or it holds no validation documents.
    """
    data = metadata.get("data")
    folder = DataFolder.open(common_folder([metadata.get("pretrained")], data))
    texts = [folder.tokenizer.decode(document.tolist()) for document in folder.split("val").documents()]
    if not texts:
        raise DataError(f"the task heldout found no validation documents in {folder.path}")
    return {"validation": Dataset.from_dict({"text": texts})}


def common_folder(models: Sequence[str | Path | None], data: str | None = None) -> Path:
    """The one data folder that all these models are scored on: `data` if given, else that of their runs.

    Raises:
        UsageError: their runs were trained on different folders, whose figures say nothing about each other.
        DataError: a model does not belong to a run whose recipe names a data set.
    """
    if data:
        return resolve_dataset(data)
    folders = [dataset_of(model) for model in models]
    for model, folder in zip(models[1:], folders[1:], strict=True):
        if folder.resolve() != folders[0].resolve():
            raise UsageError(
                f"the task heldout would score {models[0]} on {folders[0]} and {model} on {folder}, the data of their "
                "runs, and the figures could not be compared; choose one data folder for all with --data DIR"
            )
    return folders[0]


def dataset_of(model: str | Path | None) -> Path:
    """The data folder that a model's run was trained on, by its recipe.

    Raises:
        DataError: the model does not belong to a run whose recipe names a data set, or the recipe cannot be read.
    """
    try:
        run = run_of(Path(model)) if model else None
        path = (run or find_run(model)) / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (LightLMError, OSError):
        raise DataError(
            f"the task heldout needs text: {model or RUNS / 'latest'} belongs to no run whose recipe names a data set; "
            "give a prepared data folder with --data"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the task heldout needs text: {path} is not valid YAML ({reason}); give a prepared data folder with --data"
        ) from None
    section = recipe.get("data") if isinstance(recipe, dict) else None
    dataset = section.get("dataset") if isinstance(section, dict) else None
    if not isinstance(dataset, str):
        raise DataError(
            f"the task heldout needs text: {path} names no data set under data.dataset; "
            "give a prepared data folder with --data"
        )
    return resolve_dataset(dataset)

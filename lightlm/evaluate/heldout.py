"""The `heldout` task: bits per byte on the validation documents of a data folder (see tasks/heldout.yaml).

Documents are decoded to text, so models with different tokenizers can be compared: bytes do not depend on a vocabulary.
"""

from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from lightlm.checkpoint import RUNS, find_run, run_of
from lightlm.data.shards import DataFolder, resolve_dataset
from lightlm.errors import DataError, LightLMError

TASKS = Path(__file__).parent / "tasks"  # for lm-eval's TaskManager(include_path=...)


def load(**metadata: Any) -> dict[str, Dataset]:
    """The task's documents, one row `text` each; lm-eval calls this with the TaskManager's metadata.

    Args:
        metadata: `data`, a data folder; without it `pretrained`, a run or one of its checkpoints.

    Raises:
        DataError: there is no data folder, or it holds no validation documents.
    """
    data = metadata.get("data")
    folder = DataFolder.open(resolve_dataset(data) if data else dataset_of(metadata.get("pretrained")))
    texts = [folder.tokenizer.decode(document.tolist()) for document in folder.split("val").documents()]
    if not texts:
        raise DataError(f"the task heldout found no validation documents in {folder.path}")
    return {"validation": Dataset.from_dict({"text": texts})}


def dataset_of(model: str | Path | None) -> Path:
    """The data folder that a model's run was trained on, by its recipe.

    Raises:
        DataError: the model does not belong to a run whose recipe names a data set.
    """
    try:
        run = run_of(Path(model)) if model else None
        recipe = yaml.safe_load((run or find_run(model)).joinpath("recipe.yaml").read_text(encoding="utf-8"))
        dataset = recipe["data"]["dataset"]
    except (LightLMError, OSError, KeyError, TypeError):
        raise DataError(
            f"the task heldout needs text: {model or RUNS / 'latest'} belongs to no run whose recipe names a data set; "
            "give a prepared data folder with --data"
        ) from None
    return resolve_dataset(dataset)

"""The tasks made of a data folder's own validation documents: `heldout`, bits per byte, and `heldout_cloze`.

Documents are decoded to text, so models with different tokenizers can be compared: neither bytes nor the examples of
the cloze (lightlm/evaluate/tasks/cloze.py) depend on a vocabulary.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from lightlm.data.shards import DataFolder, resolve_dataset
from lightlm.errors import DataError, LightLMError, UsageError
from lightlm.evaluate.tasks import cloze
from lightlm.runs import RUNS, find_run, run_of

HELDOUT, CLOZE = "heldout", "heldout_cloze"
TASKS = Path(__file__).parent / "yaml"  # for lm-eval's TaskManager(include_path=...)

# What the cloze reads of a validation split: some seconds of decoding and cutting.
_CLOZE_DOCUMENTS = 4000
_CLOZE_BYTES = 8_000_000


class TooFewDocumentsError(DataError):
    """A data folder whose validation documents make no cloze."""


def load(**metadata: Any) -> dict[str, Dataset]:
    """The documents of `heldout`, one row `text` each; lm-eval calls this with the TaskManager's metadata.

    Args:
        metadata: `data`, a data folder; without it `pretrained`, a run or one of its checkpoints.

    Raises:
        DataError: there is no data folder, or it holds no validation documents.
    """
    return {"validation": _documents(*_folder(metadata))}


def load_cloze(**metadata: Any) -> dict[str, Dataset]:
    """The examples of `heldout_cloze`, a row each: `context`, `endings`, `label`. The arguments are those of `load`.

    Raises:
        DataError: there is no data folder.
        TooFewDocumentsError: fewer than four of its validation documents have sentences enough.
    """
    return {"validation": _examples(*_folder(metadata))}


def _folder(metadata: dict[str, Any]) -> tuple[Path, str]:
    """The data folder that is meant, and what tells its contents from others that may come to lie there."""
    path = common_folder([metadata.get("pretrained")], metadata.get("data")).resolve()
    manifest = DataFolder.open(path).manifest
    return path, " ".join([manifest.tokenizer_sha256, *(shard.xxh3 for shard in manifest.shards)])


# lm-eval loads its tasks anew for every evaluation, and a run in training has many.
@functools.lru_cache(maxsize=2)
def _documents(path: Path, contents: str) -> Dataset:
    folder = DataFolder.open(path)
    texts = [folder.tokenizer.decode(document.tolist()) for document in folder.split("val").documents()]
    if not texts:
        raise DataError(f"the task heldout found no validation documents in {path}")
    return Dataset.from_dict({"text": texts})


@functools.lru_cache(maxsize=2)
def _examples(path: Path, contents: str) -> Dataset:
    examples = cloze.examples(_beginnings(DataFolder.open(path)))
    if not examples:
        raise TooFewDocumentsError(
            f"the task {CLOZE} takes its wrong endings from other documents, and fewer than {cloze.ENDINGS} validation "
            f"documents in {path} hold a passage of {cloze.CONTEXT + cloze.ENDING} characters in sentences; prepare "
            "more documents, or a larger part of them for validation (prepare-data --val-fraction)"
        )
    return Dataset.from_list([{"context": e.context, "endings": e.endings, "label": e.label} for e in examples])


def _beginnings(folder: DataFolder) -> list[str]:
    """The validation documents' texts: of many documents a part, evenly spread, and of long ones the beginning.

    Both follow from the number of documents, which is the same with every tokenizer.
    """
    split = folder.split("val")
    every = math.ceil(sum(1 for _ in split.documents()) / _CLOZE_DOCUMENTS)
    chosen = [document for index, document in enumerate(split.documents()) if index % every == 0]
    size = _CLOZE_BYTES // max(1, len(chosen))
    # A token stands for a byte at least; eight more, because the cut may go through a character.
    decoded = (folder.tokenizer.decode(document[: size + 8].tolist()) for document in chosen)
    return [text.encode()[:size].decode(errors="ignore") for text in decoded]


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

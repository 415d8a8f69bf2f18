"""The tasks made from a data folder's validation documents: `heldout`, bits per byte, and `heldout_cloze`.

Documents are decoded to text, so models with different tokenizers can be compared: neither bytes nor the cloze's
examples (lightlm/evaluate/tasks/cloze.py) depend on a vocabulary.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from lightlm.data.folder import DataFolder, resolve_dataset
from lightlm.errors import DataError, LightLMError, UsageError
from lightlm.evaluate.tasks import cloze
from lightlm.evaluate.tasks.references import CLOZE, HELDOUT
from lightlm.recipe.sections.data import DataSection
from lightlm.runs import RECIPE, RUNS, find_run, run_of

# Limits of what the cloze reads of a validation split, to keep decoding and cutting to a few seconds.
_CLOZE_DOCUMENTS = 4000
_CLOZE_BYTES = 8_000_000


class NoRunError(DataError):
    """A model does not belong to a run, so there is no data that it was trained on here."""


class TooFewDocumentsError(DataError):
    """The validation documents of a data folder are too few for a cloze."""


def load(**metadata: Any) -> dict[str, Dataset]:
    """Return the documents of `heldout`, a row with `text` each; lm-eval calls this with the TaskManager's metadata.

    Args:
        metadata: `data`, a data folder; without it `pretrained`, a run or one of its checkpoints.

    Raises:
        DataError: there is no data folder, or it has no validation documents.
    """
    return {"validation": _documents(*_folder(metadata))}


def load_cloze(**metadata: Any) -> dict[str, Dataset]:
    """Return the examples of `heldout_cloze`, a row with `context`, `endings`, `label` each. Arguments as in `load`.

    Raises:
        DataError: there is no data folder.
        TooFewDocumentsError: fewer than four of its validation documents have enough sentences.
    """
    return {"validation": _examples(*_folder(metadata))}


def _folder(metadata: dict[str, Any]) -> tuple[Path, str]:
    """Return the data folder and a fingerprint of its contents, which may be replaced during a process."""
    path = common_folder([metadata.get("pretrained")], metadata.get("data")).resolve()
    manifest = DataFolder.open(path).manifest
    if manifest.chat is not None:
        raise DataError(f"the task {HELDOUT} scores texts, and {path} holds conversations; name a folder of texts")
    return path, " ".join([manifest.tokenizer_sha256, *(shard.xxh3 for shard in manifest.shards)])


# lm-eval loads tasks again for every evaluation, and a training run has many.
@functools.lru_cache(maxsize=2)
def _documents(path: Path, contents: str) -> Dataset:
    folder = DataFolder.open(path)
    texts = [folder.tokenizer.decode(document.tolist()) for document in folder.split("val").documents()]
    if not texts:
        raise DataError(f"the task {HELDOUT} found no validation documents in {path}")
    return Dataset.from_dict({"text": texts})


@functools.lru_cache(maxsize=2)
def _examples(path: Path, contents: str) -> Dataset:
    examples = cloze.examples(_beginnings(DataFolder.open(path)))
    if not examples:
        raise TooFewDocumentsError(
            f"the task {CLOZE} needs wrong endings from other documents, but fewer than {cloze.ENDINGS} validation "
            f"documents in {path} contain {cloze.CONTEXT + cloze.ENDING} characters of whole sentences; prepare more "
            "documents, or a larger part of them for validation (prepare-data --val-fraction)"
        )
    return Dataset.from_list([{"context": e.context, "endings": e.endings, "label": e.label} for e in examples])


def _beginnings(folder: DataFolder) -> list[str]:
    """Return validation texts: an evenly spread selection of many documents, and the beginning of long ones.

    Both limits depend on the number of documents only, which is the same for every tokenizer.
    """
    split = folder.split("val")
    every = math.ceil(sum(1 for _ in split.documents()) / _CLOZE_DOCUMENTS) or 1
    chosen = list(itertools.islice(split.documents(), 0, None, every))
    size = _CLOZE_BYTES // max(1, len(chosen))
    # A token covers at least one byte. Eight more tokens, because the cut may split a character.
    decoded = (folder.tokenizer.decode(document[: size + 8].tolist()) for document in chosen)
    return [text.encode()[:size].decode(errors="ignore") for text in decoded]


def without_companions(names: Iterable[str]) -> list[str]:
    """Return tasks without a cloze that comes with heldout."""
    listed = list(names)
    return [name for name in listed if name != CLOZE or HELDOUT not in listed]


def common_folder(models: Sequence[str | Path | None], data: str | None = None) -> Path:
    """Return the data folder on which all these models are scored: `data` if given, else that of their runs.

    Models that belong to no run, such as Hugging Face folders, are scored on the data of the others.

    Raises:
        UsageError: their runs were trained on different folders, so their figures cannot be compared.
        DataError: no model belongs to a run, or a run's recipe names no data set.
    """
    if data:
        return resolve_dataset(data)
    folders: dict[str | Path | None, Path] = {}
    strangers = []
    for model in models:
        try:
            folders[model] = dataset_of(model)
        except NoRunError as error:
            strangers.append(error)
    if not folders:
        raise strangers[0]
    for model, folder in folders.items():
        if not folder.is_dir():
            raise DataError(
                f"the task {HELDOUT} needs the data that {model or 'the newest run'} was trained on, and there is no "
                f"folder {folder}; if it has moved, say where it is with --data DIR"
            )
    (first, expected), *others = folders.items()
    for model, folder in others:
        if folder.resolve() != expected.resolve():
            raise UsageError(
                f"the task {HELDOUT} would score {first} on {expected} and {model} on {folder}, the data of "
                "their runs, which cannot be compared; choose one data folder for all with --data DIR"
            )
    return expected


def dataset_of(model: str | Path | None) -> Path:
    """Return the data folder of a model's run, from its recipe; of a mixture, its main one (`DataSection.main`).

    Raises:
        NoRunError: the model does not belong to a run with a recipe.
        DataError: the recipe names no data set, or cannot be read.
    """
    path = RUNS / "latest"
    advice = "give a prepared data folder with --data"
    try:
        path = ((run_of(Path(model)) if model else None) or find_run(model)) / RECIPE
        section = DataSection.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))["data"])
        return resolve_dataset(section.main)
    except (LightLMError, OSError):
        reason = f"{model or path} does not belong to a run with a recipe"
        raise NoRunError(f"the task {HELDOUT} needs text: {reason}; {advice}") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        reason = f"{path} names no data set under data ({' '.join(str(error).split())})"
        raise DataError(f"the task {HELDOUT} needs text: {reason}; {advice}") from None

"""The teacher of a run with `train.distill`: found, checked against data and recipe, and loaded."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from lightlm.checkpoint import LoadedModel
from lightlm.convert.load import find_start, load_pretrained, locate
from lightlm.data.folder import DataFolder
from lightlm.data.shards import JoinedArrays
from lightlm.data.top_tokens import record_dtype
from lightlm.data.training_data import TrainingData
from lightlm.device import pick_dtype
from lightlm.errors import DataError, LightLMError, RecipeError
from lightlm.model.transformer import Transformer
from lightlm.quantities import format_quantity
from lightlm.recipe import STORED, DistillSection, Recipe
from lightlm.train.distributed import World
from lightlm.train.initial import Note, note_on_texts
from lightlm.train.step.teacher import Teacher

ASSUMED_TOP_K = 64  # of a stored teacher, to measure a step before the data is prepared


@dataclass(frozen=True)
class Taught:
    """What a run learns from beside its tokens.

    Attributes:
        section: `train.distill` with the precision filled in.
        identity: changes with the teacher's weights.
        description: for displays.
        live: the model, unless its probabilities are stored.
        records: those of a stored teacher, for each folder of the data.
    """

    section: DistillSection
    identity: str
    description: str
    live: Teacher | None = None
    records: Sequence[JoinedArrays] = ()


def load_taught(
    recipe: Recipe, data: TrainingData | None, world: World, device: torch.device, note: Note
) -> Taught | None:
    """Return the teacher of `train.distill`, or None without one. All processes call this.

    Args:
        data: None takes random weights in the teacher's shape, to measure a step.

    Raises:
        RecipeError: there is no such model, it is damaged, or its context is shorter than a sequence.
        DataError: its tokenizer is not that of the data, or a folder of the data does not hold what it says.
    """
    section = recipe.train.distill
    if section is None:
        return None
    if section.teacher == STORED:
        return _stored(section, recipe, data)
    if data is None:
        shape = find_start(section.teacher, "train.distill.teacher").model
        model, identity, tokens = Transformer(shape), "", recipe.model.vocab_size
    else:
        model, identity = _load(section.teacher, recipe, data, world, note)
        tokens = data.tokenizer.vocab_size
    wanted, width = section.dtype, model.config.hidden_size
    dtype = world.from_writer(
        lambda: pick_dtype(wanted, device, width, lambda slow: note(f"train.distill.dtype={slow}"))
    )
    section = section.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    size = format_quantity(model.num_parameters()["total"])
    description = f"{section.teacher}, {size} parameters, {section.dtype}: weight {section.weight:g}"
    if section.temperature != 1:
        description += f", temperature {section.temperature:g}"
    return Taught(section, identity, description, live=Teacher(model.to(device), tokens, dtype))


def _stored(section: DistillSection, recipe: Recipe, data: TrainingData | None) -> Taught:
    """Return the teacher that is stored beside the data; without data, random records."""
    if data is None:
        vocab_size = recipe.model.vocab_size
        top_k, generator = min(ASSUMED_TOP_K, vocab_size), np.random.default_rng(recipe.train.seed % 2**64)
        dtype = record_dtype(top_k, vocab_size)
        records = np.zeros(recipe.train.batch_tokens + 1, dtype)
        records["ids"] = generator.integers(vocab_size - top_k + 1, size=(len(records), 1)) + np.arange(top_k)
        return Taught(section, "", STORED, records=[JoinedArrays([records], dtype)])
    found = {label: folder.top_tokens() for label, folder in data.folders.items()}
    (first, one), *others = ((label, stored) for label, (stored, _) in found.items())
    for label, stored in others:
        if stored.key != one.key:
            raise DataError(
                f"{first} and {label} hold the probabilities of different teachers, or other numbers of them: the top "
                f"{one.top_k} of {one.teacher}, the top {stored.top_k} of {stored.teacher}; store the same in both"
            )
    description = f"stored, the top {one.top_k} tokens of {one.teacher}: weight {section.weight:g}"
    return Taught(section, one.key, description, records=[records for _, records in found.values()])


def _load(reference: str, recipe: Recipe, data: TrainingData, world: World, note: Note) -> tuple[Transformer, str]:
    """Return a teacher that fits data and recipe, and its identity."""
    try:
        world.from_writer(lambda: locate(reference))  # one process downloads
        loaded = load_pretrained(reference)
    except LightLMError as error:
        raise RecipeError(f"train.distill.teacher: {error}") from None
    check_tokenizer(loaded, reference, data.main)
    if recipe.seq_len > loaded.model.config.max_seq_len:
        context = loaded.model.config.max_seq_len
        raise RecipeError(
            f"train.seq_len {recipe.seq_len} exceeds the context of {reference} (train.distill.teacher), which has "
            f"{context} tokens; set train.seq_len={context} or less"
        )
    note_on_texts(loaded.tokenizer, reference, data.main, note)
    return loaded.model, identity_of(loaded.model)


def check_tokenizer(teacher: LoadedModel, reference: str, data: DataFolder) -> None:
    """Raise DataError where a teacher and a data folder have different tokenizers."""
    if difference := teacher.tokenizer.difference(data.tokenizer):
        raise DataError(
            f"the teacher {reference} has another tokenizer than {data.path}: {difference}. So its probabilities are "
            f"of other tokens. Prepare the data with the teacher's: --tokenizer {shlex.quote(reference)}. To keep "
            "this tokenizer, train on text that the teacher writes: "
            f"lightlm generate --checkpoint {shlex.quote(reference)} --jsonl PROMPTS.jsonl --out TEXTS.jsonl"
        )


def identity_of(model: Transformer) -> str:
    """Return a hash of a model's shape and weights, whatever its format on disk."""
    digest = xxhash.xxh3_64(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(memoryview(tensor.float().contiguous().cpu().numpy().reshape(-1).view("u1")))
    return digest.hexdigest()

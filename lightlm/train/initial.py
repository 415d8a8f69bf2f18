"""The weights that a new run starts from, if its recipe names a model in `train.init_from`."""

import shlex
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightlm.checkpoint import MTP, LoadedModel, build_model
from lightlm.convert.load import load_pretrained, locate
from lightlm.data.folder import DataFolder
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import DataError, LightLMError, RecipeError
from lightlm.model.transformer import Transformer
from lightlm.recipe import Recipe
from lightlm.train.distributed import World

Note = Callable[[str], None]  # receives a message that the user should read

_TABLES = ("embed_tokens.weight", "lm_head.weight")
_NEW_ROWS_SPREAD = 0.1  # standard deviation of new rows around the mean, of that of the known rows


def load_initial(recipe: Recipe, data: DataFolder, world: World, note: Note) -> LoadedModel:
    """Return the model of `train.init_from` in the recipe's shape, with its tokenizer. All processes call this.

    Raises:
        RecipeError: there is no such model, it is damaged, or its weights do not have the recipe's shape.
        DataError: the data was encoded with another tokenizer than the model's.
    """
    reference = recipe.train.init_from
    assert reference is not None
    try:
        world.from_writer(lambda: locate(reference))  # one process downloads
        loaded = load_pretrained(reference)
        weights = grown(loaded.model.state_dict(), recipe.model.vocab_size, recipe.train.seed)
        depth = recipe.train.mtp.depth
        heads = Transformer(recipe.model, depth).state_dict() if depth else {}
        weights |= {name: tensor for name, tensor in heads.items() if name.startswith(MTP)}
        model = build_model(recipe.model, weights, reference)
    except LightLMError as error:
        raise RecipeError(f"train.init_from: {error}") from None
    lacking = [name for name in data.tokenizer.special_tokens.values() if loaded.tokenizer.id_of(name) is None]
    if difference := loaded.tokenizer.with_special_tokens(lacking).difference(data.tokenizer):
        raise DataError(
            f"the tokenizer of {data.path} is not that of {reference} (train.init_from): {difference}. Prepare the "
            f"data with the model's: lightlm prepare-data SOURCE --tokenizer {shlex.quote(reference)}"
        )
    note_on_texts(loaded.tokenizer, reference, data, note)
    return replace(loaded, model=model)


def note_on_texts(tokenizer: Tokenizer, reference: str, data: DataFolder, note: Note) -> None:
    """Tell where the documents of a data folder begin or end otherwise than the texts of a model."""
    ends = data.tokenizer.end_of_text, tokenizer.end_of_text
    if ends[0] != ends[1]:
        note(
            f"documents of {data.path} end with {ends[0]}, texts of {reference} with {ends[1]}; to train on the "
            f"model's, prepare the data with --tokenizer {shlex.quote(reference)}"
        )
    if tokenizer.adds_bos:
        begin = "".join(filter(None, map(tokenizer.name_of, tokenizer.prefix_ids)))
        note(f"{reference} expects {begin} before each text, which documents of {data.path} do not begin with")


def grown(weights: dict[str, Tensor], vocab_size: int, seed: int) -> dict[str, Tensor]:
    """Return weights whose tables have `vocab_size` rows: new tokens start near the mean of the others.

    Where the table is also the head, a random row could be likelier than any known token (Hewitt, "Initializing new
    word embeddings for pretrained language models", 2021).
    """
    tables = {name: weights[name] for name in _TABLES if name in weights and len(weights[name]) < vocab_size}
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for name, table_VD in tables.items():
        shape = vocab_size - len(table_VD), table_VD.shape[1]
        noise = torch.randn(shape, generator=generator).to(table_VD) * (_NEW_ROWS_SPREAD * table_VD.std())
        rows[name] = torch.cat([table_VD, table_VD.mean(0) + noise])
    return weights | rows

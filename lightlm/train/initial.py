"""The weights that a new run starts from, if its recipe names a model in `train.init_from`."""

import shlex
from collections.abc import Callable
from dataclasses import replace

from lightlm.checkpoint import LoadedModel, build_model
from lightlm.convert.load import load_pretrained, locate
from lightlm.data.folder import DataFolder
from lightlm.errors import DataError, LightLMError, RecipeError
from lightlm.recipe import Recipe
from lightlm.train.distributed import World


def load_initial(recipe: Recipe, data: DataFolder, world: World, note: Callable[[str], None]) -> LoadedModel:
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
        model = build_model(recipe.model, loaded.model.state_dict(), reference)
    except LightLMError as error:
        raise RecipeError(f"train.init_from: {error}") from None
    if difference := loaded.tokenizer.difference(data.tokenizer):
        raise DataError(
            f"the tokenizer of {data.path} is not that of {reference} (train.init_from): {difference}. Prepare the "
            f"data with the model's: lightlm prepare-data SOURCE --tokenizer {shlex.quote(reference)}"
        )
    ends = [tokenizer.end_of_text for tokenizer in (data.tokenizer, loaded.tokenizer)]
    if ends[0] != ends[1]:
        note(
            f"documents of {data.path} end with {ends[0]}, texts of {reference} with {ends[1]}; to train on the "
            f"model's, prepare the data with --tokenizer {shlex.quote(reference)}"
        )
    if loaded.tokenizer.adds_bos:
        begin = "".join(filter(None, map(loaded.tokenizer.name_of, loaded.tokenizer.prefix_ids)))
        note(f"{reference} expects {begin} before each text, which documents of {data.path} do not begin with")
    return replace(loaded, model=model)

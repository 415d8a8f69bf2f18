"""What a recipe must have in common with the data it is trained on."""

from dataclasses import replace

from lightlm.data.folder import DataFolder
from lightlm.errors import DataError, RecipeError
from lightlm.recipe import Recipe
from lightlm.train.observe.observers import Observer


def fit_recipe(recipe: Recipe, data: DataFolder, observer: Observer) -> Recipe:
    """The recipe with the vocabulary filled in from the data.

    Raises:
        DataError: the recipe's vocabulary is smaller than the tokenizer's.
    """
    wanted, given = recipe.model.vocab_size, data.tokenizer.vocab_size
    if not wanted:
        return recipe.model_copy(update={"model": replace(recipe.model, vocab_size=given)})
    if wanted < given:
        raise DataError(
            f"recipe {recipe.name} has model.vocab_size {wanted}, but the tokenizer of {data.path} has "
            f"{given} entries; prepare the data with a tokenizer that fits (for example --tokenizer train:{wanted}) "
            f"or set model.vocab_size={given}"
        )
    if wanted > given:
        observer.note(f"model.vocab_size {wanted} exceeds the tokenizer's {given}: {wanted - given} rows stay unused")
    return recipe


def check_prompts(recipe: Recipe, data: DataFolder) -> None:
    """Refuse a prompt too long to be continued now, not at the first validation.

    Raises:
        RecipeError: a prompt of `eval.prompts` fills the model's context.
    """
    for prompt in recipe.eval.prompts:
        length = len(data.tokenizer.encode(prompt))
        if length > recipe.model.max_seq_len:
            raise RecipeError(
                f"a prompt of eval.prompts has {length} tokens, model.max_seq_len is {recipe.model.max_seq_len}; "
                f"shorten it: {prompt[:60]!r}"
            )

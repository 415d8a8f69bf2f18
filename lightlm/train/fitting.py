"""Fit a recipe to the data that it names: the vocabulary, and what the data makes of the recipe's settings."""

import shlex
from collections.abc import Callable
from dataclasses import replace

from lightlm.data.folder import prepare_command, prepared_beside, read_manifest
from lightlm.data.loader import holds_targets
from lightlm.data.training_data import TrainingData, folder_paths
from lightlm.errors import DataError, RecipeError
from lightlm.recipe import Recipe
from lightlm.train.initial import Note
from lightlm.train.schedules import batch_plan, note_on_repeats, source_order

ASSUMED_VOCABULARY = 50_257  # GPT-2's, if neither the recipe nor prepared data names one

_NEED_VALIDATION: dict[str, Callable[[Recipe], bool]] = {
    "train.patience": lambda recipe: recipe.train.patience is not None,
    "checkpoint.keep_best": lambda recipe: recipe.checkpoint.keep_best,
}


def fit_recipe(recipe: Recipe, data: TrainingData | None, note: Note) -> Recipe:
    """Return the recipe with the data's vocabulary, or with an assumed one before the data is prepared.

    Raises:
        DataError: the recipe's vocabulary is smaller than the tokenizer's.
        RecipeError: a prompt of `eval.prompts` does not fit the model's context; the data holds one document without
            an end, and `data.document_mask` is set; or a setting needs a validation loss, and the data gives none.
    """
    if data is None:
        return _without_data(recipe, note)
    recipe = _fit_vocabulary(recipe, data, note)
    _note_repeats(recipe, data, note)
    if recipe.data.too_long != "cut" and all(stream.mask is None for stream in data.streams("train").values()):
        note(f"data.too_long={recipe.data.too_long} has no effect: it is for conversations, and the data are texts")
    validated = _note_validation(recipe, data, note)
    _require_documents(recipe, data)
    wanting = [key for key, wants in _NEED_VALIDATION.items() if wants(recipe)]
    if wanting and not validated:
        where = " and ".join(str(folder.path) for folder in data.folders.values())
        raise RecipeError(
            f"{' and '.join(wanting)} need a validation loss, and {where} has no validation split with something to "
            "predict; leave them out, or prepare the data with a larger --val-fraction"
        )
    _check_prompts(recipe, data)
    return recipe


def _without_data(recipe: Recipe, note: Note) -> Recipe:
    """Return the recipe with a vocabulary, and tell how to prepare the data that it names."""
    paths = list(folder_paths(recipe.data.sources).values())
    prepared = prepared_beside(paths)
    assumed = ASSUMED_VOCABULARY if prepared is None else read_manifest(prepared).vocab_size
    until = ""
    if not recipe.model.vocab_size:
        recipe = _with_vocabulary(recipe, assumed)
        until = f" Until then, a vocabulary of {assumed:,} ({prepared or 'GPT-2'}'s) is assumed."
    missing = [path for path in paths if not path.is_dir()]
    tokenizer = recipe.train.init_from or (str(prepared / "tokenizer.json") if prepared else None)
    commands = "; ".join(prepare_command(path, tokenizer) for path in missing)
    names = ", ".join(map(str, missing))
    note(f"{names} {'is' if len(missing) == 1 else 'are'} not prepared yet. Make it with: {commands}.{until}")
    return recipe


def _with_vocabulary(recipe: Recipe, size: int) -> Recipe:
    return recipe.model_copy(update={"model": replace(recipe.model, vocab_size=size)})


def _fit_vocabulary(recipe: Recipe, data: TrainingData, note: Note) -> Recipe:
    """Return the recipe with the vocabulary of the data, or its own if that is large enough."""
    wanted, given = recipe.model.vocab_size, data.tokenizer.vocab_size
    if not wanted:
        return _with_vocabulary(recipe, given)
    # Special tokens that the data's preparation has added, or that the model's own tokenizer has and its table lacks.
    added = [data.tokenizer.special_tokens.get(index, "") for index in range(wanted, given)]
    start = recipe.train.init_from
    if start is not None and added and all(added):
        rows = "1 more row" if len(added) == 1 else f"{len(added)} more rows"
        note(f"{start} gets {rows} in its embedding, for {' '.join(added)}")
        return _with_vocabulary(recipe, given)
    if wanted < given:
        fit = f"a tokenizer that fits (for example --tokenizer train:{wanted}) or set model.vocab_size={given}"
        advice = fit if start is None else f"the model's: --tokenizer {shlex.quote(start)}"
        raise DataError(
            f"{start or f'recipe {recipe.name}'} has model.vocab_size {wanted}, but the tokenizer of {data.main.path} "
            f"has {given} entries; prepare the data with {advice}"
        )
    if wanted > given:
        note(f"model.vocab_size {wanted} exceeds the tokenizer's {given}: {wanted - given} rows stay unused")
    return recipe


def _note_repeats(recipe: Recipe, data: TrainingData, note: Note) -> None:
    """Tell which sources the run reads several times, or that shifted windows have nothing to shift."""
    counts = source_order(recipe).counts(batch_plan(recipe).remaining()[1] // recipe.seq_len).tolist()
    repeats = False
    for (name, stream), count in zip(data.streams("train").items(), counts, strict=True):
        repeats = repeats or count > (len(stream) - 1) // recipe.seq_len
        tokens = count * recipe.seq_len if data.mixed else recipe.train.tokens
        if text := note_on_repeats(tokens, len(stream), name if data.mixed else None):
            note(text)
    if recipe.data.shift_windows and not repeats:
        note("data.shift_windows has no effect: the run reads no text twice")


def _note_validation(recipe: Recipe, data: TrainingData, note: Note) -> bool:
    """Tell which folders have nothing to validate on; return whether any has something."""
    validated = False
    for folder in data.folders.values():
        if holds_targets(folder.split("val"), recipe.seq_len, recipe.data.too_long):
            validated = True
            continue
        rest = "it has no part in the validation loss" if data.mixed else "there will be no validation loss"
        holds = f"nothing to predict in sequences of {recipe.seq_len} in its" if len(folder.split("val")) else "no"
        note(f"{folder.path} has {holds} validation split: {rest}")
    return validated


def _require_documents(recipe: Recipe, data: TrainingData) -> None:
    """Raise RecipeError if `data.document_mask` finds no end of a document."""
    streams = data.streams("train").values()  # an empty one is refused by the loader
    if recipe.data.document_mask and all(map(len, streams)) and not any(stream.holds_documents() for stream in streams):
        names = ", ".join(str(folder.path) for folder in data.folders.values())
        raise RecipeError(
            "data.document_mask has no effect: nothing follows an end-of-text token (id "
            f"{data.end_of_text_id}) in the train split of {names}; leave it out"
        )


def _check_prompts(recipe: Recipe, data: TrainingData) -> None:
    for prompt in recipe.eval.prompts:
        length = len(data.tokenizer.encode(prompt))
        if length > recipe.model.max_seq_len:
            raise RecipeError(
                f"a prompt of eval.prompts has {length} tokens, model.max_seq_len is {recipe.model.max_seq_len}; "
                f"shorten it: {prompt[:60]!r}"
            )

"""Hugging Face model folders: write them so that transformers loads them without custom code, and read them.

Neither direction needs transformers. `layouts` has the names that the classes use.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from lightlm import files
from lightlm.checkpoint import GENERATION, LoadedModel, build_model, clean_state
from lightlm.convert.folding import as_plain
from lightlm.convert.huggingface.card import model_card
from lightlm.convert.huggingface.config import read_config, read_json, write_config
from lightlm.convert.huggingface.layouts import LAYOUTS, SELECTION_BIAS, export_target
from lightlm.convert.huggingface.weights import (
    only_weights,
    read_weights,
    weight_files,
    with_all_biases,
    with_shared_experts,
)
from lightlm.convert.record import write_record
from lightlm.convert.renaming import our_state, refuse_absurd_size, their_state
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.folder import (
    DEFINITION,
    FURTHER_TOKENS,
    OTHER_TEMPLATES,
    SETTINGS,
    SPECIAL_TOKENS,
    read_settings,
)
from lightlm.errors import ConvertError, DataError
from lightlm.names import warn

WEIGHTS = Path("model.safetensors")
SHARD_BYTES = 5 * 1000**3  # as transformers splits them


def export_huggingface(
    loaded: LoadedModel,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    license: str = "unknown",
    repository: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, whole or not at all.

    Args:
        dtype: the precision of the weights in the file.
        overwrite: replace the folder `out` if it exists.
        license: the Hub's identifier, for the card.
        repository: the id on the Hub that the folder is made for; empty if it stays here.
        shard_bytes: weights above this size are written in several files.

    Returns:
        The number of parameters written; each repetition of a block is written as a layer, and counts.

    Raises:
        ConvertError: no Hugging Face class computes what this model computes, or `out` exists.
    """
    target = export_target(loaded.model.config)
    if target.refusal:
        raise ConvertError(f"{loaded.path} cannot be exported to Hugging Face: {target.refusal}")
    loaded = as_plain(loaded)
    config = loaded.model.config
    values = write_config(target.model_type, config) | {"dtype": str(dtype).removeprefix("torch.")}
    ours = clean_state(loaded.model.state_dict())
    if not config.num_shared_experts:  # a class that always has shared experts loads tensors without elements
        ours = with_shared_experts(config, ours, width=0)
    if LAYOUTS[target.model_type].needs_all_biases:
        ours = with_all_biases(config, ours)
    state = their_state(LAYOUTS[target.model_type], config, ours, dtype)
    parameters = sum(tensor.numel() for name, tensor in state.items() if not name.endswith(SELECTION_BIAS))
    try:
        with files.new_folder(out, overwrite=overwrite) as folder:
            _write_weights(folder, state, shard_bytes)
            write_description(folder, loaded, values)
            card = model_card(
                loaded,
                repository or out.as_posix(),
                architecture=target.architecture,
                parameters=parameters,
                license=license,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            write_record(folder, loaded.path)
    except FileExistsError:
        raise ConvertError(f"{out} exists already; choose another folder, or replace it with --overwrite") from None
    return parameters


def _write_weights(folder: Path, state: dict[str, torch.Tensor], shard_bytes: int) -> None:
    """Write model.safetensors, or several files and an index of them."""
    shards = split_torch_state_dict_into_shards(
        state, filename_pattern=f"{WEIGHTS.stem}{{suffix}}{WEIGHTS.suffix}", max_shard_size=shard_bytes
    )
    for name, tensors in shards.filename_to_tensors.items():
        save_file({key: state[key] for key in tensors}, folder / name, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / f"{WEIGHTS.name}.index.json", index)


def write_description(folder: Path, loaded: LoadedModel, values: dict[str, Any]) -> None:
    """Write all files beside the weights: config.json, generation_config.json and those of the tokenizer.

    Args:
        values: config.json without the ids of tokens.
    """
    tokenizer, size = loaded.tokenizer, loaded.model.config.vocab_size
    # A character-level tokenizer has an end-of-text token for which the model has no row, so it never ends a text.
    end = tokenizer.end_of_text_id if tokenizer.end_of_text_id < size else None
    bos = end if tokenizer.bos_id is None else tokenizer.bos_id
    said = [each for each in _as_list(tokenizer.generation_config.get("eos_token_id")) if each in tokenizer.end_ids]
    ends = [each for each in dict.fromkeys([end, *said]) if each is not None]  # an import takes the first as `end`
    # Without pad_token_id: it would freeze that embedding when the model is trained further.
    ids = {"bos_token_id": bos, "eos_token_id": ends if len(ends) > 1 else end}
    pad = _padding(tokenizer, end)
    generation = dict(tokenizer.generation_config)
    if generation.keys() <= {"eos_token_id", "pad_token_id"}:  # an imported file has more, and stays as it is
        generation = ids | ({} if pad is None else {"pad_token_id": pad}) | generation
    if end not in _as_list(generation.get("eos_token_id")):
        generation["eos_token_id"] = ids["eos_token_id"]
    _write_json(folder / "config.json", values | ids)
    _write_json(folder / GENERATION, generation)
    _write_tokenizer(folder, tokenizer, bos, end, pad, loaded.model.config.max_seq_len)


def _padding(tokenizer: Tokenizer, end: int | None) -> int | None:
    """Return the token for padding: the one that the tokenizer names, else `end` if the model was made here.

    An imported model may have none. A model that was made here has no settings unless it chats.
    """
    settings = tokenizer.settings
    if (named := tokenizer.id_of(settings.get("pad_token"))) is not None:
        return named
    ours = tokenizer.bos_id is None and tokenizer.generation_config.keys() <= {"eos_token_id"}
    return end if ours and (not settings or "chat_template" in settings) else None


def import_huggingface(folder: Path) -> LoadedModel:
    """Read a Hugging Face folder of one of the classes in `layouts` as a float32 model in evaluation mode.

    Weights may be float32, bfloat16 or float16, in one safetensors or PyTorch file or in shards.

    Raises:
        ConvertError: a file is missing or damaged, or LightLM does not have such a model.
        CheckpointError: weights do not have the shapes that config.json gives.
    """
    if not (folder / "config.json").is_file():
        raise ConvertError(f"{folder} is not a Hugging Face model: config.json is missing")
    values = read_json(folder / "config.json")
    model_type, config = read_config(values, str(folder / "config.json"))
    tokenizer = _read_tokenizer(folder, values, config.vocab_size)
    layout, given = LAYOUTS[model_type], read_weights(folder)
    refuse_absurd_size(config, folder / "config.json", weight_files(folder))
    state = our_state(layout, config, only_weights(layout, config, given, folder), folder)
    return LoadedModel(build_model(config, state, str(folder)).eval(), tokenizer, folder, weight_files(folder))


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer, bos: int | None, end: int | None, pad: int | None, max_seq_len: int
) -> None:
    """Write the files that make `AutoTokenizer` encode as our tokenizer does.

    Truncation and padding are left out, because LightLM uses neither. The post-processor is left out where it adds
    tokens to a text, unless the model was imported with a tokenizer that does.
    """
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    raw = tokenizers.Tokenizer.from_file(str(path))
    definition = read_json(path)
    frames = raw.num_special_tokens_to_add(is_pair=False) and not tokenizer.adds_bos
    if frames:
        definition["post_processor"] = None
    if frames or raw.truncation or raw.padding:
        _write_json(path, definition | {"truncation": None, "padding": None})
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: raw.id_to_token(each) for name, each in (("bos_token", bos), ("eos_token", end)) if each is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
    }
    settings |= dict(tokenizer.settings)
    if pad is not None:
        settings["pad_token"] = tokenizer.name_of(pad)
    # transformers 4 reads further tokens under their old name only, and transformers 5 under both.
    if further := [token for key in FURTHER_TOKENS for token in settings.pop(key, [])]:
        settings[FURTHER_TOKENS[0]] = list(dict.fromkeys(further))
    if others := settings.pop(OTHER_TEMPLATES, None):
        templates = {"default": settings["chat_template"]} if "chat_template" in settings else {}
        named = (templates | others).items()
        settings["chat_template"] = [{"name": name, "template": text} for name, text in named]
    _write_json(folder / SETTINGS, settings)
    special = {key: value for key, value in settings.items() if key.endswith("_token") or key in FURTHER_TOKENS}
    _write_json(folder / SPECIAL_TOKENS, {key: value for key, value in special.items() if value is not None})


def _read_tokenizer(folder: Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    try:
        tokenizer, settings = Tokenizer.read(folder), read_settings(folder)
    except DataError as error:
        raise ConvertError(str(error)) from None
    endless = config.get("eos_token_id", "") is None and tokenizer.end_of_text_id == vocab_size  # our own export
    generation = _read_generation(folder, config)
    if tokenizer.vocab_size > vocab_size + endless:
        tokenizer = _without_surplus(tokenizer, folder, vocab_size)
        settings = _known(settings, tokenizer)
        if isinstance(pad := generation.get("pad_token_id"), int) and pad >= vocab_size:
            del generation["pad_token_id"]
    # Beginning of text, as `AutoTokenizer`: where no tokenizer file names it, the id in config.json.
    bos_id = None
    if "bos_token" in settings:
        bos_id = tokenizer.id_of(settings["bos_token"])
    elif isinstance(bos := config.get("bos_token_id"), int) and 0 <= bos < tokenizer.vocab_size:
        bos_id = bos
    return tokenizer.used_as(bos_id, bool(tokenizer.prefix_ids), settings, generation)


def _without_surplus(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> Tokenizer:
    """Return a tokenizer without added tokens for which the model has no rows, such as one only for padding.

    Raises:
        ConvertError: other tokens have none either, or texts begin or end with one of these.
    """
    added = {each["id"]: each["content"] for each in tokenizer.content.get("added_tokens") or []}
    surplus = {index: name for index, name in sorted(added.items()) if index >= vocab_size}
    needed = {tokenizer.end_of_text_id, *tokenizer.prefix_ids}
    if tokenizer.vocab_size - len(surplus) > vocab_size or needed & surplus.keys():
        raise ConvertError(
            f"{folder / DEFINITION} has {tokenizer.vocab_size} tokens, config.json's vocab_size is {vocab_size}: "
            "the tokenizer belongs to another model; replace it with the model's own"
        )
    kept = [each for each in tokenizer.content["added_tokens"] if each["id"] < vocab_size]
    definition = json.dumps(tokenizer.content | {"added_tokens": kept}, ensure_ascii=False).encode()
    names = ", ".join(f"{name} (id {index})" for index, name in surplus.items())
    warn(f"{folder / DEFINITION}: {names}: left out, because the model has rows for {vocab_size} tokens only")
    return Tokenizer(definition, origin=str(folder / DEFINITION), end_of_text_id=tokenizer.end_of_text_id)


def _known(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return settings without the tokens that a tokenizer lacks; padding is then the end-of-text token's."""
    known: dict[str, Any] = {}
    for key, value in settings.items():
        if key in FURTHER_TOKENS:
            known[key] = [token for token in value if tokenizer.id_of(token) is not None]
        elif not key.endswith("_token") or value is None or tokenizer.id_of(value) is not None:
            known[key] = value
    if "pad_token" in settings and "eos_token" in known:
        known.setdefault("pad_token", known["eos_token"])
    return known


def _read_generation(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the folder's generation_config.json; without one, what transformers takes from config.json for it."""
    if (folder / GENERATION).is_file():
        return read_json(folder / GENERATION)
    ends, pad = config.get("eos_token_id"), config.get("pad_token_id")
    said: dict[str, Any] = {"eos_token_id": ends} if isinstance(ends, list) else {}
    return said | ({"pad_token_id": pad} if isinstance(pad, int) else {})


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Hugging Face model folders: write them so that transformers loads them without custom code, and read them.

Neither direction needs transformers. `layouts` has the names that the classes use.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from lightlm import __version__, files
from lightlm.checkpoint import LoadedModel, build_model, clean_state
from lightlm.convert.export_record import write_record
from lightlm.convert.huggingface.config import read_config, read_json, write_config
from lightlm.convert.huggingface.export_target import export_target
from lightlm.convert.huggingface.layouts import SELECTION_BIAS
from lightlm.convert.huggingface.weights import our_state, read_weights, their_state, weight_files
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig

_MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [lightlm]
---

# {title}

A language model of {parameters:,} parameters, exported from LightLM {version} as `{architecture}`.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{name}")
    model = AutoModelForCausalLM.from_pretrained("{name}")
"""


def export_huggingface(
    loaded: LoadedModel, out: Path, *, dtype: torch.dtype = torch.float32, overwrite: bool = False
) -> int:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, whole or not at all.

    Args:
        dtype: the precision of the weights in the file.
        overwrite: replace the folder `out` if it exists.

    Returns:
        The number of parameters written. It is more than the model's own if blocks repeat, because each repetition is
        written as a layer.

    Raises:
        ConvertError: no Hugging Face class computes what this model computes, or `out` exists.
    """
    config = loaded.model.config
    target = export_target(config)
    if target.refusal:
        raise ConvertError(f"{loaded.path} cannot be exported to Hugging Face: {target.refusal}")
    state = their_state(target.model_type, config, clean_state(loaded.model.state_dict()), dtype)
    parameters = sum(tensor.numel() for name, tensor in state.items() if not name.endswith(SELECTION_BIAS))
    try:
        with files.new_folder(out, overwrite=overwrite) as folder:
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            _write_json(folder / "config.json", _model_json(target.model_type, config, loaded.tokenizer, dtype))
            _write_tokenizer(folder, loaded.tokenizer, config.max_seq_len)
            card = _MODEL_CARD.format(
                title=loaded.name,
                name=out.resolve().name,
                parameters=parameters,
                version=__version__,
                architecture=target.architecture,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            write_record(folder, loaded.path)
    except FileExistsError:
        raise ConvertError(f"{out} exists already; choose another folder, or replace it with --overwrite") from None
    return parameters


def import_huggingface(folder: Path) -> LoadedModel:
    """Read a Hugging Face folder of one of the classes in `layouts` as a float32 model in evaluation mode.

    Weights may be float32, bfloat16 or float16, in one safetensors or PyTorch file or in shards.

    Raises:
        ConvertError: a file is missing or damaged, or LightLM does not have such a model; the message names the file,
            and the config keys with their values.
        CheckpointError: weights do not have the shapes that config.json gives.
    """
    if not (folder / "config.json").is_file():
        raise ConvertError(f"{folder} is not a Hugging Face model: config.json is missing")
    values = read_json(folder / "config.json")
    model_type, config = read_config(values, str(folder / "config.json"))
    tokenizer = _read_tokenizer(folder, values, config.vocab_size)
    state = our_state(model_type, config, read_weights(folder), folder)
    return LoadedModel(build_model(config, state, str(folder)).eval(), tokenizer, folder, weight_files(folder))


def _model_json(model_type: str, config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    # Without pad_token_id: it would freeze that embedding when the model is trained further.
    end = tokenizer.end_of_text_id
    bos = end if tokenizer.bos_id is None else tokenizer.bos_id
    name = str(dtype).removeprefix("torch.")
    return {**write_config(model_type, config), "dtype": name, "bos_token_id": bos, "eos_token_id": end}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write the tokenizer so that `AutoTokenizer` gives our ids.

    It does not truncate, and adds tokens to a text only if the model was imported with a tokenizer that does.
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
    end = tokenizer.end_of_text_id
    token = raw.id_to_token(end)
    bos = end if tokenizer.bos_id is None else tokenizer.bos_id
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": raw.id_to_token(bos),
            "eos_token": token,
            "pad_token": token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq_len,
        },
    )
    _write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": end})


def _read_tokenizer(folder: Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConvertError(
            f"{folder} has no tokenizer.json; put the model's there (transformers writes it with "
            "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER))"
        )
    tokenizer = Tokenizer.from_file(path, end_of_text_id=_end_of_text_id(folder, config))
    if tokenizer.vocab_size > vocab_size:
        raise ConvertError(
            f"{path} has {tokenizer.vocab_size} tokens, config.json's vocab_size is {vocab_size}: "
            "the tokenizer belongs to another model; replace it with the model's own"
        )
    tokenizer.bos_id = _bos_id(folder, config, tokenizer)
    tokenizer.adds_bos = bool(tokenizer.prefix_ids)
    return tokenizer


def _bos_id(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    """Return the beginning-of-text id that `AutoTokenizer` has.

    Where no tokenizer file names it, the id in config.json replaces the defaults of the tokenizer classes.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = read_json(folder / name)
        if "bos_token" in values:
            token = values["bos_token"]
            return tokenizer.id_of(token.get("content") if isinstance(token, dict) else token)
    named = config.get("bos_token_id")
    return named if isinstance(named, int) and 0 <= named < tokenizer.vocab_size else None


def _end_of_text_id(folder: Path, config: dict[str, Any]) -> int | None:
    """Return the first end-of-sequence id that a config file names and the tokenizer has, or None.

    The files are config.json, generation_config.json and tokenizer_config.json, in this order.
    """
    try:
        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise ConvertError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    named: list[Any] = []
    for values in (config, read_json(folder / "generation_config.json")):
        eos = values.get("eos_token_id")
        named += eos if isinstance(eos, list) else [eos]
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(token, dict):  # an AddedToken with its flags
        token = token.get("content")
    if token is not None:
        named.append(raw.token_to_id(token))
    return next((id_ for id_ in named if isinstance(id_, int) and raw.id_to_token(id_) is not None), None)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

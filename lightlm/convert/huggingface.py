"""Hugging Face model folders: written so that transformers loads them with no code of ours, and read back.

transformers itself is not needed for either. How the classes name things stands in `layouts`.
"""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightlm import __version__, files
from lightlm.checkpoint import LoadedModel, build_model, clean_state
from lightlm.convert.layouts import LAYOUTS, Layout, layer_links, read_config, write_config
from lightlm.convert.registry import export_target
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer

RECORD = "lightlm_export.json"  # what an export wrote: a folder that still fits it holds nothing else
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Causal masks of old GPT-2 files and rotary frequencies of old Llama files: constants, not weights.
_CONSTANTS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")

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
        The number of parameters written; more than the model's own where shared blocks are written out.

    Raises:
        ConvertError: no Hugging Face class computes what this model computes, or `out` exists.
    """
    config = loaded.model.config
    target = export_target(config)
    if target.refusal:
        raise ConvertError(f"{loaded.path} cannot be exported to Hugging Face: {target.refusal}")
    state = _their_state(LAYOUTS[target.model_type], config, clean_state(loaded.model.state_dict()), dtype)
    parameters = sum(tensor.numel() for tensor in state.values())
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
            sums = {file.name: files.checksum(file) for file in sorted(folder.iterdir())}
            _write_json(
                folder / RECORD, {"lightlm_version": __version__, "source": loaded.path.as_posix(), "xxh3": sums}
            )
    except FileExistsError:
        raise ConvertError(f"{out} exists already; choose another folder or overwrite it (--overwrite)") from None
    return parameters


def is_untouched_export(folder: Path) -> bool:
    """Whether a folder holds exactly what `export_huggingface` wrote there, so that nothing is lost with it."""
    try:
        sums = json.loads((folder / RECORD).read_text(encoding="utf-8"))["xxh3"]
        return {path.name for path in folder.iterdir()} == {*sums, RECORD} and all(
            files.checksum(folder / name) == value for name, value in sums.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def import_huggingface(folder: Path) -> LoadedModel:
    """Read a Hugging Face folder of GPT-2, Llama, Mistral (without its window) or Qwen3 as a float32 model.

    Weights may be float32, bfloat16 or float16, in one safetensors or PyTorch file or in shards.

    Raises:
        ConvertError: a file is missing or damaged, or the model is one that LightLM does not have; the message
            names the file, and the config keys with their values.
        CheckpointError: weights do not have the shapes that config.json tells.
    """
    if not (folder / "config.json").is_file():
        raise ConvertError(f"{folder} is no Hugging Face model: config.json is missing")
    values = _read_json(folder / "config.json")
    model_type, config = read_config(values, str(folder / "config.json"))
    tokenizer = _read_tokenizer(folder, values, config.vocab_size)
    state = _our_state(LAYOUTS[model_type], config, _read_weights(folder), folder)
    return LoadedModel(build_model(config, state, str(folder)).eval(), tokenizer, folder)


def _their_state(
    layout: Layout, config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    theirs = {}
    for link in layer_links(layout, config.depth, config.block_repeats):
        for kind in (".weight", ".bias"):
            if link.ours[0] + kind in state:
                tensor = torch.cat([state[name + kind].to(dtype) for name in link.ours])
                # Copied where blocks repeat: a safetensors file cannot hold one tensor under two names.
                theirs[link.theirs + kind] = (tensor.t() if link.transposed and tensor.ndim == 2 else tensor).clone(
                    memory_format=torch.contiguous_format
                )
    return theirs


def _our_state(layout: Layout, config: ModelConfig, given: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in given.items() if not _CONSTANTS.search(name)}
    if not any(name.startswith(layout.base) for name in given):  # saved from the model without its head
        given = {name if name.startswith("lm_head.") else layout.base + name: given[name] for name in given}
    if config.tie_embeddings and "lm_head.weight" in given:
        embedding = given.get(layout.links[0].theirs + ".weight")
        if embedding is not None and not torch.equal(given.pop("lm_head.weight"), embedding):
            raise ConvertError(
                f"{folder}: config.json says tie_word_embeddings: true, but lm_head.weight differs from the embedding; "
                "set it to false if the head is its own"
            )
    with torch.device("meta"):
        wanted = Transformer(config).state_dict().keys()
    state: dict[str, Tensor] = {}
    missing = []
    for link in layer_links(layout, config.num_layers):
        for kind in (".weight", ".bias"):
            if link.ours[0] + kind not in wanted:
                continue
            if link.theirs + kind not in given:
                missing.append(link.theirs + kind)
                continue
            tensor = given.pop(link.theirs + kind).float()
            # Equal parts: of the classes read here, only GPT-2 fuses, and it has a key head for every query head.
            parts = (tensor.t() if link.transposed and tensor.ndim == 2 else tensor).tensor_split(len(link.ours))
            for name, part in zip(link.ours, parts, strict=True):
                state[name + kind] = part.clone(memory_format=torch.contiguous_format)
    if missing or given:
        problems = [f"{name} is missing" for name in missing]
        problems += [f"{name} belongs to no part of {layout.architecture}" for name in sorted(given)]
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConvertError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems[:5])}{more}")
    return state


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in WEIGHT_FILES:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return _load_tensors(folder / name)
        parts = _read_json(folder / name).get("weight_map")
        if not isinstance(parts, dict):
            raise ConvertError(f"{folder / name} is damaged: it has no weight_map")
        state: dict[str, Tensor] = {}
        for part in sorted(set(parts.values())):
            if not (folder / part).is_file():
                raise ConvertError(f"{folder / part} is missing, though {name} lists it; download it again")
            state |= _load_tensors(folder / part)
        return state
    raise ConvertError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)} is there")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConvertError(f"{path} cannot be read, it is damaged or cut off: {error}") from None


def _model_json(model_type: str, config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    # No pad_token_id here: it would freeze that embedding when the model is trained further.
    end = tokenizer.end_of_text_id
    name = str(dtype).removeprefix("torch.")
    return {**write_config(model_type, config), "dtype": name, "bos_token_id": end, "eos_token_id": end}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """The tokenizer, so that `AutoTokenizer` gives our ids: nothing added to a text, and nothing cut off."""
    path = folder / "tokenizer.json"
    tokenizer.save(path)
    raw = tokenizers.Tokenizer.from_file(str(path))
    definition = _read_json(path)
    if raw.num_special_tokens_to_add(is_pair=False):
        definition["post_processor"] = None
    if raw.num_special_tokens_to_add(is_pair=False) or raw.truncation or raw.padding:
        _write_json(path, definition | {"truncation": None, "padding": None})
    end = tokenizer.end_of_text_id
    token = raw.id_to_token(end)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token,
            "eos_token": token,
            "pad_token": token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq_len,
        },
    )
    _write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})


def _read_tokenizer(folder: Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConvertError(
            f"{folder} has no tokenizer.json; put the model's there (transformers writes it: "
            "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER))"
        )
    tokenizer = Tokenizer.from_file(path, end_of_text_id=_end_of_text_id(folder, config))
    if tokenizer.vocab_size > vocab_size:
        raise ConvertError(
            f"{path} has {tokenizer.vocab_size} tokens, config.json's vocab_size is {vocab_size}: "
            "this tokenizer belongs to another model"
        )
    return tokenizer


def _end_of_text_id(folder: Path, config: dict[str, Any]) -> int | None:
    """The first end-of-sequence id that config.json, generation_config.json or tokenizer_config.json names and
    the tokenizer has; None when there is none."""
    try:
        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no narrower type
        raise ConvertError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    named: list[Any] = []
    for values in (config, _read_json(folder / "generation_config.json")):
        eos = values.get("eos_token_id")
        named += eos if isinstance(eos, list) else [eos]
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(token, dict):  # an AddedToken with its flags
        token = token.get("content")
    if token is not None:
        named.append(raw.token_to_id(token))
    return next((id_ for id_ in named if isinstance(id_, int) and raw.id_to_token(id_) is not None), None)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvertError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConvertError(f"{path} is no JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

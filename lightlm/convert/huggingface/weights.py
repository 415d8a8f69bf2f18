"""Rename weights between a Hugging Face class and our model, by the tables in `layouts`, and read their files."""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightlm.convert.huggingface.config import WEIGHT_FILES, read_json
from lightlm.convert.huggingface.layouts import LAYOUTS, SELECTION_BIAS, Layout, Link, layer_links
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer

# Causal masks in old GPT-2 files and rotary frequencies in old Llama files: constants, not weights.
_CONSTANTS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
_KINDS = (".weight", ".bias", "")  # the endings of a link's names: a module's tensors, or a tensor's full name


def their_state(
    model_type: str, config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of a file that the class loads, from those of our checkpoint."""
    layout, state = LAYOUTS[model_type], dict(state)
    if not config.num_shared_experts:  # a class that always has shared experts loads tensors without elements
        for block in filter(config.has_experts, range(config.num_layers)):
            for name in ("gate_proj", "up_proj", "down_proj"):
                size = (config.hidden_size, 0) if name == "down_proj" else (0, config.hidden_size)
                state[f"blocks.{block}.mlp.shared.{name}.weight"] = torch.empty(size)
    theirs = {}
    for link in layer_links(layout.links, config.depth, config.layer_sharing):
        ours = link.ours.split()
        for kind in _KINDS:
            if ours[0] + kind not in state:
                continue
            tensor = _as_one(link, [state[name + kind] for name in ours], config)
            if offset := layout.offset(link.ours):
                tensor = tensor - offset
            if not link.theirs.endswith(SELECTION_BIAS):
                tensor = tensor.to(dtype)
            parts = tensor.unbind() if "*" in link.theirs else (_turned(link, tensor),)
            # A copy for each repeated block: a safetensors file cannot hold one tensor under two names.
            for name, part in zip(_names(link, kind, config), parts, strict=True):
                theirs[name] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def our_state(model_type: str, config: ModelConfig, given: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors of our checkpoint in float32; raise ConvertError if some are missing, left over or differ."""
    layout = LAYOUTS[model_type]
    given = _only_weights(layout, config, given, folder)
    stacked = any(name.endswith(".experts.gate_up_proj") for name in given)
    with torch.device("meta"):
        wanted = Transformer(config).state_dict().keys()
    state: dict[str, Tensor] = {}
    problems = []
    for link in layer_links(layout.stacked_links if stacked else layout.links, config.num_layers):
        ours = link.ours.split()
        for kind in _KINDS:
            if ours[0] + kind not in wanted:
                continue
            names = _names(link, kind, config)
            if missing := [name for name in names if name not in given]:
                problems += [f"{name} is missing" for name in missing]
                continue
            tensors = [given.pop(name).float() for name in names]
            if len({tensor.shape for tensor in tensors}) > 1:
                problems.append(f"{names[0]} and those of the other experts differ in shape")
                continue
            tensor = torch.stack(tensors) if "*" in link.theirs else _turned(link, tensors[0])
            if link.by_head and len(tensor) % (len(ours) * config.num_heads):
                problems.append(f"{names[0]} has {len(tensor)} rows, not {len(ours)} x {config.num_heads} heads")
                continue
            if offset := layout.offset(link.ours):
                tensor = tensor + offset
            for name, part in zip(ours, _as_several(link, tensor, len(ours), config), strict=True):
                state[name + kind] = part.clone(memory_format=torch.contiguous_format)
    problems += [f"{name} belongs to no part of {layout.architecture}" for name in sorted(given)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConvertError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems[:5])}{more}")
    return state


def _names(link: Link, kind: str, config: ModelConfig) -> list[str]:
    """Return their names of one of our tensors: one, or one for each expert."""
    name = link.theirs + kind
    return [name.replace("*", str(expert)) for expert in range(config.num_experts)] if "*" in name else [name]


def _as_one(link: Link, tensors: list[Tensor], config: ModelConfig) -> Tensor:
    """Return their tensor, before it is transposed, from our tensors of a link."""
    if link.by_head:
        return torch.stack([tensor.unflatten(0, (config.num_heads, -1)) for tensor in tensors], 1).flatten(0, 2)
    return torch.cat(tensors)


def _as_several(link: Link, tensor: Tensor, count: int, config: ModelConfig) -> Sequence[Tensor]:
    """Return our `count` tensors of a link from theirs, undoing `_as_one`."""
    if link.by_head:
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (config.num_heads, count, -1)).unbind(1)]
    # The parts are equal: gate and up are, and GPT-2 has as many key heads as query heads.
    return tensor.tensor_split(count, dim=1 if tensor.ndim == 3 else 0)


def _turned(link: Link, tensor: Tensor) -> Tensor:
    return tensor.t() if link.transposed and tensor.ndim == 2 else tensor


def _only_weights(layout: Layout, config: ModelConfig, given: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors under their full names, without constants, empty tensors and the copy of a tied head."""
    given = {name: tensor for name, tensor in given.items() if tensor.numel() and not _CONSTANTS.search(name)}
    if not any(name.startswith(layout.base) for name in given):  # saved from the model without its head
        given = {name if name.startswith("lm_head.") else layout.base + name: given[name] for name in given}
    if config.tie_embeddings and "lm_head.weight" in given:
        embedding = given.get(layout.links[0].theirs + ".weight")
        if embedding is not None and not torch.equal(given.pop("lm_head.weight"), embedding):
            raise ConvertError(
                f"{folder}: config.json says tie_word_embeddings: true, but lm_head.weight differs from the embedding; "
                "set it to false if the model has a head of its own"
            )
    return given


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a Hugging Face folder by name; raise ConvertError if a file is missing or damaged."""
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            safe = path.suffix == ".safetensors"
            state |= load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ConvertError(
                f"{path} cannot be read: it is damaged or cut off ({error}); download it again"
            ) from None
    return state


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder's tensors, safetensors before PyTorch; raise ConvertError if any is missing."""
    for name in WEIGHT_FILES:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return (folder / name,)
        parts = read_json(folder / name).get("weight_map")
        if not isinstance(parts, dict):
            raise ConvertError(f"{folder / name} is damaged: it has no weight_map")
        paths = tuple(folder / part for part in sorted(set(parts.values())))
        if missing := [path for path in paths if not path.is_file()]:
            raise ConvertError(f"{missing[0]} is missing, though {name} lists it; download it again")
        return paths
    raise ConvertError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)} is there")

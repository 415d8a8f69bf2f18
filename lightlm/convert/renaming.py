"""Rename the tensors of a model between a layout's names and ours, and join, split, turn and stack them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightlm.convert.layouts import Layout, Link, layer_links
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig
from lightlm.model.counting import count_parameters
from lightlm.model.transformer import Transformer

_PARAMETERS_PER_BYTE = 8  # 1 bit per weight: no format stores fewer
_KINDS = (".weight", ".bias", "")  # the endings of a link's names: a module's tensors, or a tensor's full name


def their_state(
    layout: Layout, config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the tensors under their names, from those of our model; a selection bias keeps its precision."""
    theirs = {}
    if layout.neighboring_pairs:
        state = {name: _to_neighbors(name, tensor, config) for name, tensor in state.items()}
    for link in layer_links(layout.links, config.depth, config.layer_sharing):
        ours = link.ours.split()
        for kind in _KINDS:
            if ours[0] + kind not in state:
                continue
            tensor = _as_one(link, [state[name + kind] for name in ours], config)
            if offset := layout.offset(link.ours):
                tensor = tensor - offset
            if not link.ours.endswith("selection_bias"):
                tensor = tensor.to(dtype)
            parts = tensor.unbind() if "*" in link.theirs else (_turned(link, tensor),)
            # A copy for each repeated block: a safetensors file cannot hold one tensor under two names.
            for name, part in zip(_names(link, kind, config), parts, strict=True):
                theirs[name] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def our_state(layout: Layout, config: ModelConfig, given: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Return the tensors of our model in float32; raise ConvertError if some are missing, left over or differ.

    Args:
        given: tensors under their names; it is emptied.
        where: the file or folder, for messages.
    """
    expert_tensors = config.num_experts if any("*" in link.theirs for link in layout.links) else 0
    stacked = any(name.endswith(".experts.gate_up_proj") for name in given)
    # Before memory is taken for what a configuration asks for.
    if (least := config.num_layers * max(1, 0 if stacked else expert_tensors)) > len(given):
        raise ConvertError(
            f"the weights in {where} do not fit its configuration: it describes at least {least:,} tensors, and there "
            f"are {len(given):,}"
        )
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
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
            if not all(tensor.ndim for tensor in tensors):
                problems.append(f"{names[0]} is a single number")
                continue
            if len({tensor.shape for tensor in tensors}) > 1:
                problems.append(f"{names[0]} and those of the other experts differ in shape")
                continue
            tensor = torch.stack(tensors) if "*" in link.theirs else _turned(link, tensors[0])
            rows = [wanted[name + kind][-2 if tensor.ndim == 3 else 0] for name in ours]
            if len(ours) > 1 and sum(rows) != (found := tensor.shape[-2 if tensor.ndim == 3 else 0]):
                problems.append(f"{names[0]} has {found} rows, not {' + '.join(map(str, rows))}")
                continue
            if offset := layout.offset(link.ours):
                tensor = tensor + offset
            for name, part in zip(ours, _as_several(link, tensor, rows, config), strict=True):
                if layout.neighboring_pairs:
                    part = _from_neighbors(name + kind, part, config)
                state[name + kind] = part.clone(memory_format=torch.contiguous_format)
    problems += [f"{name} belongs to no part of {layout.architecture}" for name in sorted(given)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConvertError(f"the weights in {where} do not fit its configuration: {'; '.join(problems[:5])}{more}")
    return state


def refuse_absurd_size(config: ModelConfig, where: Path, weights: Iterable[Path]) -> None:
    """Raise ConvertError if a configuration describes far more parameters than its files can hold.

    A number in a damaged or hostile configuration would otherwise cost memory or hours before shapes are compared.
    """
    num_bytes = sum(path.stat().st_size for path in weights)
    if (parameters := count_parameters(config)["total"]) > num_bytes * _PARAMETERS_PER_BYTE:
        raise ConvertError(
            f"{where} describes a model of {parameters:,} parameters, but its weights have only {num_bytes:,} bytes: "
            "they do not belong together, or one of them is damaged"
        )


def _names(link: Link, kind: str, config: ModelConfig) -> list[str]:
    """Return their names of one of our tensors: one, or one for each expert."""
    name = link.theirs + kind
    return [name.replace("*", str(expert)) for expert in range(config.num_experts)] if "*" in name else [name]


def _as_one(link: Link, tensors: list[Tensor], config: ModelConfig) -> Tensor:
    """Return their tensor, before it is transposed, from our tensors of a link."""
    if link.by_head:
        return torch.cat([tensor.unflatten(0, (config.num_heads, -1)) for tensor in tensors], 1).flatten(0, 1)
    return torch.cat(tensors)


def _as_several(link: Link, tensor: Tensor, rows: list[int], config: ModelConfig) -> Sequence[Tensor]:
    """Return our tensors of a link, which have so many rows, from theirs, undoing `_as_one`."""
    if len(rows) == 1:
        return [tensor]
    if link.by_head:
        heads = tensor.unflatten(0, (config.num_heads, -1)).split([count // config.num_heads for count in rows], dim=1)
        return [part.flatten(0, 1) for part in heads]
    return tensor.split(rows, dim=1 if tensor.ndim == 3 else 0)


def _rotary_rows(name: str, config: ModelConfig) -> tuple[int, int] | None:
    """Return the rows of a head in one of our tensors, and how many of them, at its end, rotate; None if none do."""
    module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if config.attention == "mla":
        heads = {"q_proj": config.head_dim, "q_b_proj": config.head_dim, "k_rope_proj": config.rotary_dim}
    else:
        heads = dict.fromkeys(("q_proj", "k_proj"), config.head_dim)
    return (heads[module], config.rotary_dim) if module in heads else None


def _to_neighbors(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return one of our tensors with rotary channels 0, K/2, 1, K/2 + 1, ... in each head."""
    return _paired(tensor, _rotary_rows(name, config), (2, config.rotary_dim // 2))


def _from_neighbors(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Undo `_to_neighbors`."""
    return _paired(tensor, _rotary_rows(name, config), (config.rotary_dim // 2, 2))


def _paired(tensor: Tensor, rows: tuple[int, int] | None, pairs: tuple[int, int]) -> Tensor:
    if rows is None or len(tensor) % rows[0]:  # whoever builds the model names the shape
        return tensor
    heads = tensor.unflatten(0, (-1, rows[0]))
    still, turned = heads.split((rows[0] - rows[1], rows[1]), dim=1)
    turned = turned.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
    return torch.cat((still, turned), dim=1).flatten(0, 1)


def _turned(link: Link, tensor: Tensor) -> Tensor:
    return tensor.t() if link.transposed and tensor.ndim == 2 else tensor

"""The tensors of a GGUF file: rename, reorder and quantize them, and back."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from lightlm.convert.gguf.header import Header, TensorPlace
from lightlm.convert.gguf.layouts import LAYOUTS
from lightlm.convert.gguf.shape import DIVISORS
from lightlm.convert.huggingface.weights import with_all_biases, with_shared_experts
from lightlm.convert.renaming import our_state, their_state
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig
from lightlm.model.rotary import rotary_divisors

Type = gguf.GGMLQuantizationType

# What --dtype and --quantize store matrices as, and how the file as a whole is called.
PRECISIONS = {
    "float32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Matrices that llama.cpp reads as float32 only, or that are small and decide much.
_ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "position_embd.weight")
# Token tables and heads lose most by quantization; with fewer bits than this they are stored as q8_0.
_TABLES = ("token_embd.weight", "output.weight")
_ABSORBED = ("attn_k_b.", "attn_v_b.")  # projections from latents, which llama.cpp has head by head


def gguf_tensors(name: str, config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 tensors of a file in the layout `name`, from those of our model."""
    layout = LAYOUTS[name]
    if any("_shexp" in link.theirs for link in layout.links) and not config.num_shared_experts:
        state = with_shared_experts(config, state, config.moe_intermediate_size)
    if any("exp_probs_b" in link.theirs for link in layout.links) and config.router == "softmax":
        for block in filter(config.has_experts, range(config.num_layers)):
            state = state | {f"blocks.{block}.mlp.router.selection_bias": torch.zeros(config.num_experts)}
    if layout.needs_all_biases:
        state = with_all_biases(config, state)
    tensors = their_state(layout, config, state)
    if config.rope_scaling == "llama3" and config.position == "rope":
        tensors[DIVISORS] = rotary_divisors(config)
    return {key: _by_head(key, tensor, config) for key, tensor in tensors.items()}


def our_tensors(name: str, config: ModelConfig, header: Header) -> dict[str, Tensor]:
    """Return the float32 tensors of our model from a file in the layout `name`.

    Raises:
        ConvertError: tensors are missing, left over or of the wrong shape.
    """
    layout = LAYOUTS[name]
    given = {}
    for key, tensor in read_tensors(header):
        if ("_shexp" in key and not config.num_shared_experts) or ("exp_probs_b" in key and config.router == "softmax"):
            continue  # zeros, which only llama.cpp needs
        if key == DIVISORS:
            if not _are_close(tensor, rotary_divisors(config)):
                raise ConvertError(
                    f"{header.path}: {DIVISORS} scales rotary frequencies otherwise than Llama 3 (rope_type llama3), "
                    "and LightLM has no other rule for it"
                )
            continue
        given[key] = _joined_heads(key, tensor)
    return our_state(layout, config, given, header.path)


def _are_close(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.allclose(tensor, other, rtol=1e-5)


def _by_head(key: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return absorbed projections as one matrix per head: keys (H, L, N), values (H, V, L); other tensors as given."""
    if not any(part in key for part in _ABSORBED):
        return tensor
    heads = tensor.unflatten(0, (config.num_heads, -1))
    return heads.transpose(1, 2).contiguous() if _ABSORBED[0] in key else heads


def _joined_heads(key: str, tensor: Tensor) -> Tensor:
    """Undo `_by_head`."""
    if tensor.ndim != 3 or not any(part in key for part in _ABSORBED):
        return tensor
    return (tensor.transpose(1, 2) if _ABSORBED[0] in key else tensor).flatten(0, 1)


def stored_type(key: str, shape: tuple[int, ...], precision: str) -> Type:
    """Return how a tensor is stored in a file of this precision.

    Vectors are float32. A matrix whose rows are not whole blocks is float16 in a quantized file, as llama.cpp does it.
    """
    kind = PRECISIONS[precision][0]
    if len(shape) < 2 or key.endswith(_ALWAYS_FLOAT32):
        return Type.F32
    if key in _TABLES and kind not in (Type.F32, Type.F16, Type.BF16):
        kind = Type.Q8_0
    return Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def stored(tensor: Tensor, kind: Type) -> np.ndarray:
    """Return the bytes of a float32 tensor in a type."""
    if kind == Type.BF16:  # numpy has no such type
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    if kind in (Type.F32, Type.F16):
        return tensor.to(torch.float32 if kind == Type.F32 else torch.float16).contiguous().numpy()
    return gguf.quants.quantize(tensor.contiguous().numpy(), kind)


def read_tensors(header: Header) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values in float32 of each tensor.

    Raises:
        ConvertError: a tensor has a type that `gguf` cannot turn into numbers.
    """
    for key, place in header.tensors.items():
        yield key, _read(header.path, key, place)


def _read(path: Path, key: str, place: TensorPlace) -> Tensor:
    kind = Type(place.type)
    data = np.memmap(path, np.uint8, "r", place.offset, (place.size,))
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows = data.reshape(*place.shape[:-1], place.shape[-1] // block * block_bytes)
        values = gguf.quants.dequantize(rows, kind)
    except NotImplementedError:
        raise ConvertError(f"{path}: the tensor {key} is stored as {kind.name}, which LightLM does not read") from None
    return torch.from_numpy(np.array(values, np.float32).reshape(place.shape))

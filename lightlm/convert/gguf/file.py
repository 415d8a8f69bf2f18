"""GGUF files: write them so that llama.cpp loads them, and read them, those of others and quantized ones too."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lightlm import __version__, files
from lightlm.checkpoint import LoadedModel, build_model, clean_state
from lightlm.convert.folding import as_plain
from lightlm.convert.gguf.header import VERSION_KEY, read_header
from lightlm.convert.gguf.layouts import GATING, LAYOUTS, REPEATED, gguf_layout
from lightlm.convert.gguf.modelfile import modelfile, modelfile_path
from lightlm.convert.gguf.shape import DIVISORS, INIT_STD, SHARED_EXPERTS, read_shape, write_rotary
from lightlm.convert.gguf.tensors import PRECISIONS, gguf_tensors, our_tensors, stored, stored_type
from lightlm.convert.gguf.vocabulary import read_vocabulary, write_vocabulary
from lightlm.convert.layouts import Layout
from lightlm.errors import ConvertError
from lightlm.model.config import ModelConfig


def export_gguf(loaded: LoadedModel, out: Path, precision: str) -> int:
    """Write a file that llama.cpp loads and a Modelfile for Ollama beside it; return the number of parameters written.

    Args:
        precision: a key of `PRECISIONS`.

    Raises:
        ConvertError: llama.cpp does not have such a model or tokenizer.
    """
    loaded = as_plain(loaded)
    config = loaded.model.config
    name, refusal = gguf_layout(config)
    if refusal:
        raise ConvertError(f"{loaded.path} cannot be exported to GGUF: {refusal}")
    metadata = write_vocabulary(loaded.tokenizer, config.vocab_size)
    tensors = gguf_tensors(name, config, clean_state(loaded.model.state_dict()))
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(out, exclusive=True) as temporary:
        writer = gguf.GGUFWriter(temporary, LAYOUTS[name].architecture)
        try:
            _add(writer, _description(loaded, precision) | _shape(name, config) | metadata)
            for key, tensor in tensors.items():
                kind = stored_type(key, tuple(tensor.shape), precision)
                data = stored(tensor, kind)
                writer.add_tensor(key, data, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    files.write_text(modelfile_path(out), modelfile(loaded, out))
    return sum(tensor.numel() for key, tensor in tensors.items() if "exp_probs_b" not in key and key != DIVISORS)


def import_gguf(path: Path) -> LoadedModel:
    """Read a file of one of the architectures in `layouts` as a float32 model in evaluation mode.

    Raises:
        ConvertError: the file is damaged, or LightLM does not have such a model or tokenizer.
        CheckpointError: weights do not have the shapes that the metadata gives.
    """
    header = read_header(path)
    name, config = read_shape(header)
    tokenizer = read_vocabulary(header, config.vocab_size)
    model = build_model(config, our_tensors(name, config, header), str(path))
    return LoadedModel(model.eval(), tokenizer, path, (path,))


def _description(loaded: LoadedModel, precision: str) -> dict[str, Any]:
    return {
        "general.type": "model",
        "general.name": loaded.name,
        "general.file_type": int(PRECISIONS[precision][1]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        VERSION_KEY: __version__,
    }


def _shape(name: str, config: ModelConfig) -> dict[str, Any]:
    """Return the `ARCHITECTURE.KEY` metadata of a shape."""
    layout = LAYOUTS[name]
    values = {theirs: getattr(config, ours) for ours, theirs in layout.keys.items()}
    values[layout.keys["num_layers"]] = config.depth
    if "first_k_dense" in layout.keys:
        values[layout.keys["first_k_dense"]] = config.first_k_dense * config.layer_sharing
    if "router" in layout.keys:
        values[layout.keys["router"]] = GATING[config.router]
    if "num_shared_experts" in layout.keys:  # files without any hold one of zeros
        values[layout.keys["num_shared_experts"]] = config.num_shared_experts or 1
    for ours in ("norm_eps", "rope_theta", "routed_scaling_factor"):
        if ours in layout.keys:
            values[layout.keys[ours]] = float(getattr(config, ours))
    rotary, extra = write_rotary(config) if config.position == "rope" else ({}, {})
    values |= rotary
    values |= {copy: values[key] for copy, key in REPEATED.items() if key in values}
    if config.attention == "mla":
        values |= _latent_shape(config, layout)
    values["vocab_size"] = config.vocab_size
    extra |= {INIT_STD: float(config.init_std)}
    if config.num_experts:
        extra[SHARED_EXPERTS] = config.num_shared_experts
    return {f"{layout.architecture}.{key}": value for key, value in values.items()} | extra


def _latent_shape(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Return the keys of latent attention that follow from others, and those of models without experts."""
    rank = config.kv_lora_rank
    values: dict[str, Any] = {"attention.head_count_kv": 1, "attention.value_length": rank}
    values["attention.key_length"] = rank + config.qk_rope_head_dim
    if not config.num_experts:
        values |= {layout.keys["num_experts_per_tok"]: 0, layout.keys["first_k_dense"]: config.depth}
        values[layout.keys["moe_intermediate_size"]] = config.intermediate_size
    return values


def _add(writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> None:
    """Add metadata: whole numbers as uint32, others as float32, as llama.cpp expects them."""
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, float(np.float32(value)))
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)

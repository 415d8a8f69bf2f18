"""Write a folder with an ONNX model: the graph, its configuration and the tokenizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch

from lightlm import files
from lightlm.checkpoint import LoadedModel, clean_state
from lightlm.convert.huggingface.config import write_config
from lightlm.convert.huggingface.folder import write_description
from lightlm.convert.huggingface.layouts import export_target
from lightlm.convert.onnx.graph import build_graph
from lightlm.convert.record import write_record
from lightlm.model.config import ModelConfig

# Names of files by precision, as transformers.js looks them up (its dtypes fp32, fp16, bf16 and q8).
FILES = {
    "float32": "model.onnx",
    "float16": "model_fp16.onnx",
    "bfloat16": "model_bf16.onnx",
    "int8": "model_quantized.onnx",
}
# A file is one protocol buffer, which holds less than 2 GiB; above this, weights are in a file beside it.
_LARGEST = 1_900_000_000


def export_onnx(loaded: LoadedModel, out: Path, dtype: torch.dtype, quantize: str = "") -> tuple[int, Path]:
    """Write a folder with `onnx/model.onnx`, whole or not at all, in place of `out`.

    Args:
        loaded: without scales to fold.
        quantize: `int8`, or empty.

    Returns:
        The number of parameters, and the path of the graph.
    """
    config, state = loaded.model.config, clean_state(loaded.model.state_dict())
    graph = build_graph(config, state, dtype, quantized=bool(quantize))
    name = FILES[quantize or str(dtype).removeprefix("torch.")]
    with files.new_folder(out, overwrite=True) as folder:
        (folder / "onnx").mkdir()
        large = graph.ByteSize() > _LARGEST
        onnx.save(graph, folder / "onnx" / name, save_as_external_data=large, location=f"{name}_data")
        write_description(folder, loaded, describe(config))
        write_record(folder, loaded.path)
    return loaded.model.num_parameters()["total"], out / "onnx" / name


def describe(config: ModelConfig) -> dict[str, Any]:
    """Return config.json, from which programs read the shape of the cache.

    A model that no class of transformers computes is called a Llama: its cache has the same form.
    """
    model_type = export_target(config).model_type
    if model_type:
        return write_config(model_type, config)
    cache = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_seq_len")
    plain = ModelConfig(**{name: getattr(config, name) for name in cache})
    return write_config("llama", replace(plain, num_layers=config.depth))

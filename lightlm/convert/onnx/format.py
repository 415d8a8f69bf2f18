"""ONNX models as a format. Imports nothing heavy."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.huggingface.config import WEIGHT_FILES
from lightlm.convert.huggingface.format import holds_onnx
from lightlm.convert.layouts import as_yaml
from lightlm.convert.protocol import Format
from lightlm.model.config import ROPE_FIELDS

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig

# The fields of ModelConfig that `graph.py` computes, and of some the values. Another field is refused unless it has its
# default, or folds.
_COMPUTED = {
    "num_layers",
    "hidden_size",
    "num_heads",
    "max_seq_len",
    "vocab_size",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "norm",
    "norm_eps",
    "position",
    *ROPE_FIELDS,
    "mlp",
    "qk_norm",
    "attention_gate",
    "tie_embeddings",
    "bias",
    "bias_in",
    "layer_sharing",
    "sliding_window",
    "full_attention_interval",
    "init_std",  # has no effect on a trained model
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "moe_intermediate_size",
    "first_k_dense",
    "router",
    "norm_topk_prob",
    "routed_scaling_factor",
}
_VALUES = {
    "norm": ("rmsnorm", "layernorm"),
    "position": ("rope", "learned"),
    "mlp": ("swiglu", "gelu", "gelu_erf", "relu2"),
    "router": ("sigmoid", "softmax"),
}


class ONNXFolder(Format):
    """A folder with onnx/model.onnx, as optimum and transformers.js expect it."""

    name = "onnx"
    makes = "a folder for onnxruntime and transformers.js"
    package, verifier = "onnx", "onnxruntime"
    quantizations = ("int8",)
    folds = True

    def detect(self, path: Path) -> bool:
        if path.is_file():
            return path.suffix == ".onnx"
        return holds_onnx(path) and not any((path / name).is_file() for name in WEIGHT_FILES)

    def is_own(self, path: Path) -> bool:
        from lightlm.convert.record import is_untouched_export

        return is_untouched_export(path)

    def target(self, config: "ModelConfig") -> str:
        return "" if self.refusal(config) else "ONNX graph"

    def refusal(self, config: "ModelConfig") -> str:
        plain = config.folded()
        unknown = [each.name for each in fields(plain) if each.name not in _COMPUTED]
        names = [name for name in unknown if getattr(plain, name) != getattr(type(plain), name)]
        names += [name for name, values in _VALUES.items() if getattr(plain, name) not in values]
        listed = ", ".join(f"{name}: {as_yaml(getattr(plain, name))}" for name in names)
        return f"the ONNX graph does not compute {listed}" if listed else ""

    def write(self, loaded: "LoadedModel", out: Path, dtype: "torch.dtype", quantize: str = "") -> dict[str, Any]:
        from lightlm.convert.onnx.folder import export_onnx

        parameters, file = export_onnx(loaded, out, dtype, quantize)
        return {
            "parameters": parameters,
            "python": f'import onnxruntime; session = onnxruntime.InferenceSession("{file.as_posix()}")',
        }

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        from lightlm.convert.onnx.verify import verify

        return verify(loaded, path)

"""GGUF files as a format. Imports nothing heavy."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.gguf.layouts import LAYOUTS, gguf_layout
from lightlm.convert.protocol import Format
from lightlm.errors import ConvertError

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig


class GGUFFile(Format):
    """A file that llama.cpp and Ollama load."""

    name = "gguf"
    makes = "a file for llama.cpp, and Ollama's Modelfile"
    suffix, package, verifier = ".gguf", "gguf", "xllamacpp"
    takes = "a file of llama.cpp, quantized or not"
    kinds = tuple(dict.fromkeys(layout.architecture for layout in LAYOUTS.values()))
    folds = True
    quantizations = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

    def detect(self, path: Path) -> bool:
        from lightlm.convert.gguf.header import is_gguf

        return path.is_file() and is_gguf(path)

    def is_own(self, path: Path) -> bool:
        from lightlm.convert.gguf.header import VERSION_KEY, read_header

        try:
            return VERSION_KEY in read_header(path).metadata
        except ConvertError:
            return False

    def changed_beside(self, path: Path) -> Path | None:
        from lightlm.convert.gguf.modelfile import is_unchanged, modelfile_path

        beside = modelfile_path(path)
        return beside if beside.exists() and not is_unchanged(beside) else None

    def target(self, config: "ModelConfig") -> str:
        name, refusal = gguf_layout(config)
        return "" if refusal else f"{LAYOUTS[name].architecture} of llama.cpp"

    def refusal(self, config: "ModelConfig") -> str:
        return gguf_layout(config)[1]

    def shape(self, path: Path) -> "ModelConfig":
        from lightlm.convert.gguf.header import read_header
        from lightlm.convert.gguf.shape import read_shape

        return read_shape(read_header(path))[1]

    def read(self, path: Path) -> "LoadedModel":
        from lightlm.convert.gguf.file import import_gguf

        return import_gguf(path)

    def write(self, loaded: "LoadedModel", out: Path, dtype: "torch.dtype", quantize: str = "") -> dict[str, Any]:
        from lightlm.convert.gguf.file import export_gguf
        from lightlm.convert.gguf.modelfile import modelfile_path

        parameters = export_gguf(loaded, out, quantize or str(dtype).removeprefix("torch."))
        return {
            "parameters": parameters,
            "python": f"llama-cli -m {shlex.quote(out.as_posix())}",
            "beside": [modelfile_path(out)],
        }

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        from lightlm.convert.gguf.verify import verify

        return verify(loaded, path)

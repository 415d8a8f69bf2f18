"""GGUF files as a format. Imports nothing heavy."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.gguf.layouts import LAYOUTS, gguf_layout
from lightlm.errors import ConvertError

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig


class GGUFFile:
    """A file that llama.cpp and Ollama load; see `lightlm.convert.formats.Format` for the members."""

    name = "gguf"
    makes = "a .gguf file for llama.cpp, and a Modelfile for Ollama beside it"
    suffix, package, verifier = ".gguf", "gguf", "xllamacpp"
    reads = writes = folds = True
    quantizations: tuple[str, ...] = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

    def detect(self, path: Path) -> bool:
        from lightlm.convert.gguf.header import is_gguf

        return path.is_file() and is_gguf(path)

    def is_own(self, path: Path) -> bool:
        from lightlm.convert.gguf.file import VERSION_KEY
        from lightlm.convert.gguf.header import read_header

        try:
            return VERSION_KEY in read_header(path).metadata
        except ConvertError:
            return False

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
        from lightlm.convert.gguf.file import export_gguf, modelfile_path

        parameters = export_gguf(loaded, out, quantize or str(dtype).removeprefix("torch."))
        return {
            "class": f"{LAYOUTS[gguf_layout(loaded.model.config)[0]].architecture} of llama.cpp",
            "parameters": parameters,
            "python": f"llama-cli -m {shlex.quote(out.as_posix())}",
            "beside": [modelfile_path(out)],
        }

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        from lightlm.convert.gguf.verify import verify

        return verify(loaded, path)

"""LightLM's own checkpoint folder as a format; see `lightlm.checkpoint`. Imports nothing heavy."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.errors import ConvertError

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig


class CheckpointFolder:
    """A checkpoint without training state; see `lightlm.convert.formats.Format` for the members."""

    name = "lightlm"
    makes = "a checkpoint folder: model.safetensors, config.json, tokenizer.json, complete.json"
    suffix = ""
    reads = writes = True

    def detect(self, path: Path) -> bool:
        from lightlm.checkpoint import is_checkpoint

        if (path / "config.json").is_file():
            return is_checkpoint(path)
        return path.is_dir() and path.name.startswith("step_")  # an interrupted one: `read` says what is missing

    def refusal(self, config: "ModelConfig") -> str:
        return ""

    def read(self, path: Path) -> "LoadedModel":
        from lightlm.checkpoint import load_model

        return load_model(path)

    def write(self, loaded: "LoadedModel", out: Path, dtype: "torch.dtype") -> dict[str, Any]:
        from lightlm.checkpoint import save_model

        save_model(out, copy.deepcopy(loaded.model).to(dtype), loaded.tokenizer, overwrite=True)
        return {
            "class": "LightLM checkpoint",
            "parameters": loaded.model.num_parameters()["total"],
            "python": f'from lightlm.convert.load import load_pretrained; model = load_pretrained("{out.as_posix()}")',
        }

    def require_verifier(self) -> None:
        """LightLM is its own verifier."""

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        import torch

        models = [copy.deepcopy(each.model).to(dtype).float() for each in (loaded, self.read(path))]
        tokens_BT = torch.arange(min(128, loaded.model.config.max_seq_len))[None] % loaded.tokenizer.vocab_size
        with torch.no_grad():
            ours_BTV, theirs_BTV = (model(tokens_BT) for model in models)
        if not torch.equal(ours_BTV, theirs_BTV):
            raise ConvertError(f"{path} does not hold the weights of {loaded.path}; do not use it, and report this")
        return 0.0

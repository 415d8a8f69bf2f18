"""Hugging Face folders as a format. Imports nothing heavy."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.huggingface.config import WEIGHT_FILES
from lightlm.convert.huggingface.layouts import LAYOUTS, export_target
from lightlm.convert.protocol import Format
from lightlm.errors import ConvertError

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig


class HuggingFaceFolder(Format):
    """A folder that transformers loads."""

    name = "hf"
    makes = "a folder for transformers"
    takes = "a Hugging Face folder or a Hub id"
    kinds = tuple(layout.architecture for layout in LAYOUTS.values())
    verifier = "transformers"
    folds = True

    def __init__(self, license: str = "unknown", repository: str = "") -> None:
        """Take what the card of a folder says: its license, and the id on the Hub that it is made for, if any."""
        self.license, self.repository = license, repository

    def detect(self, path: Path) -> bool:
        from lightlm.checkpoint import is_checkpoint

        if not (path / "config.json").is_file() or is_checkpoint(path):
            return False
        # litgpt and ONNX exports have config.json beside their own weights.
        others = (path / "lit_model.pth").is_file() or holds_onnx(path)
        return not others or any((path / name).is_file() for name in WEIGHT_FILES)

    def is_own(self, path: Path) -> bool:
        from lightlm.convert.record import is_untouched_export

        return is_untouched_export(path)

    def target(self, config: "ModelConfig") -> str:
        return export_target(config).architecture

    def refusal(self, config: "ModelConfig") -> str:
        return export_target(config).refusal

    def shape(self, path: Path) -> "ModelConfig":
        from lightlm.convert.huggingface.config import read_config, read_json

        return read_config(read_json(path / "config.json"), str(path / "config.json"))[1]

    def read(self, path: Path) -> "LoadedModel":
        from lightlm.convert.huggingface.folder import import_huggingface

        return import_huggingface(path)

    def write(self, loaded: "LoadedModel", out: Path, dtype: "torch.dtype", quantize: str = "") -> dict[str, Any]:
        from lightlm.convert.huggingface.folder import export_huggingface

        loader = "AutoModelForCausalLM"
        parameters = export_huggingface(
            loaded, out, dtype=dtype, overwrite=True, license=self.license, repository=self.repository
        )
        return {
            "parameters": parameters,
            "python": f'from transformers import {loader}; model = {loader}.from_pretrained("{out.as_posix()}")',
        }

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        from lightlm.convert.huggingface.verify import check_tokenizer, largest_difference

        difference, limit = largest_difference(loaded, path, dtype)
        if not difference <= limit:
            raise ConvertError(
                f"{path} does not compute what {loaded.path} does: logits of transformers and LightLM differ by up to "
                f"{difference:.2e}, more than rounding ({limit:.0e}); do not use the conversion, and report this"
            )
        check_tokenizer(loaded, path)
        return difference


def holds_onnx(folder: Path) -> bool:
    """Return whether a folder holds ONNX files, where programs look for them."""
    return any(found for place in (folder, folder / "onnx") for found in place.glob("*.onnx"))

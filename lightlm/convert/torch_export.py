"""Programs of `torch.export` as a format: a .pt2 file that runs without LightLM. Imports nothing heavy."""

import copy
import io
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm.convert.protocol import Format
from lightlm.convert.samples import sample_tokens
from lightlm.errors import ConvertError

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig
    from lightlm.model.transformer import Transformer

# The largest accepted difference of logits, relative to the largest: the program has the model's own operations, but
# experts add up in another order. Measured on tiny models of every architecture: 0 without experts.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
_MARK = "lightlm_version"  # an extra file, which says that LightLM wrote the program


class TorchProgram(Format):
    """A file with the program of `model(tokens)`, which takes any batch size and length."""

    name = "pt2"
    makes = "a program of torch.export"
    suffix = ".pt2"
    folds = True

    def detect(self, path: Path) -> bool:
        return path.suffix.lower() == ".pt2" and path.is_file() and zipfile.is_zipfile(path)

    def is_own(self, path: Path) -> bool:
        return self.detect(path) and any(name.endswith(_MARK) for name in zipfile.ZipFile(path).namelist())

    def target(self, config: "ModelConfig") -> str:
        return "ExportedProgram"

    def write(self, loaded: "LoadedModel", out: Path, dtype: "torch.dtype", quantize: str = "") -> dict[str, Any]:
        import torch

        from lightlm import __version__, files

        model = copy.deepcopy(loaded.model).to(dtype)
        extra = {_MARK: __version__, "config.json": json.dumps(model.config.to_dict())}
        extra["tokenizer.json"] = json.dumps(loaded.tokenizer.content, ensure_ascii=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch's writer ends the process where a disk is full
        torch.export.save(exported(model), content, extra_files=extra)
        with files.new_file(out, exclusive=True) as temporary:
            temporary.write_bytes(content.getbuffer())
        return {
            "parameters": loaded.model.num_parameters()["total"],
            "python": f'import torch; model = torch.export.load("{out.as_posix()}").module()  # logits = model(tokens)',
        }

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        import torch

        tokens_BT = sample_tokens(loaded)
        with torch.no_grad():
            theirs_BTV = torch.export.load(path).module()(tokens_BT).float()
            ours_BTV = copy.deepcopy(loaded.model).to(dtype)(tokens_BT).float()
        difference_BT = (theirs_BTV - ours_BTV).abs().amax(-1)
        # Where two experts tie, either may be chosen.
        measured = difference_BT.median().item() if loaded.model.config.num_experts else difference_BT.max().item()
        limit = _TOLERANCE[str(dtype).removeprefix("torch.")] * max(ours_BTV.abs().max().item(), 1.0)
        if not measured <= limit:
            raise ConvertError(
                f"{path} does not compute what {loaded.path} does: logits differ by up to {measured:.2e}, more than "
                f"rounding ({limit:.0e}); do not use the conversion, and report this"
            )
        return difference_BT.max().item()


def exported(model: "Transformer") -> "torch.export.ExportedProgram":
    """Return the program of `model(tokens_BT)`, for every batch size and every length up to max_seq_len."""
    import torch

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.max_seq_len)}
    tokens_BT = torch.zeros(2, min(8, model.config.max_seq_len), dtype=torch.int64)
    with torch.no_grad():
        return torch.export.export(model.eval(), (tokens_BT,), dynamic_shapes=(sizes,))

"""Checkpoints of nanochat: named as such, and refused with what LightLM's model lacks. Imports nothing heavy.

Source: github.com/karpathy/nanochat, nanochat/gpt.py and checkpoint_manager.py, from October 2025 to July 2026.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightlm.convert.huggingface.config import read_json
from lightlm.convert.programs.contents import clean_tensors, read_torch_file
from lightlm.convert.protocol import Format
from lightlm.errors import ConvertError

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig

_FILE = re.compile(r"model_(\d+)\.pt")
_CAP = "a cap on the logits by tanh"  # in every version; the value is in its code, not in the file
# How the names of tensors begin -> what they are for. Versions add them, so not every checkpoint has each.
_PARTS = {
    "value_embeds.": "embeddings added to the values of attention (value_embeds)",
    "x0_lambdas": "the token embedding added again before each block (x0_lambdas)",
    "smear_gate.": "the previous token's embedding added to each token's (smear_gate)",
    "backout_lambda": "the output of the middle block subtracted at the end (backout_lambda)",
}


class NanochatCheckpoint(Format):
    """A file model_NNNNNN.pt beside meta_NNNNNN.json, or the folder that has them."""

    name = "nanochat"
    takes = "a checkpoint of nanochat, only to say what LightLM lacks for it"
    kinds = ("none yet: all cap their logits",)

    def detect(self, path: Path) -> bool:
        return _files(path) is not None

    def shape(self, path: Path) -> "ModelConfig":
        _refuse(path)

    def read(self, path: Path) -> "LoadedModel":
        _refuse(path)


def _files(path: Path) -> tuple[Path, Path] | None:
    """Return the weights and the description of the checkpoint that a path means; of a folder, the last one."""
    found = [path] if path.is_file() else path.glob("model_*.pt") if path.is_dir() else []
    steps = {int(match[1]): file for file in found if (match := _FILE.fullmatch(file.name))}
    for step in sorted(steps, reverse=True):
        file = steps[step]
        described = file.with_name(f"meta_{file.stem.removeprefix('model_')}.json")
        if described.is_file():
            return file, described
    return None


def _refuse(path: Path) -> NoReturn:
    """Raise ConvertError with everything that the checkpoint has and LightLM's model has not."""
    files = _files(path)
    assert files is not None, "the path was detected"
    weights, described = files
    tensors = clean_tensors(read_torch_file(weights), weights)
    lacking = [_CAP, *(what for name, what in _PARTS.items() if any(each.startswith(name) for each in tensors))]
    settings = read_json(described).get("model_config")
    pattern = settings.get("window_pattern", "L") if isinstance(settings, dict) else "L"
    if isinstance(pattern, str) and "S" in pattern.upper():
        lacking.append(f"windows in the pattern {pattern[:20]} (window_pattern)")
    raise ConvertError(
        f"{weights} is a checkpoint of nanochat, which LightLM's model cannot compute. LightLM lacks: "
        f"{'; '.join(lacking)}. To train on nanochat's data, run `lightlm prepare-data` on its Parquet files"
    )

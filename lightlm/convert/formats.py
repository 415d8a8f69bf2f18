"""The formats that models are converted from and to.

A new format is one class with the members of `Format`, in its own module, and one entry in `FORMATS`: the options of
`lightlm convert` and MODEL on the command line follow from it. Importing this module is cheap, because formats import
torch and their own libraries inside their methods.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightlm.convert.gguf.format import GGUFFile
from lightlm.convert.huggingface.format import HuggingFaceFolder
from lightlm.errors import ConvertError, UsageError
from lightlm.model.config import FOLDABLE_FIELDS

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig


class Format(Protocol):
    """A form in which a model is stored."""

    name: str  # what --from and --to take
    makes: str  # what a conversion writes, for people
    suffix: str  # how the name of the file that it writes ends, such as .gguf; empty for a folder
    reads: bool  # whether `read` is implemented
    writes: bool  # whether `write` is implemented
    quantizations: tuple[str, ...]  # what --quantize takes
    folds: bool  # whether learned scales are always folded; else `lightlm convert --fold` asks for it
    package: str  # what `read` and `write` need, installed by "lightlm[NAME]"; empty if LightLM has all it needs
    verifier: str  # the package that `verify` runs, likewise

    def detect(self, path: Path) -> bool:
        """Return whether a path holds a model in this format; at most one format may say so."""

    def is_own(self, path: Path) -> bool:
        """Return whether a path holds what `write` wrote and nobody changed, so that replacing it loses nothing."""

    def refusal(self, config: "ModelConfig") -> str:
        """Return why the format cannot hold a model of this shape, or an empty string."""

    def shape(self, path: Path) -> "ModelConfig":
        """Return the shape of a model, from its configuration alone; raise LightLMError if that is impossible."""

    def read(self, path: Path) -> "LoadedModel":
        """Load a model in float32 on the CPU, in evaluation mode; raise LightLMError if that is impossible."""

    def write(self, loaded: "LoadedModel", out: Path, dtype: "torch.dtype", quantize: str = "") -> dict[str, Any]:
        """Write a model whole or not at all, in place of what `out` is; `quantize` is one of `quantizations` or empty.

        Return what the command reports: `class` (the model's name there), `parameters` (the number written), `python`
        (code or a command that loads it), and `beside` (files written beside `out`), if there are any.
        """

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        """Return the largest difference of logits from those that the format's own software computes from `path`.

        Both have weights rounded to `dtype`. Raise ConvertError if they differ by more than rounding.
        """


class CheckpointFolder:
    """LightLM's own format, a checkpoint without training state; see `lightlm.checkpoint`."""

    name = "lightlm"
    makes = "a checkpoint folder: model.safetensors, config.json, tokenizer.json, complete.json"
    suffix = package = verifier = ""
    quantizations: tuple[str, ...] = ()
    reads = writes = True
    folds = False

    def detect(self, path: Path) -> bool:
        from lightlm.checkpoint import is_checkpoint

        if (path / "config.json").is_file():
            return is_checkpoint(path)
        return path.is_dir() and path.name.startswith("step_")  # an interrupted one: `read` says what is missing

    def is_own(self, path: Path) -> bool:
        return False

    def refusal(self, config: "ModelConfig") -> str:
        return ""

    def shape(self, path: Path) -> "ModelConfig":
        from lightlm.checkpoint import check, read_shape

        check(path, ["config.json"])
        return read_shape(path)

    def read(self, path: Path) -> "LoadedModel":
        from lightlm.checkpoint import load_model

        return load_model(path)

    def write(self, loaded: "LoadedModel", out: Path, dtype: "torch.dtype", quantize: str = "") -> dict[str, Any]:
        from lightlm.checkpoint import save_model

        save_model(out, copy.deepcopy(loaded.model).to(dtype), loaded.tokenizer, overwrite=True)
        return {
            "class": "LightLM checkpoint",
            "parameters": loaded.model.num_parameters()["total"],
            "python": f'from lightlm.convert.load import load_pretrained; model = load_pretrained("{out.as_posix()}")',
        }

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        import torch

        models = [copy.deepcopy(each.model).to(dtype).float() for each in (loaded, self.read(path))]
        tokens_BT = torch.arange(min(128, loaded.model.config.max_seq_len))[None] % loaded.tokenizer.vocab_size
        with torch.no_grad():
            ours_BTV, theirs_BTV = (model(tokens_BT) for model in models)
        if not torch.equal(ours_BTV, theirs_BTV):
            raise ConvertError(f"{path} does not hold the weights of {loaded.path}; do not use it, and report this")
        return 0.0


FORMATS: dict[str, Format] = {"hf": HuggingFaceFolder(), "gguf": GGUFFile(), "lightlm": CheckpointFolder()}


def format_of(path: Path) -> Format | None:
    """Return the format of the model at a path, or None if no format recognizes it."""
    return next((known for known in FORMATS.values() if known.detect(path)), None)


def reader_of(path: Path) -> Format:
    """Return the format that reads the model at a path; raise ConvertError if there is none."""
    found = format_of(path)
    if found is None or not found.reads:
        kind = f"a model in the format {found.name}, which LightLM only writes" if found else "not a model"
        readable = ", ".join(known.name for known in FORMATS.values() if known.reads)
        raise ConvertError(f"{path} is {kind}; formats that LightLM reads: {readable}")
    return found


def read_model(path: Path, weights: str | None = None) -> "LoadedModel":
    """Load the model at a path in float32 on the CPU.

    Args:
        weights: which of a checkpoint's two sets of weights; see `lightlm.checkpoint.load_model`.
    """
    reader = reader_of(path)
    _require(reader.package, f"reading {path} needs", reader)
    if weights is None:
        return reader.read(path)
    from lightlm.checkpoint import load_model

    require_average(path)
    return load_model(path, weights=weights)


def require_average(path: Path) -> None:
    """Raise CheckpointError unless a model has two sets of weights to choose from. Imports no torch."""
    from lightlm.checkpoint import has_average, no_average

    if reader_of(path).name != "lightlm" or not has_average(path):
        raise no_average(path)


def format_named(option: str, name: str) -> Format:
    """Return the format that --from (which reads) or --to (which writes) names; raise UsageError if there is none."""
    usable = [known for known in FORMATS.values() if (known.reads if option == "--from" else known.writes)]
    if found := next((known for known in usable if known.name == name), None):
        return found
    raise UsageError(
        f"{option} {name}: unknown format; this version converts {option[2:]} "
        f"{' and '.join(known.name for known in usable)} (see `lightlm convert --list`)"
    )


def convert_model(
    source: Path,
    reader: Format,
    out: Path,
    writer: Format,
    dtype: "torch.dtype",
    *,
    quantize: str = "",
    fold: bool = False,
    verify: bool = False,
    read: "Callable[[Path], LoadedModel] | None" = None,
) -> dict[str, Any]:
    """Convert a model, in place of what `out` is; return what `write` does, and with `verify` `max_logit_difference`.

    Args:
        quantize: one of the quantizations of `writer`, in place of `dtype`.
        fold: fold learned scales into plain weights also where the format written does not demand it.
        read: loads other weights from `source` than the reader does.

    Raises:
        ConvertError: the format written or the precision cannot hold this model, or `verify` found a difference.
        LightLMError: the model cannot be read.
    """
    for known in (reader, writer):
        _require(known.package, f"the format {known.name} needs", known)
        if verify:
            _require(known.verifier, "--verify compares with", known)
    loaded = (read or reader.read)(source)
    if fold and loaded.model.config.folded() == loaded.model.config:
        raise ConvertError(f"{source} has nothing to fold: it has none of model.{', model.'.join(FOLDABLE_FIELDS)}")
    if refusal := writer.refusal(loaded.model.config):
        raise ConvertError(f"{source} cannot be converted to {writer.name}: {refusal}")
    import torch

    from lightlm.convert.folding import as_plain

    plain = as_plain(loaded) if fold or writer.folds else loaded
    _check_range(plain, torch.float16 if quantize else dtype)  # the scales of quantized blocks are float16
    facts = writer.write(plain, out, dtype, quantize)
    if verify:
        differences = [writer.verify(plain, out, dtype), _check_fold(loaded, plain)]
        differences += [reader.verify(loaded, source, dtype)] if read is None else []
        facts["max_logit_difference"] = max(differences)
    return facts


def _require(package: str, need: str, known: Format) -> None:
    """Raise ConvertError unless a package that a format needs is installed."""
    if package and importlib.util.find_spec(package) is None:
        raise ConvertError(f'{need} {package}, which is not installed: pip install "lightlm[{known.name}]"')


def _check_range(loaded: "LoadedModel", dtype: "torch.dtype") -> None:
    """Raise ConvertError if a weight is too large for a precision, in which it would be infinite."""
    import torch

    largest = torch.finfo(dtype).max
    for name, tensor in loaded.model.state_dict().items():
        if (highest := tensor.abs().max().item()) > largest:  # false for NaN
            raise ConvertError(
                f"{loaded.path}: {name} has weights up to {highest:.3g}; {str(dtype).removeprefix('torch.')} holds at "
                f"most {largest:.3g}: use --dtype bfloat16 or float32"
            )


def _check_fold(loaded: "LoadedModel", plain: "LoadedModel") -> float:
    """Return the largest difference of logits that folding made; raise ConvertError if it is more than rounding."""
    if plain is loaded:
        return 0.0
    from lightlm.convert.folding import TOLERANCE, largest_difference

    difference, largest = largest_difference(loaded, plain)
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise ConvertError(
            f"{loaded.path}: folding its scales into its weights changes logits by up to {difference:.2e}, more than "
            "rounding; do not use the conversion, and report this"
        )
    return difference

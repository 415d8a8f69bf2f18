"""The formats that models are converted from and to.

A new format is one subclass of `lightlm.convert.protocol.Format`, in its own module, and one entry in `FORMATS`: the
options of `lightlm convert`, MODEL on the command line and the tables of docs/reference/formats.md follow from it.
Importing this module is cheap, because formats import torch and their own libraries inside their methods.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightlm import files
from lightlm.convert.gguf.format import GGUFFile
from lightlm.convert.huggingface.format import HuggingFaceFolder
from lightlm.convert.onnx.format import ONNXFolder
from lightlm.convert.programs.first import FirstLightLMCheckpoint
from lightlm.convert.programs.litgpt import LitGPTCheckpoint
from lightlm.convert.programs.llmc import LlmcCheckpoint
from lightlm.convert.programs.nanochat import NanochatCheckpoint
from lightlm.convert.programs.nanogpt import NanoGPTCheckpoint
from lightlm.convert.protocol import Format
from lightlm.convert.samples import sample_tokens
from lightlm.convert.torch_export import TorchProgram
from lightlm.errors import ConvertError, UsageError, how_to_install
from lightlm.model.config import FOLDABLE_FIELDS

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig


class CheckpointFolder(Format):
    """LightLM's own format, a checkpoint without training state; see `lightlm.checkpoint`."""

    name = "lightlm"
    takes = makes = "a checkpoint folder of LightLM"

    def detect(self, path: Path) -> bool:
        from lightlm.checkpoint import is_checkpoint

        if (path / "config.json").is_file():
            return is_checkpoint(path)
        return path.is_dir() and path.name.startswith("step_")  # an interrupted one: `read` says what is missing

    def is_own(self, path: Path) -> bool:
        from lightlm.checkpoint import is_untouched_model

        return is_untouched_model(path)

    def target(self, config: "ModelConfig") -> str:
        return "LightLM checkpoint"

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
            "parameters": loaded.model.num_parameters()["total"],
            "python": f'from lightlm.convert.load import load_pretrained; model = load_pretrained("{out.as_posix()}")',
        }

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float:
        import torch

        models = [copy.deepcopy(each.model).to(dtype).float() for each in (loaded, self.read(path))]
        with torch.no_grad():
            ours_BTV, theirs_BTV = (model(sample_tokens(loaded)) for model in models)
        if not torch.equal(ours_BTV, theirs_BTV):
            raise ConvertError(f"{path} does not hold the weights of {loaded.path}; do not use it, and report this")
        return 0.0


_PROGRAMS = (
    NanoGPTCheckpoint(),
    NanochatCheckpoint(),
    LlmcCheckpoint(),
    LitGPTCheckpoint(),
    FirstLightLMCheckpoint(),
)
_WRITTEN = (HuggingFaceFolder(), GGUFFile(), ONNXFolder(), TorchProgram(), CheckpointFolder())
FORMATS: dict[str, Format] = {known.name: known for known in (*_WRITTEN, *_PROGRAMS)}


_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".onnx", ".gguf")


def format_of(path: Path) -> Format | None:
    """Return the format of the model at a path, or None if no format recognizes it."""
    return next((known for known in FORMATS.values() if known.detect(path)), None)


def holds_weights(folder: Path) -> bool:
    """Return whether a folder holds files of weights in any format."""
    return any(path.suffix in _WEIGHTS for place in (folder, folder / "onnx") for path in place.glob("*"))


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
    """Convert a model, in place of what `out` is.

    Return what `write` does, `class` (the model's name there), and with `verify` `max_logit_difference`.

    Args:
        quantize: one of the quantizations of `writer`, in place of `dtype`.
        fold: fold learned scales into plain weights also where the format written does not demand it.
        read: loads other weights from `source` than the reader does.

    Raises:
        ConvertError: the format written or the precision cannot hold this model, another process is writing `out`, or
            `verify` found a difference; what `out` was before is then put back.
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
    if not verify:
        with _only_writer(out):
            return {"class": writer.target(plain.model.config)} | writer.write(plain, out, dtype, quantize)
    from lightlm.convert.gguf.modelfile import modelfile_path

    had_one = out.exists()
    # A conversion that is not right does not cost an earlier one.
    with _only_writer(out), _told_what_stays(out, had_one), files.put_back(out), files.put_back(modelfile_path(out)):
        facts = {"class": writer.target(plain.model.config)} | writer.write(plain, out, dtype, quantize)
        differences = [writer.verify(plain, out, dtype), _check_fold(loaded, plain)]
        differences += [reader.verify(loaded, source, dtype)] if read is None else []
        facts["max_logit_difference"] = max(filter(None, differences), default=0.0)
        return facts


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Context manager that keeps other conversions from writing `out`, by a lock beside it.

    A file system without locks is used without one.

    Raises:
        ConvertError: another conversion is writing it.
    """
    from filelock import FileLock, Timeout

    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path)
    try:
        files.acquire(lock, timeout=0)
    except Timeout:
        raise ConvertError(
            f"another `lightlm convert` is writing {out}; wait for it, or choose another path with --out"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file
            path.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _told_what_stays(out: Path, had_one: bool) -> Iterator[None]:
    """Add to an error that the earlier conversion is there again."""
    try:
        yield
    except ConvertError as error:
        raise ConvertError(f"{error}. {out} is again what it was before") if had_one else error from None


def _require(package: str, need: str, known: Format) -> None:
    """Raise ConvertError unless a package that a format needs is installed."""
    if package and importlib.util.find_spec(package) is None:
        raise ConvertError(f"{need} {package}, which is not installed; {how_to_install(known.name)}")


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

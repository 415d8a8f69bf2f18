"""What a format of models is; `lightlm.convert.formats` registers them. Imports nothing heavy."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.model.config import ModelConfig


class Format(ABC):
    """A form in which a model is stored.

    A format that is only read leaves `makes` empty, and `is_own`, `changed_beside`, `target`, `refusal` and `write` as
    they are here; one that is only written leaves `takes` empty, and `shape` and `read` as they are here. Methods
    import torch and libraries of the format inside, so that a format costs nothing until it is used.
    """

    name: ClassVar[str]  # what --from and --to take
    takes: ClassVar[str] = ""  # what `read` takes, for people; empty if the format is not read
    makes: ClassVar[str] = ""  # what `write` makes, for people; empty if the format is not written
    kinds: ClassVar[tuple[str, ...]] = ()  # the models that `read` takes, by their names there; empty means all of ours
    suffix: ClassVar[str] = ""  # how the name of the file that it writes ends, such as .gguf; empty for a folder
    quantizations: ClassVar[tuple[str, ...]] = ()  # what --quantize takes
    folds: ClassVar[bool] = False  # whether learned scales are always folded; else `lightlm convert --fold` asks for it
    package: ClassVar[str] = ""  # what `read` and `write` import beyond LightLM's own, installed by the extra [NAME]
    verifier: ClassVar[str] = ""  # the package that `verify` runs, likewise

    @property
    def reads(self) -> bool:
        """Whether `read` is implemented."""
        return bool(self.takes)

    @property
    def writes(self) -> bool:
        """Whether `write` is implemented."""
        return bool(self.makes)

    @abstractmethod
    def detect(self, path: Path) -> bool:
        """Return whether a path holds a model in this format; at most one format may say so."""

    def is_own(self, path: Path) -> bool:
        """Return whether a path holds what `write` wrote and nobody changed, so that replacing it loses nothing."""
        return False

    def changed_beside(self, path: Path) -> Path | None:
        """Return a file beside `path` that `write` would replace too, if it is not as `write` wrote it."""
        return None

    def target(self, config: "ModelConfig") -> str:
        """Return the name that a model of this shape has there, such as LlamaForCausalLM; empty if it has `refusal`."""
        return ""

    def refusal(self, config: "ModelConfig") -> str:
        """Return why the format cannot hold a model of this shape, or an empty string."""
        return ""

    def shape(self, path: Path) -> "ModelConfig":
        """Return the shape of a model, from only its configuration; raise LightLMError if that is impossible."""
        raise NotImplementedError

    def read(self, path: Path) -> "LoadedModel":
        """Load a model in float32 on the CPU, in evaluation mode; raise LightLMError if that is impossible."""
        raise NotImplementedError

    def write(self, loaded: "LoadedModel", out: Path, dtype: "torch.dtype", quantize: str = "") -> dict[str, Any]:
        """Write a model whole or not at all, in place of what `out` is; `quantize` is one of `quantizations` or empty.

        Return what the command reports: `parameters` (the number written), `python` (code or a command that loads the
        model), and `beside` (files written beside `out`), if there are any.
        """
        raise NotImplementedError

    def verify(self, loaded: "LoadedModel", path: Path, dtype: "torch.dtype") -> float | None:
        """Return the largest difference of logits from those that the format's own software computes from `path`.

        Both have weights rounded to `dtype`, and read `lightlm.convert.samples`. None means that the format has no
        software to run. Raise ConvertError if they differ by more than rounding.
        """
        return None

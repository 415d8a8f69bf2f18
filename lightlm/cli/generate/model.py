"""Which model decodes, where and how precisely: options that `generate` and `serve` share, their checks, and loading.

Imports no torch before `load`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel

MODEL_HELP = "Run, checkpoint, model in another format, or Hub id. [dim]Default: the newest run[/]"
WeightsOption = Annotated[
    str | None,
    typer.Option(
        metavar="ema|raw",
        help="Average or last weights of a run with train.ema. [dim]Default: ema[/]",
        show_default=False,
    ),
]
DtypeOption = Annotated[str, typer.Option(help="Precision: auto, float32, bfloat16 or float16.")]
QuantizeOption = Annotated[
    str | None,
    typer.Option(metavar="int8", help="Round weights to int8. [dim]Default: as they are[/]", show_default=False),
]
DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:N or mps.")]


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command line names, and how it decodes.

    Raises:
        UsageError: a device, a precision or the weights have a name that does not exist.
    """

    reference: str | None
    weights: str | None
    dtype: str
    quantize: str | None
    device: str

    def __post_init__(self) -> None:
        from lightlm import choices

        choices.check_device(self.device)
        choices.check_dtype(self.dtype)
        choices.check_quantize(self.quantize, self.dtype)
        choices.check_weights(self.weights)

    def check_files(self) -> None:
        """Raise an error if the model is not on this machine, unless it is on the Hub, or lacks the weights."""
        from lightlm.convert.formats import require_average
        from lightlm.convert.load import is_hub_id, locate

        if self.reference is None or not is_hub_id(self.reference):
            path = locate(self.reference)
            if self.weights is not None:
                require_average(path)

    def load(self, note: Callable[[str], None]) -> "LoadedModel":
        """Choose the device and the threads, and load the model. Imports torch, which takes a second or two.

        Args:
            note: receives what differs from what a user may expect.
        """
        from lightlm.cpu import FEW_SLICES, use_threads
        from lightlm.device import keep_freed_memory, pick_device

        if pick_device(self.device).type == "cpu":
            keep_freed_memory()
            use_threads("auto", note, slices=FEW_SLICES)
        return self.load_another(self.reference, self.weights)

    def load_another(self, reference: str | None, weights: str | None = None) -> "LoadedModel":
        """Load a model to decode in the same place as this one."""
        from lightlm.device import pick_device
        from lightlm.generate.load import load_for_decoding

        return load_for_decoding(reference, pick_device(self.device), self.dtype, weights, self.quantize)

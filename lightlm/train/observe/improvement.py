"""The best validation loss of a run, for `checkpoint.keep_best` and `train.patience`."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far; part of the training state."""

    val_loss: float | None = None  # None before the first finite one
    step: int = 0
    validations_since: int = 0  # without an improvement

    def after(self, step: int, val_loss: float | None) -> "Best":
        """Return the best after a validation; None is a loss that was NaN or infinite."""
        lowest = math.inf if self.val_loss is None else self.val_loss
        if val_loss is not None and val_loss < lowest:  # never for NaN
            return Best(val_loss, step)
        return replace(self, validations_since=self.validations_since + 1)

"""The section `checkpoint`: when to save, and what to keep."""

from pydantic import Field

from lightlm.quantities.types import Tokens
from lightlm.recipe.sections.section import Section


class CheckpointSection(Section):
    every: Tokens = 0
    """Training tokens between checkpoints, besides every_minutes, the end and interruptions. 0 adds none."""
    every_minutes: float = Field(default=15, ge=0)
    """Minutes between checkpoints, by the clock: a kill or a crash costs no more. 0 turns this off."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints to keep. With 1 there is no older one to fall back on if a disk damages it."""
    keep_every: Tokens = 0
    """Training tokens between checkpoints that are never deleted. 0 keeps none for good."""
    keep_best: bool = False
    """Also save the step of each new lowest validation loss, and keep the newest of these as checkpoints/best."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues, from a copy in memory: 12 bytes per parameter with
    AdamW, 8 with Muon, and 4 more with train.ema."""

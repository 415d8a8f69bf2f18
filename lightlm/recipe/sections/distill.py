"""The section `train.distill`: learning from the distributions of a larger model."""

from typing import Annotated, Literal

from pydantic import Field

from lightlm.recipe.sections.section import Section

STORED = "stored"


class DistillSection(Section):
    teacher: Annotated[str, Field(min_length=1)]
    """Model to learn from, with the tokenizer of the data: a run, a checkpoint, a Hugging Face folder or a Hub id. It
    sees the same sequences as the trained model. `stored` takes the probabilities that `prepare-data --teacher` has
    stored beside the data."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Weight of the divergence from the teacher; the loss on tokens has the rest (arXiv 1503.02531). 1 learns
    only from the teacher."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Divides the logits of both models in the divergence. Above 1, unlikely tokens count more."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the teacher's matrix products. `auto` takes bfloat16 where the device is fast at it, else float32;
    on a CPU, a new run measures. The run's recipe.yaml keeps the answer."""

    def idle(self) -> dict[str, str]:
        return {"dtype": "without a teacher that computes"} if self.teacher == STORED else {}

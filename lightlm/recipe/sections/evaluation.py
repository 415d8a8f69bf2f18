"""The section `eval`: validation, samples and tasks during training."""

from typing import Annotated

from pydantic import Field

from lightlm.quantities.types import Tokens
from lightlm.recipe.sections.section import Section


class EvalSection(Section):
    every: Tokens = 0
    """Training tokens between validations. 0 validates only at the end of the run."""
    tokens: Annotated[Tokens, Field(ge=1)] = 256_000
    """Tokens of the validation split that a validation reads, from its start."""
    prompts: list[str] = Field(default=["Hello, I am a language model,"])
    """Texts that the model continues at each validation."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Tokens to generate for each prompt."""
    tasks: list[str] = Field(default=[])
    """Tasks of lm-evaluation-harness to score during training."""
    tasks_every: Tokens = 0
    """Training tokens between scorings of eval.tasks. 0 scores only at the end."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Documents per task during training. null scores all of them."""
    data_dir: Annotated[str, Field(min_length=1)] | None = None
    """Folder with the tasks' data sets, laid out like the Hub. null takes $LIGHTLM_EVAL_DATA, or the Hub and its cache.
    """

    def idle(self) -> dict[str, str]:
        keys = () if self.tasks else ("tasks_every", "limit", "data_dir")
        idle = dict.fromkeys(keys, "without eval.tasks")
        return idle if self.prompts else idle | {"max_new_tokens": "without eval.prompts"}

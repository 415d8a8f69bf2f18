"""The Python API: what `import lightlm` offers. Each function does what the command of its name does.

import lightlm

lightlm.prepare("pydocs")
result = lightlm.train("demo")
model = lightlm.load(result.run)
print(model.generate("Return a new"))
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightlm.checkpoint import LoadedModel
from lightlm.convert.load import load_pretrained
from lightlm.data.folder import DataFolder
from lightlm.data.tokenizer import Tokenizer
from lightlm.device import pick_device, pick_dtype
from lightlm.errors import UsageError
from lightlm.evaluate.scoring.batches import BatchSize
from lightlm.evaluate.scoring.score import score
from lightlm.generate.engine import generate_samples
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer

__all__ = ["Model", "TextScore", "evaluate", "load", "prepare", "train"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts one text."""

    log_likelihood: float  # nats, of all tokens
    tokens: int
    text_bytes: int  # UTF-8

    @property
    def nats_per_token(self) -> float:
        """The mean loss; NaN for an empty text."""
        return -self.log_likelihood / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """The loss per byte of text, comparable between tokenizers; NaN for an empty text."""
        return -self.log_likelihood / math.log(2) / self.text_bytes if self.text_bytes else math.nan


class Model:
    """A model with its tokenizer, ready to generate and to score.

    Attributes:
        transformer: the PyTorch module, in evaluation mode.
        tokenizer: turns text into token ids and back.
        path: the checkpoint or Hugging Face folder that it was loaded from, or its Hub id.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.transformer: Transformer = loaded.model
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.path: Path = loaded.path
        self._loaded = loaded

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, {self.num_parameters:,} parameters)"

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.transformer.config

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied output head counts once."""
        return self.transformer.num_parameters()["total"]

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        temperature: float = DEFAULT.temperature,
        top_k: int | None = None,
        top_p: float = DEFAULT.top_p,
        seed: int = 1337,
    ) -> str:
        """Return the prompt's continuation, without the prompt.

        Args:
            prompt: the text to continue; an empty one starts from end-of-text.
            max_new_tokens: tokens per continuation; end-of-text ends one earlier.
            temperature: 0 takes the most likely token.
            top_k: draw among the k most likely tokens; None is all.
            top_p: draw among the fewest tokens of this total probability.
            seed: the same seed gives the same text.

        Raises:
            UsageError: a setting is out of its range.
            LightLMError: the prompt is longer than the model's context.
        """
        return self.samples(prompt, 1, max_new_tokens, Sampling(temperature, top_k, top_p), seed)[0]

    def samples(
        self, prompt: str, count: int, max_new_tokens: int = 200, sampling: Sampling = DEFAULT, seed: int = 1337
    ) -> list[str]:
        """Return `count` different continuations of one prompt, which is read once. See `generate`."""
        if count < 1:
            raise UsageError(f"count must be at least 1, is {count}")
        end = self.tokenizer.end_of_text_id
        ids = self.tokenizer.encode(prompt) or [end]
        completions = generate_samples(self.transformer, ids, count, max_new_tokens, sampling, seed, {end})
        return [self.tokenizer.decode(completion.ids) for completion in completions]

    @torch.no_grad()
    def logits(self, text: str | Sequence[int]) -> Tensor:
        """Return the float32 logits of shape (T, V): row t predicts the token after token t.

        Args:
            text: a text, or T token ids (at least one, at most `config.max_seq_len`).

        Raises:
            UsageError: there are no tokens, or more than the model's context holds.
        """
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if not 1 <= len(ids) <= self.config.max_seq_len:
            raise UsageError(f"logits needs 1 to {self.config.max_seq_len:,} tokens, got {len(ids):,}")
        logits_BTV: Tensor = self.transformer(torch.tensor([ids], device=self.transformer.device))
        return logits_BTV[0].float()

    def score(self, texts: Sequence[str], batch_size: int | str = "auto") -> list[TextScore]:
        """Return how well the model predicts each text, as `lightlm eval --tasks heldout` scores documents.

        The first token follows end-of-text (an imported model: its beginning-of-text token). A text longer than the
        context is scored in consecutive windows; the last one sees as many tokens before it as the context holds.
        """
        if isinstance(texts, str):
            raise UsageError("score takes a list of texts; for one text write score([text])")
        start = self.tokenizer.end_of_text_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        before = self.tokenizer.prefix_ids if self.tokenizer.adds_bos else []
        length = self.config.max_seq_len
        windows, owners, counts = [], [], []
        for owner, text in enumerate(texts):
            ids = [start, *before, *self.tokenizer.encode(text)]
            counts.append(len(ids) - 1)
            for first in range(1, len(ids), length):
                end = min(first + length, len(ids))
                windows.append((ids[max(end - 1 - length, 0) : first], ids[first:end]))
                owners.append(owner)
        limits = BatchSize.of(batch_size, self.transformer.device, self.config)
        totals = [0.0] * len(texts)
        for owner, result in zip(owners, score(self.transformer, windows, limits, lambda _: None), strict=True):
            totals[owner] += result.log_likelihood
        sizes = [len(text.encode()) for text in texts]
        return [TextScore(*values) for values in zip(totals, counts, sizes, strict=True)]


def load(model: PathLike | None = None, *, device: str = "auto", dtype: str = "float32") -> Model:
    """Load a model.

    Args:
        model: a run folder or a run's name, a checkpoint folder, a Hugging Face folder, or a Hub id; None is the
            newest run's newest checkpoint.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (bfloat16 where it is fast).

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        ConvertError: a Hugging Face model that LightLM cannot represent.
    """
    target = pick_device(device)
    return Model(load_pretrained(None if model is None else str(model), target, pick_dtype(dtype, target)))


def prepare(source: PathLike, **settings: Any) -> DataFolder:
    raise NotImplementedError


def train(recipe: PathLike, *overrides: str, **settings: Any) -> Any:
    raise NotImplementedError


def evaluate(model: Any, tasks: str = "heldout", **settings: Any) -> dict[str, Any]:
    raise NotImplementedError

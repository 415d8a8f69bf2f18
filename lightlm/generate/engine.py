"""Text from a model: prefill the prompts once, then decode one token per row and step with the key/value cache.

Shapes: B rows, T prompt positions, V vocabulary.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.generate.sampling.draw import Row, sample
from lightlm.model.decoding.cache import KVCache
from lightlm.model.transformer import Transformer


@dataclass
class Completion:
    """The new tokens of one row, without the stop token, and why it ended."""

    ids: list[int] = field(default_factory=list)
    # A stop token or `on_token` ended it, it has max_new_tokens, or the model's context is full.
    finish_reason: Literal["stop", "length", "context"] = "length"


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 1337,
    stop_ids: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
    num_samples: int = 1,
    vocab_size: int | None = None,
) -> list[Completion]:
    """Continue every prompt; the prompts may differ in length.

    Args:
        prompts: token ids, at least one per prompt.
        seed: row b draws from its own generator, seeded with (seed, b); more samples of one prompt keep the first ones.
        stop_ids: tokens that end a row, usually end-of-text.
        on_token: called as on_token(row, token) for each new token; a true answer ends the row.
        num_samples: continuations of each prompt, which is read once.
        vocab_size: the tokenizer's; ids at or above it are never drawn. None allows all ids of the model.

    Returns:
        One completion per row: all samples of the first prompt, then those of the next.

    Raises:
        LightLMError: a prompt is empty or longer than the model's context.
        UsageError: max_new_tokens is below 1, or `sampling` names an id that does not exist.
    """
    check(prompts, max_new_tokens, model.config.max_seq_len)
    sampling.check_ids(vocab_size or model.config.vocab_size)
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    logits_BV = prefill(model, prompts, cache)
    if num_samples > 1:
        cache.select([row for row in range(len(prompts)) for _ in range(num_samples)])
        logits_BV = logits_BV.repeat_interleave(num_samples, dim=0)
    completions = [Completion() for _ in range(len(prompts) * num_samples)]
    rows = [
        Row(sampling, row_generator(seed, row), prompts[row // num_samples], completion.ids, stop_ids)
        for row, completion in enumerate(completions)
    ]
    active = list(range(len(completions)))  # the row of each line of the cache
    while True:
        tokens = sample(logits_BV, [rows[row] for row in active], vocab_size)
        remaining = []
        for line, (row, token) in enumerate(zip(active, tokens, strict=True)):
            completion = completions[row]
            if token in stop_ids:
                completion.finish_reason = "stop"
                continue
            completion.ids.append(token)
            if on_token is not None and on_token(row, token):
                completion.finish_reason = "stop"
            elif len(completion.ids) == max_new_tokens:
                continue
            elif cache.lengths[line] == model.config.max_seq_len:
                completion.finish_reason = "context"
            else:
                remaining.append(line)
        if not remaining:
            return completions
        if len(remaining) < len(active):
            cache.select(remaining)
            active = [active[line] for line in remaining]
        tokens_B1 = torch.tensor([[tokens[line]] for line in remaining], device=model.device)
        logits_BV = model(tokens_B1, cache)[:, -1]


def sample_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int, sampling: Sampling = DEFAULT
) -> str:
    """Return the prompt's continuation as text, to look at a model in training.

    An empty prompt starts from end-of-text. Torch's global generators stay untouched, and the model returns to the mode
    (training or evaluation) it was in. Errors are those of `generate`.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text_id]
    was_training = model.training
    model.eval()
    try:
        end = {tokenizer.end_of_text_id}
        [completion] = generate(model, [ids], max_new_tokens, sampling, seed, end, vocab_size=tokenizer.vocab_size)
    finally:
        model.train(was_training)
    return tokenizer.decode(completion.ids)


def check(prompts: list[list[int]], max_new_tokens: int, max_seq_len: int) -> None:
    """Raise what `generate` raises for such a request, before any work."""
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens must be at least 1, is {max_new_tokens}")
    if not prompts or not all(prompts):
        raise LightLMError("a prompt has no tokens; start from the end-of-text token instead")
    longest = max(map(len, prompts))
    if longest > max_seq_len:
        raise LightLMError(
            f"the prompt has {longest:,} tokens, the model's context holds {max_seq_len:,}; shorten the prompt"
        )


def prefill(model: Transformer, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Read the prompts into the cache and return the logits (B, V) of each one's next token."""
    counts = [len(prompt) for prompt in prompts]
    tokens_BT = torch.zeros(len(prompts), max(counts), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    x_BTD = model.hidden_states(tokens_BT.to(model.device), cache, counts)
    last_B = torch.tensor(counts, device=x_BTD.device) - 1
    return model.head(x_BTD[torch.arange(len(prompts), device=x_BTD.device), last_B])


def row_generator(seed: int, row: int) -> torch.Generator:
    """Return a row's own generator. Unlike with seed + row, (seed, row) and (seed + 1, row - 1) differ."""
    mixed = np.random.SeedSequence([seed % 2**64, row]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)  # torch takes seeds below 2**63


class TextStream:
    """Turn tokens into text as they come, without splitting characters.

    One character may take several tokens. Tokens that end inside a character (they decode to a trailing U+FFFD) wait
    for the rest of it or for `flush`. All pieces joined equal `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoded before the new tokens, because a sentencepiece vocabulary drops the space at the start of a text.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that this token completes; it may be empty."""
        self._pending.append(token)
        return self._take(whole=True)

    def flush(self) -> str:
        """Return the text still waiting, after the last token."""
        return self._take(whole=False)

    def _take(self, *, whole: bool) -> str:
        known = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)[len(known) :]
        if not text or (whole and text.endswith("\ufffd")):
            return ""
        self._context, self._pending = self._pending, []
        return text

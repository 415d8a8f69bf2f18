"""From a text or a conversation to the token ids that a model continues."""

import re
from collections.abc import Sequence
from typing import Any

from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import LightLMError
from lightlm.generate.chat import MARKED, ChatTemplate, without_marks


def encode_prompt(tokenizer: Tokenizer, text: str, *, parse_special: bool = False) -> list[int]:
    """Return the token ids of a text to continue, after what the model's tokenizer puts before each text.

    There is at least one: without any, the model's beginning-of-text token, or end-of-text.

    Args:
        parse_special: the characters of a special token mean that token. Where the text begins with what the tokenizer
            would put before it, nothing is added.
    """
    before = tokenizer.context_ids
    ids = tokenizer.encode_special(text) if parse_special else tokenizer.encode(text)
    if parse_special and ids[: len(before)] == before:
        before = []
    return [*before, *ids] or [tokenizer.start_id]


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], *, parse_special: bool = False
) -> tuple[str, list[int]]:
    """Return a conversation as the model's chat template writes it, and its token ids.

    It ends where the model's answer begins. The template's special tokens are tokens; those that a message spells are
    plain text, so that a message cannot end its turn, unless `parse_special` is set.

    Raises:
        UsageError: the model has no chat template, or a message is malformed (see `lightlm.generate.chat`).
        LightLMError: the template is faulty, or refuses the messages.
    """
    marked = () if parse_special else tokenizer.special_tokens.values()
    rendered = ChatTemplate.of(tokenizer).render(messages, plain=marked)
    # Of the parts, every second one was marked: special tokens in it are plain text.
    parts = re.split(MARKED, rendered, flags=re.DOTALL)
    encoders = (tokenizer.encode_special, tokenizer.encode)
    ids = [token for number, part in enumerate(parts) if part for token in encoders[number % 2](part)]
    return without_marks(rendered), ids or [tokenizer.start_id]


def spelled_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the special tokens whose characters occur in a text, for a note on how they are read."""
    return [token for token in tokenizer.special_tokens.values() if token in text]


def fit_prompt(
    tokenizer: Tokenizer, ids: list[int], max_seq_len: int, max_new_tokens: int, *, truncate: bool = False
) -> list[int]:
    """Return a prompt that the context of `max_seq_len` tokens holds.

    With `truncate`, a longer one loses its beginning: its last tokens stay, so many that the answer's `max_new_tokens`
    fit too, but at least half of the context. What the tokenizer puts before each text stays before them.

    Raises:
        LightLMError: it is too long, and `truncate` is not set.
    """
    if len(ids) <= max_seq_len:
        return ids
    if not truncate:
        raise LightLMError(
            f"the prompt has {len(ids):,} tokens, the model's context holds {max_seq_len:,}; shorten the prompt, or "
            "drop its beginning with --truncate left"
        )
    return newest(tokenizer, ids, max(max_seq_len - max_new_tokens, max_seq_len // 2, 1))


def newest(tokenizer: Tokenizer, ids: list[int], count: int) -> list[int]:
    """Return the last tokens of a text after what the tokenizer puts before each text, `count` in all."""
    before = tokenizer.context_ids if len(tokenizer.context_ids) < count else []
    return [*before, *ids[len(ids) - (count - len(before)) :]]

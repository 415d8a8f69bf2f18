"""Which of a tokenizer's entries separates documents."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightlm.errors import DataError

END_OF_TEXT_NAMES = (
    "<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]"
)  # fmt: skip
_SHOWN_NAMES = 20  # special tokens that a message lists


def known_end_of_text(added: Mapping[int, Any]) -> int | None:
    """Return the id of the first of `END_OF_TEXT_NAMES` among the added tokens, or None."""
    ids = {token.content: index for index, token in added.items()}
    return next((ids[name] for name in END_OF_TEXT_NAMES if name in ids), None)


def find_end_of_text(tokenizer: Any, origin: str, named: str | None, declared: Sequence[int | str]) -> int:
    """Return the id of the end-of-text token: `named`, else the first of `declared` that exists, else a known name.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        origin: what messages call it.
        named: the characters of the token that the user chose.
        declared: ids and characters that files name, in order.

    Raises:
        DataError: the tokenizer has no token `named`, or none of the others.
    """
    added = tokenizer.get_added_tokens_decoder()
    if named is not None:
        index = tokenizer.token_to_id(named)
        if index is None:
            raise DataError(f"{origin} has no token {named!r} to separate documents. {_special_tokens(added)}")
        return int(index)
    ids = (tokenizer.token_to_id(token) if isinstance(token, str) else token for token in declared)
    there = {*added, *tokenizer.get_vocab().values()}
    found = [index for index in ids if index in there]
    # A token of the definition's special ones first: config.json may hold the default id of its class.
    found = [index for index in found if index in added] or found
    if found:
        return int(found[0])
    if (known := known_end_of_text(added)) is not None:
        return known
    raise DataError(
        f"{origin}: no end-of-text token to separate documents. No file beside it names one, and it has none of "
        f"{', '.join(END_OF_TEXT_NAMES)}. {_special_tokens(added)}"
    )


def _special_tokens(added: Mapping[int, Any]) -> str:
    names = [token.content for _, token in sorted(added.items()) if token.special]
    if not names:
        return "It has no special tokens. Use a tokenizer made for text generation, or --tokenizer train:8192."
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"Name one of its special tokens with --eot: {', '.join(names[:_SHOWN_NAMES])}{more}."

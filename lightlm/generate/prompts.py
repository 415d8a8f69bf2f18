"""Turn a text or a conversation into the token ids that a model continues."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightlm.data.chat.template import ChatTemplate, checked_messages, parts_of, without_marks
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import LightLMError


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
        UsageError: the model has no chat template, or a message is malformed (see `lightlm.data.chat.template`).
        LightLMError: the template is faulty, or refuses the messages.
    """
    plain = None if parse_special else tokenizer.special_pattern
    rendered = ChatTemplate.of(tokenizer).render(messages, plain=plain)
    encoders = (tokenizer.encode_special, tokenizer.encode)
    ids = [token for _, part, is_plain in parts_of(rendered) for token in encoders[is_plain](part)]
    return without_marks(rendered), ids or [tokenizer.start_id]


@dataclass(frozen=True)
class PromptReader:
    """Read prompts for one model: ids that its context holds.

    Args:
        max_seq_len: the model's context.
        parse_special: the characters of a special token mean that token.
        truncate: a prompt past the context loses its beginning, a conversation its oldest turns; else it is an error.
        note: receives a line for each prompt that is read otherwise than it may seem.
    """

    tokenizer: Tokenizer
    max_seq_len: int
    parse_special: bool = False
    truncate: bool = False
    note: Callable[[str], None] = lambda line: None

    def read(self, text: str, max_new_tokens: int) -> list[int]:
        """Return the ids of a text to continue. See `encode_prompt` and `fit_prompt` for the rules and errors."""
        self._note_special("the prompt", text)
        ids = encode_prompt(self.tokenizer, text, parse_special=self.parse_special)
        fitting = fit_prompt(self.tokenizer, ids, self.max_seq_len, max_new_tokens, truncate=self.truncate)
        if len(fitting) < len(ids):
            self.note(f"the first {len(ids) - len(fitting):,} of the prompt's {len(ids):,} tokens are left out")
        return fitting

    def read_chat(self, messages: Sequence[dict[str, Any]], max_new_tokens: int) -> list[int]:
        """Return the ids of a conversation to answer. See `encode_chat` for the rules and errors.

        Of one past the context, the oldest turns after the system's message are left out until there is room for it
        and its answer, as `fit_prompt` says.

        Raises:
            LightLMError: it is too long and `truncate` is not set, or its last turn is.
        """
        messages = checked_messages(messages)
        for message in messages:
            self._note_special(f"a message of role {message['role']}", message["content"])
        kept = list(messages)
        ids = encode_chat(self.tokenizer, kept, parse_special=self.parse_special)[1]
        room = self.max_seq_len
        if len(ids) > room and self.truncate:
            room = answer_room(self.max_seq_len, max_new_tokens)
            while len(ids) > room and (shorter := _without_oldest_turn(kept)) is not None:
                kept = shorter
                ids = encode_chat(self.tokenizer, kept, parse_special=self.parse_special)[1]
            if len(kept) < len(messages):
                self.note(f"the oldest {len(messages) - len(kept)} of {len(messages)} messages are left out")
        if len(ids) > self.max_seq_len:
            what = "the last turn" if len(kept) < len(messages) else "the conversation"
            advice = "" if self.truncate else ", or drop the oldest turns with --truncate left"
            raise LightLMError(
                f"{what} has {len(ids):,} tokens, the model's context holds {self.max_seq_len:,}; shorten it{advice}"
            )
        return ids

    def _note_special(self, what: str, text: str) -> None:
        if not self.parse_special and (found := spelled_tokens(self.tokenizer, text)):
            self.note(f"{what} spells {', '.join(found)}, read as plain text; --parse-special reads special tokens")


def _without_oldest_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return a conversation without its first messages up to the second one of a user; None if there is no second."""
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    return [message for message in messages[: users[0]] if message["role"] == "system"] + messages[users[1] :]


def spelled_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the special tokens whose characters occur in a text, for a note on how they are read."""
    return list(dict.fromkeys(tokenizer.special_pattern.findall(text)))


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
    return newest(tokenizer, ids, answer_room(max_seq_len, max_new_tokens))


def answer_room(max_seq_len: int, max_new_tokens: int) -> int:
    """Return how many tokens stay of a prompt that must be shortened, so that its answer fits into the context."""
    return max(max_seq_len - max_new_tokens, max_seq_len // 2, 1)


def newest(tokenizer: Tokenizer, ids: list[int], count: int) -> list[int]:
    """Return the last tokens of a text after what the tokenizer puts before each text, `count` in all."""
    before = tokenizer.context_ids if len(tokenizer.context_ids) < count else []
    return [*before, *ids[len(ids) - (count - len(before)) :]]

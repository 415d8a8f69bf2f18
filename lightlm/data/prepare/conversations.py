"""The chat template of a preparation of conversations, and the encoder that its workers use."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightlm.data.chat.answers import ConversationEncoder
from lightlm.data.chat.template import CHATML, CHATML_TOKENS
from lightlm.data.shards import TrainOn
from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.folder import SETTINGS, read_settings
from lightlm.errors import DataError
from lightlm.files import write_text

_PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with a chat template.

    Attributes:
        origin: where the template comes from: `tokenizer`, `chatml` or `file`.
        added: the special tokens that the tokenizer lacked for it.
    """

    tokenizer: Tokenizer
    origin: str
    added: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, settings: dict[str, Any], template: str | None) -> "ChatTokenizer":
        """Take the template of a file, else the tokenizer's own in `settings`, else ChatML with its special tokens.

        The token that ends an answer becomes the tokenizer's `eos_token`. Raises DataError for a template that is not
        valid.
        """
        given = template or settings.get("chat_template")
        if given is not None:
            made = cls(
                tokenizer.used_as(None, False, settings | {"chat_template": given}, {}),
                "file" if template else "tokenizer",
            )
        else:
            extended = tokenizer.with_special_tokens(CHATML_TOKENS)
            added = tuple(name for name in CHATML_TOKENS if tokenizer.id_of(name) is None)
            made = cls(extended.used_as(None, False, settings | {"chat_template": CHATML}, {}), "chatml", added)
        end = made._end_of_answers()
        if end is None:
            return made
        said = dict(made.tokenizer.settings) | {"eos_token": end}
        return cls(made.tokenizer.used_as(None, False, said, {}), made.origin, made.added)

    def _end_of_answers(self) -> str | None:
        """Return the special token that ends an answer; None where there is none, or the template wants other turns."""
        encoder = ConversationEncoder(self.tokenizer, "last")
        try:
            encoded = encoder.encode(_PROBE)
        except DataError:
            return None
        return self.tokenizer.special_tokens.get(int(encoded.ids[encoded.masks > 0][-1]))

    def save(self, folder: Path) -> None:
        """Write tokenizer_config.json, as transformers reads it."""
        write_text(folder / SETTINGS, json.dumps(dict(self.tokenizer.settings), indent=2, ensure_ascii=False) + "\n")


def conversation_encoder(tokenizer: Tokenizer, folder: Path, train_on: TrainOn) -> ConversationEncoder:
    """Return the encoder for a tokenizer and the template in a folder; each process makes it once."""
    return _made(tokenizer, json.dumps(read_settings(folder)), train_on)


@functools.lru_cache(maxsize=2)
def _made(tokenizer: Tokenizer, settings: str, train_on: TrainOn) -> ConversationEncoder:
    return ConversationEncoder(tokenizer.used_as(None, False, json.loads(settings), {}), train_on)

"""A wrapper over `tokenizers` that reads special tokens in a text only on request."""

import copy
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightlm.data.tokenizer.definition import border_pattern, bytes_reader, is_byte_level, merges_of, unknown_token
from lightlm.data.tokenizer.end_of_text import find_end_of_text, known_end_of_text
from lightlm.data.tokenizer.folder import declared_end_of_text, read_definition
from lightlm.errors import DataError
from lightlm.files import write_bytes

# What two tokenizers of one model encode equally: spaces, cases, digits, scripts, accents in both normal forms.
PROBE = "Don't  stop.\tThe\n\n\nEND of 3.14159, 2026: na\u00efve cafe\u0301 \u4f60\u597d \U0001f600 _x_==[1](2){}\r\n "

PART_CHARACTERS = 200_000
GROUP_CHARACTERS = 1_000_000  # encoded together: 150 MB of memory


class Tokenizer:
    """Text to token ids and back.

    Adds no special tokens. One spelled out inside a text (a web page about GPT-2 that contains `<|endoftext|>`) is
    ordinary characters unless the caller asks: the end-of-text id appears only where a document ends.
    """

    # The token that an imported model expects before a text. Our own models are trained with end-of-text there.
    bos_id: int | None = None  # the context of a text without one; None: end-of-text
    adds_bos: bool = False  # whether it comes before every other context too

    def __init__(
        self,
        definition: bytes,
        *,
        origin: str,
        end_of_text_id: int | None = None,
        end_of_text: str | None = None,
        declared: Sequence[int | str] = (),
    ) -> None:
        """Read the bytes of a tokenizer.json; `origin` names them in messages.

        The end-of-text token is `end_of_text_id`, or the one of the characters `end_of_text`, else the first of
        `declared` that the definition has, else a known one (see `end_of_text`). Raises DataError where the bytes are
        not a tokenizer.json, or have no such token.
        """
        import tokenizers

        try:
            self.content: dict[str, Any] = json.loads(definition)
            self._tokenizer = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
        except Exception as error:  # `tokenizers` raises bare Exception for every malformed definition
            raise DataError(f"{origin} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self.definition = definition
        # What an imported model's files say about prompts and answers; empty for our own models.
        self.settings: Mapping[str, Any] = {}  # see `folder.read_settings`
        self.generation_config: Mapping[str, Any] = {}  # transformers' generation_config.json
        self._tokenizer.encode_special_tokens = True
        # Definitions for BERT-like models cut every text at 512 tokens; a corpus must not be cut.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.sha256: str = hashlib.sha256(definition).hexdigest()
        self.vocab_size: int = 1 + max((*self._tokenizer.get_vocab(with_added_tokens=True).values(), *self._added))
        if end_of_text_id is None:
            end_of_text_id = find_end_of_text(self._tokenizer, origin, end_of_text, declared)
        self.end_of_text_id: int = end_of_text_id
        if not 0 <= self.end_of_text_id < self.vocab_size:
            raise DataError(f"{origin}: end-of-text id {end_of_text_id} is outside its {self.vocab_size} entries")
        marker = self._added.get(self.end_of_text_id)
        if marker is not None and not marker.special:  # else `tokenizers` would find it inside texts
            self._tokenizer.add_special_tokens([tokenizers.AddedToken(marker.content, normalized=False, special=True)])
            self._added = self._tokenizer.get_added_tokens_decoder()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], end_of_text_id: int | None = None) -> "Tokenizer":
        """Load a tokenizer.json. Raises DataError where it cannot be read."""
        try:
            definition = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"The tokenizer {path} cannot be read: {error.strerror}") from error
        return cls(definition, origin=str(path), end_of_text_id=end_of_text_id)

    @classmethod
    def read(cls, path: Path, *, origin: str | None = None, end_of_text: str | None = None) -> "Tokenizer":
        """Load the tokenizer at a path: a tokenizer.json, or a folder with one, or with vocab.json and merges.txt.

        The end-of-text token is `end_of_text`, else what the files beside it name (see `folder`), else a
        known name. Raises DataError.
        """
        return cls(
            read_definition(path),
            origin=origin or str(path),
            end_of_text=end_of_text,
            declared=declared_end_of_text(path),
        )

    def used_as(
        self,
        bos_id: int | None,
        adds_bos: bool,
        settings: Mapping[str, Any],
        generation_config: Mapping[str, Any],
    ) -> "Tokenizer":
        """Return this tokenizer with what an imported model's files say about its use. See the attributes."""
        tokenizer = copy.copy(self)
        tokenizer.bos_id, tokenizer.adds_bos = bos_id, adds_bos
        tokenizer.settings, tokenizer.generation_config = settings, generation_config
        return tokenizer

    def used_like(self, other: "Tokenizer") -> "Tokenizer":
        """Return this tokenizer with what `other` knows of its model: beginnings and ends of texts, chat template."""
        return self.used_as(other.bos_id, other.adds_bos, other.settings, other.generation_config)

    def chatting_like(self, other: "Tokenizer") -> "Tokenizer":
        """Return this tokenizer with the chat template of `other`, whose end of an answer also ends one here."""
        ends = self.generation_config.get("eos_token_id")
        known = [*(ends if isinstance(ends, list) else [ends]), self.id_of(other.settings.get("eos_token"))]
        ids = list(dict.fromkeys(end for end in reversed(known) if isinstance(end, int)))
        generation = dict(self.generation_config) | ({"eos_token_id": ids} if ids else {})
        return self.used_as(self.bos_id, self.adds_bos, dict(self.settings) | dict(other.settings), generation)

    @property
    def start_id(self) -> int:
        """The context of a text without one: an imported model's beginning-of-text token, else end-of-text.

        In LightLM's training data each document follows end-of-text.
        """
        return self.end_of_text_id if self.bos_id is None else self.bos_id

    @property
    def context_ids(self) -> list[int]:
        """The tokens before every context, as an imported model's tokenizer adds them; none for our own models."""
        return self.prefix_ids if self.adds_bos else []

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: end-of-text, and those that an imported model's files name."""
        named = self.generation_config.get("eos_token_id")
        ends = [*(named if isinstance(named, list) else [named]), self.id_of(self.settings.get("eos_token"))]
        known = (end for end in ends if isinstance(end, int) and not isinstance(end, bool))
        return frozenset({self.end_of_text_id, *(end for end in known if 0 <= end < self.vocab_size)})

    def difference(self, other: "Tokenizer") -> str:
        """Return in what `other` encodes text otherwise, or an empty text.

        Their definitions may differ in form, in truncation and padding, and in what they put around a text.
        """
        ours, theirs = (each._tokenizer.get_vocab(with_added_tokens=True) for each in (self, other))
        if len(ours) != len(theirs):
            return f"{len(ours):,} and {len(theirs):,} entries"
        if ours != theirs:
            moved = min(ours.items() - theirs.items(), key=lambda entry: entry[1])
            return f"entry {moved[1]} is {moved[0]!r} and {other.name_of(moved[1])!r}"
        if merges_of(self.content) != merges_of(other.content):
            return "the merges differ"
        return "" if self.encode(PROBE) == other.encode(PROBE) else f"they split {PROBE!r} differently"

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> list[int]:
        """Return the token ids of a text in which the characters of a special token mean that token."""
        try:
            return self._parser.encode(text, add_special_tokens=False).ids
        except Exception as error:  # as in `encode_batch`
            raise DataError(f"The tokenizer cannot encode {text[:40]!r}: {error}") from error

    def encode_with_places(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text and where each begins and ends in it, in characters.

        Args:
            special: the characters of a special token mean that token.
        """
        try:
            encoding = (self._parser if special else self._tokenizer).encode(text, add_special_tokens=False)
        except Exception as error:  # as in `encode_batch`
            raise DataError(f"The tokenizer cannot encode {text[:40]!r}: {error}") from error
        return encoding.ids, encoding.offsets

    def with_special_tokens(self, names: Sequence[str]) -> "Tokenizer":
        """Return this tokenizer with special tokens of these characters; those that it lacks get new ids at its end."""
        import tokenizers

        if not (missing := [name for name in names if name not in self.special_tokens.values()]):
            return self
        extended = tokenizers.Tokenizer.from_str(self.definition.decode("utf-8"))
        extended.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in missing])
        definition = extended.to_str(pretty=True).encode()
        made = Tokenizer(definition, origin="the extended tokenizer", end_of_text_id=self.end_of_text_id)
        return made.used_like(self)

    @functools.cached_property
    def _parser(self) -> Any:
        """A copy that reads special tokens from text: changing the setting of one would disturb other threads."""
        parser = copy.deepcopy(self._tokenizer)
        parser.encode_special_tokens = False
        return parser

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text. All cores work on texts and on the parts of long ones."""
        parts = [(number, part) for number, text in enumerate(texts) for part in self._parts(text)]
        ends = itertools.accumulate(len(part) for _, part in parts)
        ids: list[list[int]] = [[] for _ in texts]
        for _, group in itertools.groupby(zip(ends, parts, strict=True), lambda pair: pair[0] // GROUP_CHARACTERS):
            numbers, group_texts = zip(*(part for _, part in group), strict=True)
            # The "fast" variant omits character offsets and gives the same ids.
            try:
                encoded = self._tokenizer.encode_batch_fast(list(group_texts), add_special_tokens=False)
            except Exception as error:  # `tokenizers` raises bare Exception, for example without an unknown token
                raise DataError(
                    f"The tokenizer cannot encode {group_texts[0][:40]!r} or a text after it: {error}"
                ) from error
            for number, item in zip(numbers, encoded, strict=True):
                ids[number] += item.ids
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)

    def id_of(self, token: str | None) -> int | None:
        """Return the id of an entry by its name, or None."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def name_of(self, index: int) -> str | None:
        """Return the name of an entry by its id, or None."""
        return self._tokenizer.id_to_token(index)

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Return whether both have the same tokens with the same ids."""
        return self.sha256 == other.sha256 or self._tokenizer.get_vocab() == other._tokenizer.get_vocab()

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """The characters of each special token by its id; `decode` leaves them out."""
        return {index: added.content for index, added in self._added.items() if added.special}

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """A pattern for the characters of special tokens, the longest where several match; nothing without any."""
        names = sorted(filter(None, self.special_tokens.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def bytes_of(self, index: int) -> bytes:
        """Return the bytes of an entry's text, which may be a part of a character; those of a special token's name."""
        if index in self._added:
            return self._added[index].content.encode()
        return self._read_bytes(self.name_of(index) or "")

    @functools.cached_property
    def _read_bytes(self) -> Callable[[str], bytes]:
        return bytes_reader(self.content)

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes of text per id: int32 of shape (vocab_size,), 0 for special tokens.

        Bits per byte divides by their sum over the targets.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for name, index in self.entries.items():
            lengths[index] = len(self._read_bytes(name))
        for index, added in self._added.items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        lengths[self.end_of_text_id] = 0
        return lengths

    @property
    def end_of_text(self) -> str:
        """The characters of the end-of-text token."""
        return str(self._tokenizer.id_to_token(self.end_of_text_id))

    @property
    def known_end_of_text_id(self) -> int | None:
        """The id of the added token whose name says that it ends texts, or None."""
        return known_end_of_text(self._added)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the definition, byte for byte as it was read, so that its hash stays the same."""
        write_bytes(Path(path), self.definition)

    def _parts(self, text: str) -> Iterator[str]:
        """Yield a long text in parts that give the ids of the whole; encoding 54 MB at once took 8 GB of memory."""
        start = 0
        while self.border is not None and len(text) - start > PART_CHARACTERS:
            border = self.border.search(text, start + PART_CHARACTERS)
            if border is None:
                break
            yield text[start : border.start()]
            start = border.start()
        yield text[start:]

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """The special tokens that the definition's post-processor puts before a text."""
        if not self._tokenizer.num_special_tokens_to_add(is_pair=False):
            return []
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        starts = (n for n in range(len(ids) - len(plain) + 1) if ids[n : n + len(plain)] == plain)
        return ids[: next(starts, 0)]

    @functools.cached_property
    def border(self) -> re.Pattern[str] | None:
        """A zero-width pattern for places where a text may be cut without changing its ids; None if there are none."""
        return border_pattern(self.content)

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether tokens consist of bytes, each one a character of an alphabet, as in GPT-2."""
        return is_byte_level(self.content)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id of the token for what the tokenizer does not know, or None."""
        unknown = unknown_token(self.content)
        return unknown if isinstance(unknown, int) else self.id_of(unknown)

    @property
    def entries(self) -> dict[str, int]:
        """The ids of the model's entries by name, without added tokens."""
        return self._tokenizer.get_vocab(with_added_tokens=False)

    def represents(self, character: str) -> bool:
        """Return whether a character that is not blank has tokens by itself, or is removed by the normalizer."""
        normalizer = self._tokenizer.normalizer
        if normalizer is not None and not normalizer.normalize_str(character):
            return True
        text = self.decode([index for index in self.encode(character) if index != self.unknown_id])
        return bool(text.strip()) and (character == "\ufffd" or "\ufffd" not in text)


def token_text(raw: bytes) -> str:
    """Return a token as text, or as OpenAI's API writes one that is not UTF-8 by itself: `bytes:\\xe2\\x82`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

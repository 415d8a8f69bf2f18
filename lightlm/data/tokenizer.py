"""Tokenizers: a wrapper over `tokenizers` that reads special tokens in a text only on request, loading, training."""

import copy
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightlm.data.bpe_training import train_bpe
from lightlm.data.tokenizer_folder import declared_end_of_text, read_definition
from lightlm.errors import CheckpointError, DataError, UsageError
from lightlm.files import write_bytes
from lightlm.names import note_clash
from lightlm.runs import checkpoints, find_run

END_OF_TEXT_NAMES = (
    "<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]"
)  # fmt: skip
NAMED_TOKENIZERS = {"gpt2": "openai-community/gpt2"}
OFFLINE_HINT = (
    "Offline, use --tokenizer train:8192, which trains one on the data, or --tokenizer PATH with a tokenizer.json."
)

SHOWN_NAMES = 20  # special tokens that a message lists

# 257 entries are the bytes and the end-of-text token; below 300 a tokenizer has hardly any merges.
MIN_VOCAB_SIZE = 300

# What two tokenizers of one model encode equally: spaces, cases, digits, scripts, accents in both normal forms.
PROBE = "Don't  stop.\tThe\n\n\nEND of 3.14159, 2026: na\u00efve cafe\u0301 \u4f60\u597d \U0001f600 _x_==[1](2){}\r\n "

PART_CHARACTERS = 200_000
GROUP_CHARACTERS = 1_000_000  # encoded together: 150 MB of memory
# Where a text may be cut without changing its ids (see `Tokenizer.border`).
_SPACE_BORDER = re.compile(r"(?<=\S)(?= \S)")
_BORDER = re.compile(rf"(?<=\S\n)(?=\S)|{_SPACE_BORDER.pattern}|(?<=[^\W\d_])(?=[。，、！？])")


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
        `declared` that the definition has, else the first of `END_OF_TEXT_NAMES`. Raises DataError where the bytes are
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
        self.settings: Mapping[str, Any] = {}  # see `tokenizer_folder.read_settings`
        self.generation_config: Mapping[str, Any] = {}  # transformers' generation_config.json
        self._tokenizer.encode_special_tokens = True
        # Definitions for BERT-like models cut every text at 512 tokens; a corpus must not be cut.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.sha256: str = hashlib.sha256(definition).hexdigest()
        self.vocab_size: int = 1 + max((*self._tokenizer.get_vocab(with_added_tokens=True).values(), *self._added))
        if end_of_text_id is None:
            end_of_text_id = self._find_end_of_text(origin, end_of_text, declared)
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
            raise DataError(f"The tokenizer {path} cannot be read: {error.strerror}. {OFFLINE_HINT}") from error
        return cls(definition, origin=str(path), end_of_text_id=end_of_text_id)

    @classmethod
    def read(cls, path: Path, *, origin: str | None = None, end_of_text: str | None = None) -> "Tokenizer":
        """Load the tokenizer at a path: a tokenizer.json, or a folder with one, or with vocab.json and merges.txt.

        The end-of-text token is `end_of_text`, else what the files beside it name (see `tokenizer_folder`), else a
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
        if self._merges() != other._merges():
            return "the merges differ"
        return "" if self.encode(PROBE) == other.encode(PROBE) else f"they split {PROBE!r} differently"

    def _merges(self) -> list[list[str]]:
        """Return the merges of a BPE in order, which a definition holds as pairs or as texts with a space."""
        merges = (self.content.get("model") or {}).get("merges") or []
        return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> list[int]:
        """Return the token ids of a text in which the characters of a special token mean that token."""
        try:
            return self._parser.encode(text, add_special_tokens=False).ids
        except Exception as error:  # as in `encode_batch`
            raise DataError(f"The tokenizer cannot encode {text[:40]!r}: {error}") from error

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

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes of text per id: int32 of shape (vocab_size,), 0 for special tokens.

        Bits per byte divides by their sum over the targets.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[index] = self._text_bytes(token)
        for index, added in self._added.items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        lengths[self.end_of_text_id] = 0
        return lengths

    @property
    def end_of_text(self) -> str:
        """The characters of the end-of-text token."""
        return str(self._tokenizer.id_to_token(self.end_of_text_id))

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
        """A zero-width pattern for places where a text may be cut without changing its ids; None if there are none.

        Byte-level pre-tokenizers never join a line end between two visible characters to the next character, nor a
        single space, or an ideographic comma, to the letter before it. Those that put a space in front of a text can
        only be cut before a space. Others (Metaspace) may put one without declaring it.
        """
        if not self.byte_level:
            return None
        parts = _components(self.content.get("pre_tokenizer"))
        return _SPACE_BORDER if any(part.get("add_prefix_space") is True for part in parts) else _BORDER

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether tokens consist of bytes, each one a character of an alphabet, as in GPT-2."""
        parts = _components([self.content.get("pre_tokenizer"), self.content.get("decoder")])
        return any(part.get("type") == "ByteLevel" for part in parts)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id of the token for what the tokenizer does not know, or None."""
        model = self.content.get("model") or {}
        index = model.get("unk_id")
        return index if isinstance(index, int) else self.id_of(model.get("unk_token"))

    @functools.cached_property
    def word_based(self) -> bool:
        """Whether whole words are looked up, so that single characters say nothing about them."""
        return (self.content.get("model") or {}).get("type") in ("WordPiece", "WordLevel")

    @functools.cached_property
    def may_lose_text(self) -> bool:
        """Whether some text has no tokens, or unknown ones: not if there is a token for each byte."""
        from tokenizers import pre_tokenizers

        names = self._tokenizer.get_vocab(with_added_tokens=False)
        if self.byte_level and not self.word_based:
            return not set(pre_tokenizers.ByteLevel.alphabet()) <= names.keys()
        falls_back = (self.content.get("model") or {}).get("byte_fallback") is True
        return not (falls_back and all(f"<0x{byte:02X}>" in names for byte in range(256)))

    def represents(self, character: str) -> bool:
        """Return whether a character that is not blank has tokens by itself, or is removed by the normalizer."""
        normalizer = self._tokenizer.normalizer
        if normalizer is not None and not normalizer.normalize_str(character):
            return True
        text = self.decode([index for index in self.encode(character) if index != self.unknown_id])
        return bool(text.strip()) and (character == "\ufffd" or "\ufffd" not in text)

    def _text_bytes(self, token: str) -> int:
        if self.byte_level:
            return len(token)  # each character of the byte alphabet stands for one byte
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1
        return len(token.removeprefix("##").replace("▁", " ").encode())

    def _find_end_of_text(self, origin: str, named: str | None, declared: Sequence[int | str]) -> int:
        if named is not None:
            index = self.id_of(named)
            if index is None:
                raise DataError(f"{origin} has no token {named!r} to separate documents. {self._special_tokens()}")
            return index
        found = [index for token in declared if (index := self._index_of(token)) is not None]
        # A token of the definition's special ones first: config.json may hold the default id of its class.
        found = [index for index in found if index in self._added] or found
        if found:
            return found[0]
        if (known := self.known_end_of_text_id) is not None:
            return known
        raise DataError(
            f"{origin}: no end-of-text token to separate documents. No file beside it names one, and it has none of "
            f"{', '.join(END_OF_TEXT_NAMES)}. {self._special_tokens()}"
        )

    @property
    def known_end_of_text_id(self) -> int | None:
        """The id of the first of `END_OF_TEXT_NAMES` among the added tokens, or None."""
        ids = {added.content: index for index, added in self._added.items()}
        return next((ids[name] for name in END_OF_TEXT_NAMES if name in ids), None)

    def _index_of(self, token: int | str) -> int | None:
        if isinstance(token, str):
            return self.id_of(token)
        return token if 0 <= token < self.vocab_size and self.name_of(token) is not None else None

    def _special_tokens(self) -> str:
        names = [added.content for _, added in sorted(self._added.items()) if added.special]
        if not names:
            return "It has no special tokens. Use a tokenizer made for text generation, or --tokenizer train:8192."
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        return f"Name one of its special tokens with --eot: {', '.join(names[:SHOWN_NAMES])}{more}."


def _components(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a component of a tokenizer.json and every component inside it."""
    if isinstance(part, dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _components(inner)


def requested_vocab_size(spec: str) -> int | None:
    """Return the N of `train:N`, or None for a spec that names an existing tokenizer.

    Raises UsageError where N is not a whole number, or leaves no room for merges.
    """
    kind, _, number = spec.partition(":")
    if kind != "train":
        return None
    if not (number.isascii() and number.isdigit()) or int(number) < MIN_VOCAB_SIZE:
        raise UsageError(
            f"--tokenizer {spec}: write the number of entries to train, at least {MIN_VOCAB_SIZE} (256 bytes, the "
            "end-of-text token, and some merges), for example train:8192"
        )
    return int(number)


def tokenizer_path(spec: str) -> Path | None:
    """Return the path of the tokenizer on this machine that `spec` names; None if it is on the Hub, or nowhere.

    For a run, by path or by name, it is that of its newest checkpoint. Raises DataError if the run has none.
    """
    path = Path(spec)
    if spec in NAMED_TOKENIZERS:
        return None
    try:
        run = find_run(spec)
    except CheckpointError:
        return path if path.exists() else None
    if run != path:
        note_clash(spec, f"the run {run}", [path] if path.name != "latest" else [])
    if not (saved := checkpoints(run)):
        raise DataError(f"The run {run} has no checkpoint yet, which would hold its tokenizer; name its data folder.")
    return saved[-1]


def load_tokenizer(spec: str, download: Callable[[str, str], Path], end_of_text: str | None = None) -> Tokenizer:
    """Return the tokenizer that `spec` names: `gpt2`, a Hub id, a run, or a path that `Tokenizer.read` reads.

    `download(repository, hint)` returns the local folder with the tokenizer of a Hub repository; `hint` is for its
    errors (see `sources.hub.client.download_tokenizer`). `gpt2` is the Hub's even if a folder is called so (see
    `lightlm.names`); otherwise an existing path takes precedence over a Hub id. Raises DataError where there is no such
    tokenizer, or it has no token `end_of_text`.
    """
    path = Path(spec)
    if spec in NAMED_TOKENIZERS:
        note_clash(spec, f"{NAMED_TOKENIZERS[spec]} on the Hugging Face Hub", [path])
    elif (found := tokenizer_path(spec)) is not None:
        return Tokenizer.read(found, end_of_text=end_of_text)
    if path.suffix == ".json" or path.is_absolute() or spec.startswith(".") or spec.count("/") > 1:
        raise DataError(f"There is no tokenizer {spec}. Give the path of a tokenizer.json, gpt2, a run, or a Hub id.")
    repo = NAMED_TOKENIZERS.get(spec, spec)
    return Tokenizer.read(download(repo, OFFLINE_HINT), origin=repo, end_of_text=end_of_text)


def train_tokenizer(texts: Iterable[str], vocab_size: int, end_of_text: str | None = None) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenizer; the same texts give the same bytes.

    `end_of_text` is its end-of-text token, `<|endoftext|>` by default.

    All 256 bytes are in the alphabet, so decode restores every encoded text. Training stops before `vocab_size` if no
    pair of tokens occurs twice: `.vocab_size` of the result is the size reached. Words of more than 1,000 characters
    are cut (see `lightlm.data.long_runs`). Raises UsageError for fewer than `MIN_VOCAB_SIZE` entries.
    """
    requested_vocab_size(f"train:{vocab_size}")
    end_of_text = end_of_text or END_OF_TEXT_NAMES[0]
    definition = train_bpe(texts, vocab_size, end_of_text)
    return Tokenizer(definition, origin="the trained tokenizer", end_of_text=end_of_text)

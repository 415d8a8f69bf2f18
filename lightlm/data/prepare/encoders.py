"""Text to token ids: `gigatoken` for speed, `tokenizers` as the reference.

On one core of this project's machine gigatoken encodes 200-600 MB of English per second, `tokenizers` 1.6. gigatoken
is young, so every run compares the two on hard texts first, and then on a sample of every few megabytes.
"""

import functools
import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow
import xxhash

from lightlm.data.readers.texts import buffers_of, byte_lengths
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import DataError, UsageError

GIGATOKEN, TOKENIZERS, AUTO = "gigatoken", "tokenizers", "auto"
ENCODERS = (AUTO, GIGATOKEN, TOKENIZERS)

SAMPLE_BYTES = 2_048  # compared per chunk of 4 MB: a tenth of the time that the chunk takes

# A large text is encoded in parts. A part grows up to this size in search of a place to cut: 8 MB without one take
# 0.7 s and 200 MB of memory.
UNCUT_CHARACTERS = 32 << 20
WINDOW = 100  # characters on each side of a cut that are encoded both ways before it is trusted
TRIES = 50

# What encoders get wrong: contractions, runs and kinds of spaces, digits, combining marks, joined emoji, scripts
# without spaces, control characters, code, and the names of special tokens.
HARD_TEXTS = (
    "I'm sure they've said it'll do; WE'RE not, 'tis isn't 's 't 'LL",
    "  two  spaces \t tabs\t\t\n\n\n  lines \r\n\r\n\x0b\x0c ends   ",
    "\u00a0no\u00a0break \u3000wide\u3000\u3000space \u2028line\u2029 \u200bzero \ufeffmark \x85next \x1c\x1f",
    "1 12 123 1234567890 3.14159 -1e-10 0xFFFF \u0664\u0665\u0666 \u00bd \u2167 \u00b2",
    "na\u00efve nai\u0308ve \u1e9b\u0323 \ufb01 \u01c5 \u0130i\u0307 \u00df\u1e9e",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f \U00020000",
    "\u4eca\u65e5\u306f\u3001\u4e16\u754c\u3002\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627 \ud55c\uae00",  # noqa: E501
    "\x00\x01\x7f\x80\x9f \ufffd \uffff \U0010ffff \ue000",
    "def f(x):\n\treturn x**2  # \u2192 \u201cquoted\u201d\n\nif (a!=b){c->d();}\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ________________ ================ ....",
    "<|endoftext|> <|im_start|>user<|im_end|> </s><s> [SEP] <|begin_of_text|><pad>",
    "a",
    " ",
)


class EncoderError(DataError):
    """An encoder's ids differ from those of the reference."""


class Encoder(Protocol):
    """Encodes packed texts. Special tokens spelled out in a text are ordinary characters; none is added."""

    name: str

    def encode(self, texts: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, lengths): the ids of all texts end to end, and how many each text has (int64)."""


class ReferenceEncoder:
    """The `tokenizers` library."""

    name = TOKENIZERS
    _one_at_a_time = threading.Lock()  # it uses every core, and 150 bytes of memory per character

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
        with self._one_at_a_time:
            encoded = self._tokenizer.encode_batch(texts.to_pylist())
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.empty(int(lengths.sum()), np.uint32)
        for end, item in zip(np.cumsum(lengths), encoded, strict=True):
            ids[end - len(item) : end] = item
        return ids, lengths


class GigatokenEncoder:
    """The `gigatoken` library.

    Threads that share one of its tokenizers wait for each other (0.13 s where two tokenizers take 0.09 s), so each
    thread takes its own. Making one takes 0.3 s.
    """

    name = GIGATOKEN

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ImportError or ValueError where gigatoken is not installed or cannot read this tokenizer."""
        self._definition = plain_definition(tokenizer)
        self._idle: deque[Any] = deque([self._new_backend()])

    def encode(self, texts: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
        import awkward

        offsets, data = buffers_of(texts)
        if offsets[-1] == offsets[0]:
            return np.zeros(0, np.uint32), np.zeros(len(texts), np.int64)
        characters = awkward.contents.NumpyArray(data, parameters={"__array__": "char"})
        layout = awkward.contents.ListOffsetArray(
            awkward.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        # One thread: the other cores encode other blocks.
        try:
            backend = self._idle.pop()
        except IndexError:
            backend = self._new_backend()
        result = backend.encode_batch(awkward.Array(layout), parallel=False).layout
        self._idle.append(backend)
        ends = np.asarray(result.offsets.data)
        return np.asarray(result.content.data)[ends[0] : ends[-1]], np.diff(ends)

    def _new_backend(self) -> Any:
        import gigatoken

        try:
            return gigatoken.Tokenizer.from_json(self._definition)
        except Exception as error:  # its parsers raise several undocumented types
            raise ValueError(str(error)) from error


def plain_definition(tokenizer: Tokenizer) -> bytes:
    """Return the tokenizer.json without special tokens, template, truncation and padding.

    Without its special tokens a text cannot contain one. Added tokens that are not special stay: `tokenizers` finds
    them in texts, too.
    """
    added = tokenizer.content.get("added_tokens") or []
    plain = [token for token in added if not token.get("special") and token["id"] != tokenizer.end_of_text_id]
    changes = {"added_tokens": plain, "post_processor": None, "truncation": None, "padding": None}
    return json.dumps(tokenizer.content | changes).encode()


_making = threading.Lock()
_known: dict[tuple[bytes, int], Tokenizer] = {}


def remember(tokenizer: Tokenizer) -> None:
    """Let `worker_encoder` use this tokenizer, which takes a third of a second to make."""
    _known.clear()
    _known[tokenizer.definition, tokenizer.end_of_text_id] = tokenizer


def choose_encoder(wanted: str, definition: Path, end_of_text_id: int) -> tuple[str, str | None]:
    """Return the name of the encoder to use and, if `auto` fell back on `tokenizers`, the reason.

    Raises:
        UsageError: the encoder is not one of `ENCODERS`.
        DataError: gigatoken was requested and cannot be used, or its ids differ from those of `tokenizers`.
    """
    if wanted not in ENCODERS:
        raise UsageError(f"--encoder {wanted}: choose one of {', '.join(ENCODERS)}")
    reference, _ = worker_encoder(definition, end_of_text_id, TOKENIZERS)
    for text in (reference.end_of_text, f"a {reference.end_of_text} b"):
        refuse_end_of_text(reference, np.array(reference.encode(text)), "a test text")
    if wanted == TOKENIZERS:
        return TOKENIZERS, None
    try:
        tokenizer, encoder = worker_encoder(definition, end_of_text_id, GIGATOKEN)
    except (ImportError, ValueError) as error:
        if wanted == GIGATOKEN:
            raise DataError(f"gigatoken cannot be used here ({error}); use --encoder tokenizers") from error
        return TOKENIZERS, str(error)
    specials = tuple(token["content"] for token in tokenizer.content.get("added_tokens") or ())
    compare(encoder, tokenizer, (*HARD_TEXTS, *specials, "x".join(specials)), "a test text")
    return GIGATOKEN, None


@functools.lru_cache(maxsize=2)
def _made(definition: bytes, end_of_text_id: int, name: str) -> tuple[Tokenizer, Encoder]:
    tokenizer = _known.get((definition, end_of_text_id))
    if tokenizer is None:
        tokenizer = Tokenizer(definition, origin="the tokenizer", end_of_text_id=end_of_text_id)
    return tokenizer, GigatokenEncoder(tokenizer) if name == GIGATOKEN else ReferenceEncoder(tokenizer)


def worker_encoder(definition: Path, end_of_text_id: int, name: str) -> tuple[Tokenizer, Encoder]:
    """Return the tokenizer in a file and its encoder; each process makes them once and its threads share them."""
    with _making:
        return _made(definition.read_bytes(), end_of_text_id, name)


def compare(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str], where: str) -> None:
    """Raise EncoderError, naming the text, where the encoder's ids differ from those of `tokenizers`."""
    if encoder.name == TOKENIZERS:
        return
    ids, lengths = encoder.encode(pyarrow.array(texts, pyarrow.large_string()))
    ends = np.cumsum(lengths)
    for text, expected, end, length in zip(texts, tokenizer.encode_batch(texts), ends, lengths, strict=True):
        if ids[end - length : end].tolist() != expected:
            raise different(encoder, where, text)


def check_sample(encoder: Encoder, tokenizer: Tokenizer, texts: pyarrow.Array, ids: np.ndarray, lengths: np.ndarray,
                 hashes: np.ndarray, where: str) -> None:  # fmt: skip
    """Compare about `SAMPLE_BYTES` of the texts, chosen by their hashes, with `tokenizers`.

    For a short text, compares the ids that will be written. For a long one, encodes a part with both libraries.
    Raises EncoderError at the first difference.
    """
    if encoder.name == TOKENIZERS or not len(texts):
        return
    sizes, ends = byte_lengths(texts), np.cumsum(lengths)
    index, budget = int(hashes.argmin()), SAMPLE_BYTES
    while budget > 0 and index < len(texts):
        text = texts[index].as_py()
        if sizes[index] <= SAMPLE_BYTES:
            if ids[ends[index] - lengths[index] : ends[index]].tolist() != tokenizer.encode(text):
                raise different(encoder, where, text)
        else:
            start = xxhash.xxh3_64_intdigest(text[:SAMPLE_BYTES].encode()) % len(text)
            compare(encoder, tokenizer, [text[start : start + SAMPLE_BYTES]], where)
        budget -= int(sizes[index]) + 64
        index += 1


def refuse_end_of_text(tokenizer: Tokenizer, ids: np.ndarray, where: str) -> None:
    """Raise EncoderError where the ids of texts contain the end-of-text id.

    A tokenizer keeps special tokens and texts apart. But its model (Unigram, WordPiece, words, or BPE with
    `ignore_merges`) may have the end-of-text token among its own words, and find it in a text.
    """
    if (ids == tokenizer.end_of_text_id).any():
        raise EncoderError(
            f"This tokenizer finds its end-of-text token {tokenizer.end_of_text!r} in ordinary characters in {where}, "
            "so a document could end in its middle. Use another: --tokenizer gpt2, or --tokenizer train:8192"
        )


def encode_large(
    parts: Iterable[str], tokenizer: Tokenizer, encoder: Encoder, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Encode the text of `parts`: yield (text, ids) whose ids, end to end, are those of the whole text.

    Compares a sample of each with `tokenizers`; `where` names the text in errors. Raises DataError where
    `UNCUT_CHARACTERS` have no place to cut.
    """
    rest: list[str] = []
    for part in parts:
        border = _last_border(part, tokenizer, encoder)
        if border is None:
            rest.append(part)
            if sum(map(len, rest)) > UNCUT_CHARACTERS:
                raise DataError(
                    f"{UNCUT_CHARACTERS >> 20} million characters of one document have no place where the tokenizer "
                    f"lets them be cut (a space or a line end between two words): {rest[0][:60]!r}. Split the "
                    "document, or leave it out with --skip-bad"
                )
            continue
        text = "".join([*rest, part[:border]])
        yield text, _checked_ids(text, tokenizer, encoder, where)
        rest = [part[border:]]
    text = "".join(rest)
    if text:
        yield text, _checked_ids(text, tokenizer, encoder, where)


def _checked_ids(text: str, tokenizer: Tokenizer, encoder: Encoder, where: str) -> np.ndarray:
    packed = pyarrow.array([text], pyarrow.large_string())
    ids, lengths = encoder.encode(packed)
    refuse_end_of_text(tokenizer, ids, where)
    check_sample(encoder, tokenizer, packed, ids, lengths, np.zeros(1, np.int64), where)
    return ids


def _last_border(part: str, tokenizer: Tokenizer, encoder: Encoder) -> int | None:
    """Return the last place where a part can be cut, or None. Encodes both sides to see that the ids stay."""
    if tokenizer.border is None:
        return None
    for window in (1 << 10, 1 << 16, len(part)):
        start = max(0, len(part) - window - WINDOW)
        end = len(part) - WINDOW  # the text beyond the part is not known yet
        found = [match.start() for match in tokenizer.border.finditer(part, start, max(start, end))]
        for border in found[: -TRIES - 1 : -1]:
            left, right = part[max(0, border - WINDOW) : border], part[border : border + WINDOW]
            if left and _ids(encoder, left + right).tolist() == [*_ids(encoder, left), *_ids(encoder, right)]:
                return border
    return None


def _ids(encoder: Encoder, text: str) -> np.ndarray:
    return encoder.encode(pyarrow.array([text], pyarrow.large_string()))[0]


def different(encoder: Encoder, where: str, text: str) -> EncoderError:
    """Return the error for a text that the two libraries encode differently."""
    from importlib.metadata import version

    return EncoderError(
        f"{encoder.name} {version(encoder.name)} and tokenizers {version('tokenizers')} give different token ids for "
        f"{where}: {text[:80]!r}. No wrong tokens were written. Resume with --encoder tokenizers, which is slower."
    )

"""Text to token ids: `gigatoken` for speed, `tokenizers` as the reference.

On one core of this project's machine gigatoken encodes 200-600 MB of English per second, `tokenizers` 1.6. gigatoken
is young, so every run compares the two on hard texts first, and then on a sample of every few megabytes.
"""

import functools
import itertools
import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import xxhash

from lightlm.data.coverage import LossCounter, may_lose_text
from lightlm.data.readers.texts import buffers_of, byte_lengths
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import DataError

GIGATOKEN, TOKENIZERS, AUTO = "gigatoken", "tokenizers", "auto"

SAMPLE_BYTES = 2_048  # compared per chunk of 4 MB: a tenth of the time that the chunk takes

# A large text is encoded in parts. A part grows up to this size in search of a place to cut: 8 MB without one take
# 0.7 s and 200 MB of memory.
UNCUT_CHARACTERS = 32 << 20
WINDOW = 100  # characters on each side of a cut that are encoded both ways before it is trusted
SEARCHED = 1 << 14  # characters at the end of a part in which a cut is tried first
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


class Encoder:
    """Encodes packed texts with the `tokenizers` library.

    Special tokens spelled out in a text are ordinary characters; none is added.
    """

    name = TOKENIZERS
    _one_at_a_time = threading.Lock()  # it uses every core, and 150 bytes of memory per character

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.losses = LossCounter(tokenizer) if may_lose_text(tokenizer) else None

    def encode(self, texts: pyarrow.Array) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, lengths): the ids of all texts end to end, and how many each text has (int64)."""
        with self._one_at_a_time:
            encoded = self.tokenizer.encode_batch(texts.to_pylist())
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(itertools.chain.from_iterable(encoded), np.uint32, int(lengths.sum())), lengths


class GigatokenEncoder(Encoder):
    """Encodes packed texts with the `gigatoken` library.

    Threads that share one of its tokenizers wait for each other (0.13 s where two tokenizers take 0.09 s), so each
    thread takes its own. Making one takes 0.3 s.
    """

    name = GIGATOKEN

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ImportError or ValueError where gigatoken is not installed or cannot read this tokenizer."""
        super().__init__(tokenizer)
        # Without its special tokens a text cannot contain one. Added tokens that are not special stay: `tokenizers`
        # finds them in texts, too.
        added = tokenizer.content.get("added_tokens") or []
        plain = [token for token in added if not token.get("special") and token["id"] != tokenizer.end_of_text_id]
        changes = {"added_tokens": plain, "post_processor": None, "truncation": None, "padding": None}
        self._definition = json.dumps(tokenizer.content | changes).encode()
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
        try:
            backend = self._idle.pop()
        except IndexError:
            backend = self._new_backend()
        # One thread: the other cores encode other blocks.
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


_making = threading.Lock()


def worker_encoder(definition: Path, name: str, end_of_text_id: int | None = None) -> Encoder:
    """Return the encoder of a tokenizer.json; each process makes it once and its threads share it."""
    with _making:
        return _made(definition.read_bytes(), name, end_of_text_id)


@functools.lru_cache(maxsize=2)
def _made(definition: bytes, name: str, end_of_text_id: int | None) -> Encoder:
    tokenizer = Tokenizer(definition, origin="the tokenizer", end_of_text_id=end_of_text_id)
    return GigatokenEncoder(tokenizer) if name == GIGATOKEN else Encoder(tokenizer)


def choose_encoder(wanted: str, definition: Path, end_of_text_id: int | None = None) -> tuple[Encoder, str | None]:
    """Return the encoder to use and, if `auto` fell back on `tokenizers`, the reason.

    Without `end_of_text_id`, the end-of-text token is one of the known names.

    Raises DataError where gigatoken was requested and cannot be used, its ids differ from those of `tokenizers`, or
    the tokenizer finds its end-of-text token in texts.
    """
    reason = None
    try:
        encoder = worker_encoder(definition, TOKENIZERS if wanted == TOKENIZERS else GIGATOKEN, end_of_text_id)
    except (ImportError, ValueError) as error:
        if wanted == GIGATOKEN:
            raise DataError(f"gigatoken cannot be used here ({error}); use --encoder tokenizers") from error
        encoder, reason = worker_encoder(definition, TOKENIZERS, end_of_text_id), str(error)
    tokenizer = encoder.tokenizer
    for text in (tokenizer.end_of_text, f"a {tokenizer.end_of_text} b"):
        refuse_end_of_text(tokenizer, np.array(tokenizer.encode(text)), "a test text")
    specials = tuple(token["content"] for token in tokenizer.content.get("added_tokens") or ())
    compare(encoder, (*HARD_TEXTS, *specials, "x".join(specials)), "a test text")
    return encoder, reason


def compare(encoder: Encoder, texts: Sequence[str], where: str) -> None:
    """Raise EncoderError, naming the text, where the encoder's ids differ from those of `tokenizers`."""
    ids, lengths = encoder.encode(pyarrow.array(texts, pyarrow.large_string()))
    for text, found in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        _require_reference(encoder, text, found, where)


def _require_reference(encoder: Encoder, text: str, ids: np.ndarray, where: str) -> None:
    if encoder.name != TOKENIZERS and ids.tolist() != encoder.tokenizer.encode(text):
        raise EncoderError(
            f"{encoder.name} {version(encoder.name)} and tokenizers {version('tokenizers')} give different token ids "
            f"for {where}: {text[:80]!r}. No wrong tokens were written. Resume with --encoder tokenizers, which is "
            "slower."
        )


def check_ids(
    encoder: Encoder, texts: pyarrow.Array, ids: np.ndarray, lengths: np.ndarray, hashes: np.ndarray, where: str
) -> None:
    """Check the ids of texts: none is the end-of-text id, and a sample is as `tokenizers` encodes it.

    The sample is about `SAMPLE_BYTES` of the texts, chosen by their hashes: the ids that will be written of short
    texts, and a part of a long one, encoded with both libraries. Raises EncoderError at the first difference.
    """
    refuse_end_of_text(encoder.tokenizer, ids, where)
    if encoder.name == TOKENIZERS or not len(texts):
        return
    sizes, ends = byte_lengths(texts), np.cumsum(lengths)
    index, budget = int(hashes.argmin()), SAMPLE_BYTES
    while budget > 0 and index < len(texts):
        text = texts[index].as_py()
        if sizes[index] <= SAMPLE_BYTES:
            _require_reference(encoder, text, ids[ends[index] - lengths[index] : ends[index]], where)
        else:
            start = xxhash.xxh3_64_intdigest(text[:SAMPLE_BYTES].encode()) % len(text)
            compare(encoder, [text[start : start + SAMPLE_BYTES]], where)
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
            "so a document could end in its middle. Name another token with --eot, or use another tokenizer: "
            "--tokenizer gpt2, or --tokenizer train:8192"
        )


def encode_large(parts: Iterable[str], encoder: Encoder, where: str) -> Iterator[tuple[str, np.ndarray]]:
    """Encode the text of `parts`: yield (text, ids) whose ids, end to end, are those of the whole text.

    Compares a sample of each with `tokenizers`; `where` names the text in errors. Raises DataError where
    `UNCUT_CHARACTERS` have no place to cut.
    """
    for text in _cut(parts, encoder):
        packed = pyarrow.array([text], pyarrow.large_string())
        ids, lengths = encoder.encode(packed)
        check_ids(encoder, packed, ids, lengths, np.zeros(1, np.int64), where)
        yield text, ids


def _cut(parts: Iterable[str], encoder: Encoder) -> Iterator[str]:
    """Yield the text of `parts` cut at other places: where the ids of both sides are those of the whole."""
    rest: list[str] = []
    for part in parts:
        border = _last_border(part, encoder)
        if border is not None:
            yield "".join([*rest, part[:border]])
            rest = []
        rest.append(part[border:])
        if sum(map(len, rest)) > UNCUT_CHARACTERS:
            raise DataError(
                f"{UNCUT_CHARACTERS >> 20} million characters of one document have no place where the tokenizer lets "
                f"them be cut (a space or a line end between two words): {rest[0][:60]!r}. Split the document, or "
                "leave it out with --skip-bad"
            )
    if any(rest):
        yield "".join(rest)


def _last_border(part: str, encoder: Encoder) -> int | None:
    """Return the last place where a part can be cut, or None. Encodes both sides to see that the ids stay."""
    if encoder.tokenizer.border is None:
        return None

    def ids(text: str) -> list[int]:
        return encoder.encode(pyarrow.array([text], pyarrow.large_string()))[0].tolist()

    end = max(0, len(part) - WINDOW)  # the text beyond the part is not known yet
    for start in (max(0, end - SEARCHED), 0):
        found = [match.start() for match in encoder.tokenizer.border.finditer(part, start, end)]
        for border in found[: -TRIES - 1 : -1]:
            left, right = part[max(0, border - WINDOW) : border], part[border : border + WINDOW]
            if left and ids(left + right) == ids(left) + ids(right):
                return border
    return None

"""Large texts in pieces: token ids that do not change by it, and the one cut of a source of one document."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow

from lightlm.data.prepare.encoders import Encoder, check_sample, refuse_end_of_text
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import DataError

# A piece grows up to this size in search of a border. Measured: 8 MB without one take 0.7 s and 200 MB of memory.
UNCUT_CHARACTERS = 32 << 20
WINDOW = 100  # characters on each side of a cut that are encoded both ways before it is trusted
TRIES = 50


def encode_large(
    parts: Iterable[str], tokenizer: Tokenizer, encoder: Encoder, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids) of pieces that end to end are the text of `parts` and the ids of the whole.

    Of each piece a sample is compared with `tokenizers`; `where` names the text if that finds a difference. Raises
    DataError where `UNCUT_CHARACTERS` have no border that a cut could be made at.
    """
    rest: list[str] = []
    for part in parts:
        border = _last_border(part, tokenizer, encoder)
        if border is None:
            rest.append(part)
            if sum(map(len, rest)) > UNCUT_CHARACTERS:
                raise DataError(
                    f"{UNCUT_CHARACTERS >> 20} million characters of one document have no place where the tokenizer "
                    f"lets them be cut (a space or a line end between two words): {rest[0][:60]!r}. Break the "
                    "document up, or leave it out with --skip-bad"
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
    """The last place in a part where it can be cut, or None; tried out, since pre-tokenizers are many."""
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


def place_of_cut(parts: Iterable[str], val_fraction: float, characters: int) -> int | None:
    """Where to cut the only document of a source: after the last line (else word) that ends before the last
    `val_fraction` of its `characters`, counted in characters; None where no cut leaves text on both sides.
    """
    limit = int(characters * (1 - val_fraction))
    cuts: dict[str, int] = {}
    seen, first, last = 0, None, 0
    for part in parts:
        visible = part.strip()
        if visible:
            first = seen + part.index(visible[0]) if first is None else first
            last = seen + len(part.rstrip()) - 1
        for border in ("\n", " "):
            place = part.rfind(border, 0, max(0, limit - seen))
            if place >= 0:
                cuts[border] = seen + place + 1
        seen += len(part)
    for border in ("\n", " "):
        cut = cuts.get(border)
        if val_fraction > 0 and cut is not None and first is not None and first < cut <= last:
            return cut
    return None

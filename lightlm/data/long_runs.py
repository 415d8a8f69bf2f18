"""Texts without long runs of one kind of character, to train a tokenizer on.

A tokenizer's trainer takes time with the square of a word's length: a word of 100,000 letters took 18 s, one of 3 MB
more than 11 minutes. No language has such words; encoded data, sequences of bases and rows of blanks do.
"""

import re
from collections.abc import Iterable, Iterator

LONGEST = 1_000  # characters of a run that stays whole
SAMPLED = 1_000_000  # characters of longer runs that are trained on: a vocabulary of 8,192 takes 10 s from these

# The kinds of characters that GPT-2's pre-tokenizer puts in different words: letters, digits, spaces and others.
_ONE_KIND = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")
_STEP = LONGEST // 2


def cut_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, with runs of more than `LONGEST` characters of one kind cut into pieces of their own.

    Of all such runs together, the first `SAMPLED` characters are yielded. A text without one is yielded as it is.
    """
    left = SAMPLED
    for text in texts:
        done = 0
        for start, end in _long_runs(text):
            if start > done:
                yield text[done:start]
            for place in range(start, min(end, start + left), LONGEST):
                yield text[place : min(place + LONGEST, end, start + left)]
            left -= min(end - start, left)
            done = end
        if done < len(text) or not text:
            yield text[done:]


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of more than `LONGEST` characters of one kind.

    Such a run fills at least one of the windows of half its length, so only the windows are looked at.
    """
    done = place = 0
    while place + _STEP <= len(text):
        window = _ONE_KIND.match(text, place, place + _STEP)
        if window is None or window.end() < place + _STEP:
            place += _STEP
            continue
        *_, before = _ONE_KIND.finditer(text, max(done, place - _STEP), place + 1)
        start, run = before.start(), _ONE_KIND.match(text, place)
        done = place = run.end() if run else len(text)
        if done - start > LONGEST:
            yield start, done

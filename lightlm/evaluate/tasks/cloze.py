"""Four-way cloze examples in HellaSwag's form, cut from any documents (the task `heldout_cloze`).

The model chooses the continuation of a passage: the text that follows it, or one of three passages from other
documents. All four begin a sentence, end between words and have the same length. Right answers serve as wrong ones
elsewhere, so the endings by themselves give no clue. Examples depend on the documents' texts only, not on their order
or on a tokenizer.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from lightlm.data.select.ngrams import ngram_hashes

EXAMPLES = 1000
ENDINGS = 4
# In characters. With a vocabulary of 8,192, context and ending fit into the 256 tokens of the smallest recipe.
CONTEXT = 320
LONGEST_CONTEXT = 640  # a longer "sentence" is a table or a list
# One rule cuts all four. If wrong ones were cut to the right one's length, its middle length would be a clue.
ENDING = 100
TOLERANCE = 2
BYTE_TOLERANCE = 0.05  # of the right ending's bytes; separates scripts, whose characters have different sizes

_DRAWS = 100  # candidates for an example's wrong endings
_SHARED_WORDS = 8  # an ending that repeats this many words of the right document might be right
_SHARED_DOCUMENT = 0.1  # share of the smaller document's n-grams, above which one is a version of the other
# A full stop after two letters that are not capitals ("Mr." and "J." end nothing), or a Chinese or Japanese one.
_SENTENCE_END = re.compile(r"(?<=[^\W\d_A-Z]{2})[.!?…][\"'”’)\]]* |[。！？][”’」』）]* ?")
_IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]|[\U00020000-\U0003ffff]")  # no spaces


@dataclass(frozen=True)
class Example:
    """A context that ends with a sentence, four endings, and the index of the right one."""

    context: str
    endings: list[str]
    label: int
    documents: list[int]  # source of each ending, as an index of the given texts


@dataclass(frozen=True)
class _Passage:
    document: int
    context: str
    ending: str  # what follows
    key: int  # a hash of both


def examples(texts: Sequence[str], count: int = EXAMPLES) -> list[Example]:
    """Return up to `count` examples: first one from each document, then a second from each, and so on.

    There are fewer if the documents have fewer passages, and none if fewer than four documents have any. Documents
    with equal texts count once.
    """
    documents = {" ".join(text.split()): index for index, text in reversed(list(enumerate(texts)))}
    passages = (passage for text, index in documents.items() for passage in _passages(text, index))
    pool = sorted(passages, key=lambda passage: passage.key)
    ngrams = {index: _ngrams(text) for text, index in documents.items()}
    turns: Counter[int] = Counter()
    order = []
    for passage in pool:
        turns[passage.document] += 1
        order.append((turns[passage.document], passage))
    found = (_example(passage, pool, ngrams) for _, passage in sorted(order, key=lambda entry: entry[0]))
    return list(itertools.islice(filter(None, found), count))


def _passages(text: str, document: int) -> Iterator[_Passage]:
    """Yield contexts that begin and end with sentences, without overlap, and the text that follows each."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    starts = [end for end in ends if text[end : end + 1].isalpha() and not text[end].islower()]
    begin = 0
    for start in starts:
        if start < begin + CONTEXT:
            continue
        if start > begin + LONGEST_CONTEXT:
            begin = start
            continue
        if ending := _ending(text, start):
            context = text[begin:start].rstrip()
            yield _Passage(document, context, ending, _hash(f"{context}\0{ending}"))
            begin = next((later for later in starts if later >= start + ENDING + TOLERANCE), len(text))


def _example(passage: _Passage, pool: list[_Passage], ngrams: dict[int, np.ndarray]) -> Example | None:
    right, own, wrong = passage.ending, ngrams[passage.document], dict[int, str]()
    size = len(right.encode())
    for draw in range(_DRAWS):
        other = pool[_hash(f"{passage.key}:{draw}") % len(pool)]
        if other.document in (passage.document, *wrong) or other.ending in (right, *wrong.values()):
            continue
        if abs(len(other.ending.encode()) - size) > BYTE_TOLERANCE * size:
            continue
        smaller, larger = sorted((own, ngrams[other.document]), key=len)
        version = _common(smaller, larger) > _SHARED_DOCUMENT * len(smaller)
        if version or _common(_ngrams(other.ending), own):  # the right document contains one of its n-grams
            continue
        wrong[other.document] = other.ending
        if len(wrong) == ENDINGS - 1:
            break
    else:
        return None
    label = _hash(f"{passage.key}") % ENDINGS
    endings, documents = list(wrong.values()), list(wrong)
    endings.insert(label, right)
    documents.insert(label, passage.document)
    return Example(passage.context, endings, label, documents)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _ending(text: str, start: int) -> str | None:
    """Return the text from `start` to the end of a word after about `ENDING` characters; None if no word ends there."""
    for distance in range(TOLERANCE + 1):
        for end in (start + ENDING - distance, start + ENDING + distance):
            if end > len(text) or text[end - 1] == " ":
                continue
            if text[end : end + 1] in ("", " ") or _IDEOGRAPH.match(text[end - 1]):
                return text[start:end]
    return None


def _ngrams(text: str) -> np.ndarray:
    """Return the hashes of all runs of `_SHARED_WORDS` words, sorted and without repetitions."""
    found = list(ngram_hashes(text, _SHARED_WORDS))
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)


def _common(smaller: np.ndarray, larger: np.ndarray) -> int:
    """Return how many hashes two sorted arrays without repetitions share; fast if the first is much smaller."""
    if not larger.size:
        return 0
    places = np.searchsorted(larger, smaller)
    return int(np.count_nonzero(larger[np.minimum(places, larger.size - 1)] == smaller))

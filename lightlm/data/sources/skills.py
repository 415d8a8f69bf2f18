"""A built-in source of conversations: small skills that a tiny model learns in minutes, generated on this machine.

Copying, reversing, counting, adding, and looking up what a text says. Every question has one right answer. A tenth of
all questions, by their hash, is held out: the source does not have them, so answers to them show what was learned.

Looking up needs attention by content: find a word's earlier occurrence, and write what follows there. It is learned
late, suddenly, and by the number of such predictions. Hence long copies that begin at a given word, in which every word
is such a prediction, and several questions about one text.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial

import xxhash

from lightlm.data.chat.conversation import Message, as_text
from lightlm.data.readers.texts import BadRecord, Texts, Unit, pack
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError

SKILLS_SOURCE = "skills"
CONVERSATIONS = 200_000
VERSION = 2  # of the questions; another one is another source
HELD_OUT = 10  # one question in so many
_TRIES = 20_000  # a skill with few questions may have fewer that are held out than somebody wants
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo"]
_COLORS = ["red", "blue", "green", "black", "white", "brown", "pink", "gray"]
_THINGS = ["hat", "cup", "car", "book", "lamp", "coat", "ball", "key", "bag", "kite", "pen", "drum"]
_WORDS = [*_NAMES, *_COLORS, *_THINGS, *_LETTERS]

Pair = tuple[str, str]  # question and answer


def _letters(rng: random.Random) -> list[str]:
    return rng.choices(_LETTERS, k=rng.randint(2, 6))


def _copy(rng: random.Random) -> Pair:
    letters = " ".join(_letters(rng))
    return f"Copy: {letters}", letters


def _copy_from(rng: random.Random) -> Pair:
    words = rng.sample(_WORDS, rng.randint(4, 20))
    start = rng.randrange(len(words) // 2)
    return f"Copy from {words[start]}: {' '.join(words)}", " ".join(words[start:])


def _reverse(rng: random.Random) -> Pair:
    letters = _letters(rng)
    return f"Reverse: {' '.join(letters)}", " ".join(reversed(letters))


def _count(rng: random.Random) -> Pair:
    letters = rng.choices("abc", k=rng.randint(2, 7))
    wanted = rng.choice("abc")
    return f"How many {wanted} are in: {' '.join(letters)}", str(letters.count(wanted))


def _add(rng: random.Random) -> Pair:
    first, second = rng.randint(0, 20), rng.randint(0, 20)
    return f"What is {first} + {second}?", str(first + second)


def _facts(rng: random.Random) -> tuple[str, list[Pair]]:
    """Return a text, and all questions about it with their answers, in random order."""
    count = rng.randint(2, 6)
    pairs = zip(rng.sample(_COLORS, count), rng.sample(_THINGS, count), strict=True)
    things = {color: f"a {color} {thing}" for color, thing in pairs}
    *most, last = things.values()
    asked = [(f"What is {color}?", thing) for color, thing in things.items()]
    rng.shuffle(asked)
    return f"{rng.choice(_NAMES)} has {', '.join(most)} and {last}.", asked


def _look_up(rng: random.Random) -> Pair:
    text, asked = _facts(rng)
    question, answer = asked[0]
    return f"{text} {question}", answer


SKILLS: dict[str, Callable[[random.Random], Pair]] = {
    "copy": _copy, "copy from": _copy_from, "reverse": _reverse, "count": _count, "add": _add, "look up": _look_up,
}  # fmt: skip
_LOOK_UP_SHARE = 0.4  # of the conversations
_SHARES = {"copy from": 3}  # of the others, 1 where nothing is said


class SkillsSource:
    """Conversations of one to four questions."""

    name = spec = SKILLS_SOURCE
    holds_conversations = True
    revision = fingerprint = f"version {VERSION}"
    description = f"{CONVERSATIONS:,} generated conversations: {', '.join(SKILLS)}"

    def units(self) -> Iterator[Unit]:
        yield Unit(SKILLS_SOURCE, _texts)


def open_skills(spec: str, text_column: str, row_filter: Filter | None) -> SkillsSource:
    """Return the source `skills`; see `lightlm.data.sources.base.Opener`."""
    if spec != SKILLS_SOURCE:
        raise DataError(f"{spec}: {SKILLS_SOURCE} has no configurations or revisions; write {SKILLS_SOURCE}")
    if row_filter is not None:
        raise DataError(f'--filter "{row_filter.text}": {SKILLS_SOURCE} has no columns to judge')
    return SkillsSource()


def held_out(skill: str, count: int) -> list[Pair]:
    """Return up to `count` different questions of a skill that the source does not have, with their answers."""
    return list(itertools.islice(_questions(partial(SKILLS[skill], random.Random(skill)), held_out=True), count))


def conversations() -> Iterator[list[Message]]:
    """Yield the conversations of the source, the same in every call."""
    rng = random.Random(VERSION)
    others = [name for name in SKILLS if name != "look up"]
    shares = [_SHARES.get(name, 1) for name in others]
    for _ in range(CONVERSATIONS):
        if rng.random() < _LOOK_UP_SHARE:
            yield _talk_about_facts(rng)
            continue
        talk: list[Message] = []
        for name in rng.choices(others, shares, k=rng.choice((1, 1, 2))):
            talk += _turn(*next(_questions(partial(SKILLS[name], rng), held_out=False)))
        yield talk


def _talk_about_facts(rng: random.Random) -> list[Message]:
    """Return a conversation of up to four questions about one text."""
    while True:
        text, asked = _facts(rng)
        known = [pair for pair in asked if not _is_held_out(f"{text} {pair[0]}")][: rng.randint(1, 4)]
        if known:
            (question, answer), *others = known
            return sum((_turn(*pair) for pair in others), _turn(f"{text} {question}", answer))


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _texts(bad: BadRecord) -> Iterator[Texts]:
    return pack(map(as_text, conversations()))


def _questions(ask: Callable[[], Pair], *, held_out: bool) -> Iterator[Pair]:
    """Yield questions that are held out, each once, or others."""
    seen: set[str] = set()
    for _ in range(_TRIES):
        question, answer = ask()
        if _is_held_out(question) is held_out and question not in seen:
            seen.add(question)
            yield question, answer


def _is_held_out(question: str) -> bool:
    return xxhash.xxh3_64_intdigest(question.encode()) % HELD_OUT == 0

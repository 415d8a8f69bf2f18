"""A built-in source of conversations: small skills that a tiny model learns in minutes, generated on this machine.

Copying, reversing, counting, adding, and looking up what a text says. Every question has one right answer. A tenth of
all questions, by their hash, is held out: the source does not have them, so answers to them show what was learned.
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
CONVERSATIONS = 40_000
VERSION = 1  # of the questions; another one is another source
HELD_OUT = 10  # one question in so many
_TRIES = 20_000  # a skill with few questions may have fewer that are held out than somebody wants
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo"]
_COLORS = ["red", "blue", "green", "black", "white", "brown", "pink", "gray"]
_THINGS = ["hat", "cup", "car", "book", "lamp", "coat", "ball", "key", "bag", "kite", "pen", "drum"]

Pair = tuple[str, str]  # question and answer


def _letters(rng: random.Random, letters: str = _LETTERS) -> list[str]:
    return rng.choices(letters, k=rng.randint(2, 6))


def _copy(rng: random.Random) -> Pair:
    letters = " ".join(_letters(rng))
    return f"Copy: {letters}", letters


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


def _look_up(rng: random.Random) -> Pair:
    names = rng.sample(_NAMES, rng.randint(2, 4))
    owned = [f"a {rng.choice(_COLORS)} {thing}" for thing in rng.sample(_THINGS, len(names))]
    facts = " ".join(f"{name} has {what}." for name, what in zip(names, owned, strict=True))
    wanted = rng.randrange(len(names))
    return f"{facts} What does {names[wanted]} have?", owned[wanted]


SKILLS: dict[str, Callable[[random.Random], Pair]] = {
    "copy": _copy, "reverse": _reverse, "count": _count, "add": _add, "look up": _look_up,
}  # fmt: skip


class SkillsSource:
    """Conversations of one or two questions."""

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
    for _ in range(CONVERSATIONS):
        talk: list[Message] = []
        for _ in range(rng.choice((1, 1, 2))):
            skill = rng.choice(list(SKILLS.values()))
            question, answer = next(_questions(partial(skill, rng), held_out=False))
            talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield talk


def _texts(bad: BadRecord) -> Iterator[Texts]:
    return pack(map(as_text, conversations()))


def _questions(ask: Callable[[], Pair], *, held_out: bool) -> Iterator[Pair]:
    """Yield questions that are held out, each once, or others."""
    seen: set[str] = set()
    for _ in range(_TRIES):
        question, answer = ask()
        if (xxhash.xxh3_64_intdigest(question.encode()) % HELD_OUT == 0) is held_out and question not in seen:
            seen.add(question)
            yield question, answer

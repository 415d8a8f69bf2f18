"""Guesses stop where they cost more than they make, by what is measured once and not by the clock."""

from dataclasses import replace

import pytest

from lightlm.generate import pace as pace_module
from lightlm.generate.batch import Batch, Request
from lightlm.generate.pace import Pace, round_costs
from lightlm.generate.sampling.draw import Row
from lightlm.generate.speculation import Draft, Lookup, Speculation
from lightlm.model.transformer import Transformer
from tests.generate.test_speculation import DRAWN, MODELS, decode
from tests.shapes import SHAPES, build


@pytest.fixture(autouse=True)
def _remembered_here(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def rounds(pace: Pace, tokens: int, count: int, guesses: int = 4) -> list[bool]:
    """What happens in so many steps if each round of guesses makes this many tokens."""
    made = []
    for _ in range(count):
        made.append(pace.guesses)
        if pace.guesses:
            pace.note_round(guesses, tokens)
        else:
            pace.note_plain()
    return made


def test_guesses_that_are_faster_go_on_and_slower_ones_pause_ever_longer() -> None:
    assert all(rounds(Pace([2.0]), tokens=3, count=300))
    slower = rounds(Pace([2.0]), tokens=1, count=3000)
    assert 0 < sum(slower) < 3000 / 50
    assert sum(slower[-1000:]) < sum(slower[:1000])


def test_dear_guesses_are_judged_before_the_trial_is_over_and_cost_little_in_the_long_run() -> None:
    assert rounds(Pace([3.0]), tokens=1, count=40)[:3] == [True, True, False]
    for cost in (1.05, 1.3, 2.0, 3.0, 6.0):
        tried = sum(rounds(Pace([cost]), tokens=1, count=2000))
        assert 0 < tried * (cost - 1) < 0.03 * 2000


def test_cheap_guesses_soon_get_another_trial() -> None:
    pace = Pace([1.05])
    rounds(pace, 1, 12)
    assert all(rounds(pace, 3, 60)[-50:])


def test_guesses_that_become_slower_pause_and_come_back() -> None:
    pace = Pace([2.0])
    rounds(pace, 4, 100)
    assert not all(rounds(pace, 1, 60))
    assert all(rounds(pace, 4, 600)[-50:])


def test_a_round_costs_what_its_number_of_guesses_costs() -> None:
    assert all(rounds(Pace([1.1, 5.0]), tokens=2, count=100, guesses=1))
    assert not all(rounds(Pace([1.1, 5.0]), tokens=2, count=100, guesses=2))
    assert not all(rounds(Pace([1.1, 5.0]), tokens=2, count=100, guesses=9))


class Wrong:
    """Guesses that are wrong, and after how many tokens they were asked for."""

    facts = "wrong"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def guess(self, row: Row, count: int) -> list[int]:
        self.asked.append(len(row.new))
        return [96] * count


def test_wrong_guesses_stop_after_a_few_rounds_and_the_text_is_that_without() -> None:
    """The rounds are the same each time: they depend on the text and the costs, not on the clock."""
    model = MODELS["llama"]
    request = Request([5, 9, 2], 44, replace(DRAWN, min_new_tokens=44), seed=3)
    plain = [token.id for token in decode(model, request)]
    for _ in range(2):
        wrong = Wrong()
        batch = Batch(model, 1, speculation=Speculation(wrong, 4, Pace([2.0])), vocab_size=90)
        batch.join([request])
        found = []
        while batch:
            found += [token.id for token in batch.step()]
        assert found == plain
        assert wrong.asked == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["llama", "gpt3", "moe"])
def test_costs_are_measured_once_for_each_guesser(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]
    lookup, draft = round_costs(model, Lookup(), 3), round_costs(model, Draft(build(name, seed=1), 90), 3)
    assert len(lookup) == len(draft) == 3
    assert min(lookup + draft) > 0
    assert draft[2] > lookup[2]  # a draft of the model's size takes as long for a guess as the model for a token
    monkeypatch.setattr(pace_module, "_measure", lambda *_: pytest.fail("measured again"))
    assert round_costs(model, Lookup(), 3) == lookup
    assert round_costs(model, Draft(build(name, seed=2), 90), 3) == draft


def test_a_context_without_room_for_guesses_costs_more_than_they_make() -> None:
    small, tiny = (Transformer(replace(SHAPES["llama"], max_seq_len=size)).eval() for size in (5, 2))
    assert len(round_costs(small, Lookup(), 8)) == 3
    assert not all(rounds(Pace(round_costs(tiny, Lookup(), 8)), 1, 30))

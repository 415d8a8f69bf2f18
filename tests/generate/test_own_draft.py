"""A model's own head guesses what a plain pass over the whole text says, and the text stays that of plain decoding."""

import pytest
import torch

from lightlm.generate.batch import Batch, Request
from lightlm.generate.own_draft import OwnDraft
from lightlm.generate.pace import round_costs
from lightlm.generate.sampling import GREEDY
from lightlm.generate.sampling.draw import Row
from lightlm.generate.speculation import Speculation
from lightlm.model.transformer import Transformer
from tests.generate.test_speculation import DRAWN, Always, assert_same, decode
from tests.shapes import SHAPES


def with_head(name: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(SHAPES[name], 1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Recorded(OwnDraft):
    """Keeps what it guessed after which text."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model, model, 97)
        self.guesses: list[tuple[list[int], list[int]]] = []

    def guess(self, row: Row, count: int) -> list[int]:
        found = super().guess(row, count)
        self.guesses.append(([*row.prompt, *row.new], found))
        return found


def expected(model: Transformer, ids: list[int]) -> list[int]:
    """The likeliest token of the head in a plain pass over the whole text."""
    states: list[torch.Tensor] = []
    with torch.no_grad():
        model.hidden_states(torch.tensor([ids]), mtp_states=states)
        return [int(model.head(states[0][0, -2]).argmax())]


@pytest.mark.parametrize("name", SHAPES)
def test_guesses_are_those_of_a_plain_pass(name: str) -> None:
    model = with_head(name)
    draft = Recorded(model)
    tokens = decode(model, Request([5, 9, 2, 7], 20, GREEDY), draft, count=4)
    assert len(tokens) == 20
    assert len(draft.guesses) >= 9
    for ids, found in draft.guesses:
        assert found == expected(model, ids)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["llama", "gpt3", "moe", "deepseek"])
def test_the_text_is_that_of_plain_decoding(name: str, sampling: object) -> None:
    model = with_head(name)
    draft = OwnDraft(model, model, 90)
    for seed in range(3):  # one after the other
        request = Request([3, 4, 5, 6, seed], 40, sampling, seed, stop_ids={7})
        assert_same(decode(model, request, draft), decode(model, request))


def test_a_row_that_was_not_alone_is_guessed_for_later() -> None:
    model = with_head("llama")
    first, second = Request([3, 4, 5], 30, DRAWN, 1), Request([6, 7], 4, DRAWN, 2)
    plain = [[token.id for token in decode(model, request)] for request in (first, second)]
    speculation = Speculation(OwnDraft(model, model, 90), 1, Always())
    batch = Batch(model, 2, speculation=speculation, vocab_size=90)
    handles = batch.join([first, second])
    made: dict[int, list[int]] = {handle: [] for handle in handles}
    while batch:
        for token in batch.step():
            made[token.handle].append(token.id)
    assert list(made.values()) == plain


def test_columns_that_do_not_follow_begin_anew() -> None:
    model = with_head("llama")
    draft = OwnDraft(model, model, 97)
    row = Row(GREEDY, prompt=[5, 9, 2, 7, 1], new=[3])
    assert draft.guess(row, 1) == []  # no states yet
    with torch.no_grad():
        x_TD = model.hidden_states(torch.tensor([list(row.prompt)]))[0]
    draft.follow(row, 0, x_TD[:2])
    assert draft.guess(row, 1) == []  # not all
    draft.follow(row, 3, x_TD[3:])
    assert len(draft.guess(row, 1)) == 1
    draft.follow(row, 0, x_TD)
    assert draft.guess(row, 1) == expected(model, [*row.prompt, *row.new])


def test_a_round_is_measured_with_the_head() -> None:
    model = with_head("qwen3")
    [cost] = round_costs(model, OwnDraft(model, model, 97), 1)
    assert cost > 1

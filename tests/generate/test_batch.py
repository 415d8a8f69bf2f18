"""Rows that join and leave a batch at any step get what the plain full forward pass gives them alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.errors import LightLMError, UsageError
from lightlm.generate import batch as batch_module
from lightlm.generate.batch import Batch, NewToken, Request
from lightlm.generate.sampling import GREEDY, Sampling
from lightlm.model.transformer import Transformer
from tests.shapes import SHAPES, build

MODELS = {name: build(name) for name in SHAPES}
DRAWN = Sampling(temperature=1.5, top_p=1.0)


def run(batch: Batch) -> dict[int, list[NewToken]]:
    """The tokens of each handle until the batch is empty."""
    made: dict[int, list[NewToken]] = {}
    while batch:
        for token in batch.step():
            made.setdefault(token.handle, []).append(token)
    return made


def alone(model: Transformer, request: Request) -> list[NewToken]:
    batch = Batch(model, 1)
    batch.join([request])
    [tokens] = run(batch).values()
    return tokens


@torch.no_grad()
def assert_is_plain(model: Transformer, request: Request, tokens: list[NewToken]) -> None:
    """Each greedy token is the most likely one by a full forward pass over all tokens before it, and so its value."""
    ids = list(request.ids)
    for token in tokens:
        log_probs_V = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert token.log_probs.chosen == pytest.approx(log_probs_V.max().item(), abs=2e-4)
        assert token.log_probs.chosen == pytest.approx(log_probs_V[token.id].item(), abs=2e-4)
        assert [value for _, value in token.log_probs.top] == pytest.approx(
            log_probs_V.topk(3).values.tolist(), abs=2e-4
        )
        ids.append(token.id)


prompts = st.lists(st.integers(0, 96), min_size=1, max_size=30)
requests = st.builds(
    Request, prompts, st.integers(1, 8), st.just(GREEDY), stop_ids=st.sets(st.integers(0, 96)), logprobs=st.just(3)
)
# Before each step, either requests join, or the row with a number leaves.
events = st.lists(st.one_of(st.none(), st.lists(requests, max_size=3), st.integers(0, 9)), max_size=9)


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=20)
@given(events=events, prefill_tokens=st.sampled_from([None, 1, 7, 64]), fast=st.booleans())
def test_rows_that_join_and_leave_at_any_step_are_held_to_the_full_forward_pass(name, events, prefill_tokens, fast):
    model, sent, made, left = MODELS[name], {}, {}, set()
    batch = Batch(model, 6, prefill_tokens, fast=fast)

    def step() -> None:
        expected = bool(batch)
        tokens = batch.step()
        assert bool(tokens) == expected, "a step with requests makes tokens"
        assert not {token.handle for token in tokens} & left, "a row that left makes no more"
        for token in tokens:
            made.setdefault(token.handle, []).append(token)

    for event in events:
        if isinstance(event, list):
            joining = event[: batch.free]
            sent |= dict(zip(batch.join(joining), joining, strict=True))
        elif event is not None:
            batch.leave(event)
            left |= {event} & set(sent)
        assert len(batch) + batch.free == 6
        step()
    while batch:
        step()
    for handle, request in sent.items():
        tokens = made.get(handle, [])
        assert_is_plain(model, request, tokens)
        assert all(token.finish_reason is None for token in tokens[:-1])
        if handle in left:
            continue
        last, full = tokens[-1], len(request.ids) + len(tokens) - 1 == model.config.max_seq_len
        if last.finish_reason == "stop":
            assert last.id in request.stop_ids
        else:
            assert last.finish_reason == ("length" if len(tokens) == request.max_new_tokens else "context")
            assert full or last.finish_reason == "length"
        assert not {token.id for token in tokens[:-1]} & set(request.stop_ids)


def test_draws_depend_on_seed_and_sample_only():
    model = MODELS["moe"]
    asked = [Request([4, 5, 6][: 1 + n % 3], 9, DRAWN if n % 2 else GREEDY, seed=n // 2, sample=n) for n in range(5)]
    expected = [[token.id for token in alone(model, request)] for request in asked]
    batch = Batch(model, 5, prefill_tokens=2)
    handles, made = batch.join(asked[3:]), {}
    for number in (2, 1, 0):
        for token in batch.step():
            made.setdefault(token.handle, []).append(token.id)
        handles[:0] = batch.join([asked[number]])
    for handle, tokens in run(batch).items():
        made.setdefault(handle, []).extend(token.id for token in tokens)
    assert [made[handle] for handle in handles] == expected
    first, second = (
        [token.id for token in alone(model, Request([4], 20, DRAWN, seed=1, sample=sample))] for sample in (0, 1)
    )
    assert first != second


def test_a_long_prompt_is_read_in_pieces_while_others_run():
    model = MODELS["llama"]
    batch = Batch(model, 2, prefill_tokens=8)
    [short] = batch.join([Request([1], 20, GREEDY)])
    batch.step()
    [long] = batch.join([Request([3] * 40, 2, GREEDY)])
    steps = [[token.handle for token in batch.step()] for _ in range(5)]
    assert steps == [[short]] * 4 + [[short, long]]


def test_no_piece_of_a_prompt_is_longer_than_stated(monkeypatch: pytest.MonkeyPatch):
    model, widths = build("llama"), []
    monkeypatch.setattr(batch_module, "_PIECE", 16)
    plain = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda x, *rest: widths.append(x.numel()) or plain(x, *rest))
    asked = [Request([7] * length, 3, GREEDY) for length in (40, 3, 5, 9, 1)]
    batch = Batch(model, 5, fast=False)
    batch.join(asked)
    made = [[token.id for token in tokens] for _, tokens in sorted(run(batch).items())]
    assert max(widths) <= 16
    monkeypatch.undo()
    assert made == [[token.id for token in alone(model, request)] for request in asked]


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch):
    model, read = build("qwen3"), []
    plain = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda x, *rest: read.append(tuple(x.shape)) or plain(x, *rest))
    batch = Batch(model, 4, fast=False)
    batch.join([Request([1, 2, 3], 2, DRAWN, sample=sample) for sample in range(4)])
    run(batch)
    assert read == [(1, 3), (4, 1)]


def test_the_cache_holds_no_more_than_requests_may_use_and_is_freed_at_the_end():
    model = MODELS["llama"]
    batch, shapes = Batch(model, 3), []
    batch.join([Request([1] * 9, 30, GREEDY), Request([2], 3, GREEDY)])
    while batch:
        batch.step()
        shapes.append(batch._cache.room)
    assert max(rows for rows, _ in shapes) == 2
    assert max(slots for _, slots in shapes) == 9 + 30 - 1
    assert batch._cache.keys.untyped_storage().nbytes() == 0


def test_weights_that_change_between_requests_count():
    model = build("llama")
    batch = Batch(model, 1)
    for _ in range(2):
        request = Request([5, 6], 6, GREEDY, logprobs=3)
        batch.join([request])
        [tokens] = run(batch).values()
        assert_is_plain(model, request, tokens)
        with torch.no_grad():
            model.blocks[0].mlp.up_proj.weight.mul_(-2)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    batch = Batch(MODELS["llama"], 2)
    [handle] = batch.join([Request([1], 3)])
    with pytest.raises(LightLMError, match=r"49 tokens.*48"):
        batch.join([Request([1] * 49, 3)])
    with pytest.raises(UsageError, match="2 requests for 1 free row"):
        batch.join([Request([1], 3), Request([2], 3)])
    assert batch.free == 1
    batch.leave(handle)
    batch.leave(99)
    assert batch.free == 2
    assert batch.step() == []
    with pytest.raises(UsageError, match="at least 1 row"):
        Batch(MODELS["llama"], 0)


def test_an_id_without_a_row_is_refused_and_leaves_the_others_alone():
    model = MODELS["llama"]
    batch, request = Batch(model, 4), Request([1, 2, 3], 4, GREEDY)
    batch.join([request])
    with pytest.raises(LightLMError, match="the prompt has the token 97, but the model's embedding has 97 rows"):
        batch.join([Request([1], 4, GREEDY), Request([3, 97], 4, GREEDY)])
    assert list(run(batch).values()) == [alone(model, request)]

import pytest
import torch

from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.engine import generate, sample_text
from lightlm.generate.sampling import GREEDY, Sampling
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from tests.generate.tokenizers_at_hand import tokenizer_of
from tests.shapes import SHAPES, build

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [11, 12]]
DRAWN = Sampling(temperature=1.5, top_p=1.0)


@torch.no_grad()
def greedy_without_cache(model: Transformer, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone_and_without_a_cache(shape: str) -> None:
    model = build(shape)
    together = [completion.ids for completion in generate(model, PROMPTS, 12, GREEDY)]
    assert together == [generate(model, [prompt], 12, GREEDY)[0].ids for prompt in PROMPTS]
    assert together == [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]


def test_a_row_that_stops_leaves_the_others_unchanged() -> None:
    model = build("llama")
    free = [completion.ids for completion in generate(model, PROMPTS, 10, GREEDY)]
    stop = free[0][3]
    stopped = generate(model, PROMPTS, 10, GREEDY, stop_ids={stop})
    for full, completion in zip(free, stopped, strict=True):
        if stop in full:
            assert (completion.ids, completion.finish_reason) == (full[: full.index(stop)], "stop")
        else:
            assert (completion.ids, completion.finish_reason) == (full, "length")
    assert stopped[0].finish_reason == "stop"


def test_the_end_of_the_context_ends_a_row_with_its_reason() -> None:
    model = build("gpt2")
    context = model.config.max_seq_len
    long, short = generate(model, [[3] * context, [3] * (context - 4)], 20, GREEDY)
    # The last token of a full context still predicts one more.
    assert (len(long.ids), long.finish_reason) == (1, "context")
    assert (len(short.ids), short.finish_reason) == (5, "context")


def test_samples_do_not_depend_on_how_many_there_are() -> None:
    model = build("qwen3")
    five = [completion.ids for completion in generate(model, [[4, 5]], 9, DRAWN, seed=3, num_samples=5)]
    two = [completion.ids for completion in generate(model, [[4, 5]], 9, DRAWN, seed=3, num_samples=2)]
    assert five[:2] == two
    assert len({tuple(ids) for ids in five}) > 1
    other = [completion.ids for completion in generate(model, [[4, 5]], 9, DRAWN, seed=4, num_samples=5)]
    assert not {tuple(ids) for ids in five} & {tuple(ids) for ids in other}


def test_on_token_sees_every_token_and_can_end_a_row() -> None:
    model = build("llama")
    seen: dict[int, list[int]] = {0: [], 1: []}

    def on_token(row: int, token: int) -> bool:
        seen[row].append(token)
        return row == 0 and len(seen[0]) == 3

    first, second = generate(model, PROMPTS[:2], 6, GREEDY, on_token=on_token)
    assert (first.ids, first.finish_reason) == (seen[0], "stop")
    assert (second.ids, second.finish_reason) == (seen[1], "length")
    assert [len(first.ids), len(second.ids)] == [3, 6]


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(LightLMError, match=r"49 tokens.*48"):
        generate(build("llama"), [[1], [1] * 49], 5, GREEDY)
    with pytest.raises(LightLMError, match="end-of-text"):
        generate(build("llama"), [[]], 5, GREEDY)
    with pytest.raises(UsageError, match="max-new-tokens"):
        generate(build("llama"), [[1]], 0, GREEDY)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, naïve déjà vu 日本語 🙂🙃 " * 3, "don't — 'stop' it"], 400)


@pytest.mark.parametrize("training", [True, False])
def test_sample_text_leaves_mode_and_global_randomness_alone(tokenizer: Tokenizer, training: bool) -> None:
    model = Transformer(
        ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_seq_len=32, vocab_size=tokenizer.vocab_size)
    ).train(training)
    before = torch.get_rng_state()
    texts = [sample_text(model, tokenizer, prompt, 8, 1, DRAWN) for prompt in ("the cat", "the cat", "")]
    assert texts[0] == texts[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("begins_with", [None, "<s>"])
def test_a_sample_is_what_decoding_prompt_and_answer_together_adds(begins_with: str | None) -> None:
    """Also with sentencepiece's spaces, and after the token that an imported model expects before a text."""
    tokenizer = tokenizer_of("metaspace", begins_with)
    shape = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_seq_len=32, vocab_size=tokenizer.vocab_size)
    model = Transformer(shape).eval()
    prompt = ([] if begins_with is None else [tokenizer.bos_id]) + tokenizer.encode("one two")
    ends, size = tokenizer.end_ids, tokenizer.vocab_size
    [answer] = generate(model, [prompt], 8, GREEDY, 1, ends, vocab_size=size)
    expected = tokenizer.decode(prompt + answer.ids)
    assert "one two" + sample_text(model, tokenizer, "one two", 8, 1, GREEDY) == expected
    every = {"eos_token_id": list(range(size))}  # each token ends a text
    ended = tokenizer.used_as(tokenizer.bos_id, tokenizer.adds_bos, {}, every)
    assert sample_text(model, ended, "one two", 8, 1, GREEDY) == ""

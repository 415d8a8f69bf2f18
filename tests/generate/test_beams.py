"""Beam search against all continuations, and against transformers."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.beams import Beam, beam_search
from lightlm.generate.engine import generate
from lightlm.generate.sampling import GREEDY, Sampling
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from tests.convert.models import loaded
from tests.shapes import SHAPES, build

STOP = 3


@pytest.fixture(scope="module")
def tiny() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(num_layers=2, hidden_size=16, num_heads=2, max_seq_len=32, vocab_size=5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def all_continuations(model: Transformer, prompt: list[int], length: int, penalty: float) -> list[Beam]:
    found = []
    for count in range(length):
        for ids in itertools.product([token for token in range(5) if token != STOP], repeat=count):
            for last in [STOP] if count < length - 1 else range(5):
                new = [*ids, last]
                log_probs = model(torch.tensor([prompt + new]))[0].double().log_softmax(-1)
                total = sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(new))
                stopped = last == STOP
                score = total / len(new) ** penalty
                found.append(Beam(list(ids) if stopped else new, "stop" if stopped else "length", score))
    return sorted(found, key=lambda beam: -beam.score)


@pytest.mark.parametrize("penalty", [0.0, -1.0])
def test_a_search_as_wide_as_all_continuations_finds_the_best(tiny: Transformer, penalty: float) -> None:
    # With these penalties no running beam gains from more tokens, so that the search ends when it may.
    expected = all_continuations(tiny, [1, 2], 4, penalty)
    found = beam_search(tiny, [1, 2], 4**4, 4, length_penalty=penalty, stop_ids={STOP})
    assert [(beam.ids, beam.finish_reason) for beam in found[:20]] == [
        (beam.ids, beam.finish_reason) for beam in expected[:20]
    ]
    assert [beam.score for beam in found[:20]] == pytest.approx([beam.score for beam in expected[:20]], abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_beam_is_greedy_decoding(shape: str) -> None:
    model = build(shape)
    [greedy] = generate(model, [[5, 9, 2]], 12, GREEDY)
    [beam] = beam_search(model, [5, 9, 2], 1, 12)
    assert (beam.ids, beam.finish_reason) == (greedy.ids, "length")


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({}, GREEDY),
        ({"length_penalty": 0.0}, GREEDY),
        ({"length_penalty": 2.0, "num_beams": 6}, GREEDY),
        ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, Sampling(repetition_penalty=1.3, no_repeat_ngram=2)),
        ({"min_new_tokens": 6}, Sampling(min_new_tokens=6)),
    ],
)
def test_beams_are_those_of_transformers(exported: tuple[Transformer, Path], settings: dict, ours: Sampling) -> None:
    transformers = pytest.importorskip("transformers")
    model, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    beams, stops = settings.get("num_beams", 4), [7, 11, 23, *range(100, 140)]
    for prompt in ([5, 9, 2], [40, 41], [3] * 8):
        expected = theirs.generate(
            torch.tensor([prompt]),
            **{"num_beams": beams} | settings,
            num_return_sequences=beams,
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        penalty = settings.get("length_penalty", 1.0)
        found = beam_search(model, prompt, beams, 10, ours, penalty, stops)
        texts = [
            list(itertools.takewhile(lambda id: id not in stops, ids[len(prompt) :]))
            for ids in expected.sequences.tolist()
        ]
        assert [beam.ids for beam in found] == texts
        assert [beam.score for beam in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    tokenizer = train_tokenizer(["the cat sat on the mat " * 9], 300)
    model = loaded(replace(SHAPES["llama"], vocab_size=300), tokenizer)
    export_huggingface(model, folder)
    return model.model, folder


def test_the_end_of_the_context_ends_all_beams() -> None:
    model = build("gpt2")
    context = model.config.max_seq_len
    found = beam_search(model, [3] * (context - 2), 3, 20)
    assert [(len(beam.ids), beam.finish_reason) for beam in found] == [(3, "context")] * 3
    assert len({tuple(beam.ids) for beam in found}) == 3


def test_ids_beyond_the_tokenizer_are_left_out() -> None:
    model = build("qwen3")
    assert all(max(beam.ids) < 20 for beam in beam_search(model, [4], 5, 6, vocab_size=20))


def test_wrong_numbers_are_refused() -> None:
    model = build("llama")
    for arguments, words in (
        ((0, 5), "beams"),
        ((2, 0), "max-new-tokens"),
        ((2, 5, GREEDY, math.nan), "length-penalty"),
        ((2, 5, GREEDY, 400.0), "length-penalty must be from -10 to 10, is 400.0"),
        ((2, 5, GREEDY, -400.0), "length-penalty"),
        ((2, 2.5, GREEDY), "max-new-tokens must be a whole number"),
    ):
        with pytest.raises(UsageError, match=words):
            beam_search(model, [1], *arguments)
    with pytest.raises(LightLMError, match="context"):
        beam_search(model, [1] * 60, 2, 5)


def test_an_id_without_a_row_is_refused(tiny):
    with pytest.raises(LightLMError, match="the prompt has the token 5, but the model's embedding has 5 rows"):
        beam_search(tiny, [1, 5], 3, 2)

"""`import lightlm`: the Python API beside the commands and an independent formula."""

import math
import subprocess
import sys

import pytest
import torch

import lightlm
from lightlm import checkpoint
from lightlm.errors import CheckpointError, UsageError
from tests.evaluate.tiny_run import tiny_model, tiny_tokenizer

TEXTS = ["The cat sat on the mat.", "", "A dog ran after the cat; the cat ran faster. " * 6, "naïve Ω"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    path = tmp_path_factory.mktemp("api") / "model"
    checkpoint.save_model(path, tiny_model(tokenizer), tokenizer)
    return path


@pytest.fixture
def model(folder):
    return lightlm.load(folder, device="cpu")


def test_import_loads_no_torch():
    code = "import sys, lightlm; lightlm.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there_whatever_was_imported_before():
    import lightlm.evaluate.runner
    import lightlm.train.trainer

    for name in lightlm.__all__:
        assert callable(getattr(lightlm, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lightlm.nothing  # noqa: B018


def test_logits_are_the_models(model):
    ids = model.tokenizer.encode(TEXTS[0])
    expected = model.transformer(torch.tensor([ids]))[0].float()
    assert torch.equal(model.logits(TEXTS[0]), expected)
    assert torch.equal(model.logits(ids), expected)
    assert model.logits(ids).shape == (len(ids), model.config.vocab_size)


@pytest.mark.parametrize("ids", [[], [1] * 41])
def test_logits_refuse_what_the_context_cannot_hold(model, ids):
    with pytest.raises(UsageError, match=r"1 to 40 tokens, got (0|41)"):
        model.logits(ids)


@torch.no_grad()
def test_scores_are_the_sum_of_the_tokens_log_probabilities(model):
    """In float64: windows of the context's length, of which the last sees the tokens before it."""
    length, start = model.config.max_seq_len, model.tokenizer.end_of_text_id
    for text, got in zip(TEXTS, model.score(TEXTS), strict=True):
        ids, total = [start, *model.tokenizer.encode(text)], 0.0
        for first in range(0, len(ids) - 1, length):
            end = min(first + length, len(ids) - 1)
            window = torch.tensor([ids[max(end - length, 0) : end + 1]])
            log_probs = model.transformer(window[:, :-1]).double().log_softmax(-1)
            total += float(log_probs[0].gather(1, window[0, 1:, None])[first - end :].sum())
        assert got.log_likelihood == pytest.approx(total, rel=1e-5)
        assert (got.tokens, got.text_bytes) == (len(ids) - 1, len(text.encode()))
        if text:
            assert got.bits_per_byte == pytest.approx(-total / math.log(2) / len(text.encode()), rel=1e-5)
            assert got.nats_per_token == pytest.approx(-total / (len(ids) - 1), rel=1e-5)
        else:
            assert math.isnan(got.bits_per_byte)


def test_scores_are_those_of_lm_evals_tasks(model):
    from lm_eval.api.instance import Instance

    from lightlm.evaluate.harness import LightLM

    harness = LightLM(model._loaded, show_progress=False)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    expected = harness.loglikelihood_rolling(requests)
    assert [score.log_likelihood for score in model.score(TEXTS)] == pytest.approx(expected, rel=1e-6)


def test_score_of_a_bare_string_is_refused(model):
    with pytest.raises(UsageError, match=r"score\(\[text\]\)"):
        model.score("one text")


def test_generate_repeats_itself_and_takes_the_most_likely_token(model):
    settings = {"max_new_tokens": 12, "seed": 3}
    assert model.generate("The cat", **settings) == model.generate("The cat", **settings)
    assert model.samples("The cat", 2, 12, seed=3)[0] == model.generate("The cat", **settings)
    ids = model.tokenizer.encode("The cat")
    for _ in range(5):
        ids.append(int(model.logits(ids)[-1].argmax()))
    greedy = model.generate("The cat", max_new_tokens=5, temperature=0)
    assert model.tokenizer.decode(ids[-5:]).startswith(greedy)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_generate_refuses_settings_out_of_range(model, settings):
    with pytest.raises(UsageError):
        model.generate("The", **settings)


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no model at"):
        lightlm.load(tmp_path / "nothing")

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from lightlm.checkpoint import LoadedModel
from lightlm.device import pick_dtype
from lightlm.errors import LightLMError, UsageError
from lightlm.evaluate.harness import LightLM, _Lines
from tests.evaluate.tiny_run import tiny_model, tiny_tokenizer, write_world

CONTEXTS = [("The cat sat", " on the mat"), ("The cat sat ", "after"), ("", "naïve"), ("The cat " * 30, "ran faster")]
LONG = "The dog ran after the naïve cat, and the cat ran. " * 8


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm() -> LightLM:
    tokenizer = tiny_tokenizer()
    return LightLM(LoadedModel(tiny_model(tokenizer), tokenizer, Path("tiny")))


@torch.no_grad()
def test_a_document_is_scored_once_per_token_in_windows_of_the_context(lm: LightLM) -> None:
    tokens = lm.tok_encode(LONG)
    assert len(tokens) > 2 * lm.max_length
    total, before = 0.0, [lm.eot_token_id, *tokens]
    for start in range(0, len(tokens), lm.max_length):
        targets = tokens[start : start + lm.max_length]
        # The last window is as long as the others and scores only what they left.
        inputs = before[: start + len(targets)][-lm.max_length :]
        logits = lm.model(torch.tensor([inputs]))[0].double()[-len(targets) :]
        total += float(logits.log_softmax(-1)[range(len(targets)), targets].sum())
    [actual, empty] = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(LONG,), ("",)]))
    assert actual == pytest.approx(total, abs=1e-3)
    assert empty == 0.0


@torch.no_grad()
@pytest.mark.parametrize("context", ["The cat", "The cat" + " sat" * 40])
def test_an_answer_longer_than_the_models_context_is_scored_in_windows(lm: LightLM, context: str) -> None:
    prompt = lm.tok_encode(context)
    answer = lm.tok_encode(f"{context} {LONG}")[len(prompt) :]
    assert len(answer) > 2 * lm.max_length
    # Each token of the answer after at least half a context of what precedes it, as far as there is so much.
    total, half = 0.0, (lm.max_length + 1) // 2
    for start in range(0, len(answer), half):
        targets = answer[start : start + half]
        inputs = [*prompt, *answer][: len(prompt) + start + len(targets) - 1][-lm.max_length :]
        logits = lm.model(torch.tensor([inputs]))[0].double()[-len(targets) :]
        total += float(logits.log_softmax(-1)[range(len(targets)), targets].sum())
    lm.begin("long")
    pairs = [(context, f" {LONG}"), ("The cat", " sat")]
    (nats, greedy), short = lm.loglikelihood(instances("loglikelihood", pairs))
    assert nats == pytest.approx(total, abs=1e-3)
    assert not greedy
    assert short[0] == pytest.approx(lm.loglikelihood(instances("loglikelihood", pairs[1:]))[0][0], abs=1e-4)
    assert lm.truncation.cut == (len(prompt) + half > lm.max_length + 1)


def test_spaces_at_the_end_of_a_context_count_as_the_answers(lm: LightLM) -> None:
    moved, plain = lm.loglikelihood(instances("loglikelihood", [("The cat ", "sat"), ("The cat", " sat")]))
    assert moved == plain


def test_generation_ends_at_its_stop_strings_and_at_its_length(lm: LightLM) -> None:
    free = {"until": [], "max_gen_toks": 12}
    [text] = lm.generate_until(instances("generate_until", [("The cat", free)]))
    assert len(text) > 3
    stop = text[2:4]
    requests = [("The cat", {"until": [stop], "max_gen_toks": 12}), ("The cat", free), ("A dog ran", free)]
    stopped, again, other = lm.generate_until(instances("generate_until", requests))
    assert stopped == text.split(stop)[0]
    assert again == text
    assert other != text


def test_generation_ends_at_every_end_of_text_token_of_an_imported_model(lm: LightLM) -> None:
    request = instances("generate_until", [("The cat", {"until": [], "max_gen_toks": 12})])
    tokenizer = lm.loaded.tokenizer
    ends = {"eos_token_id": list(range(tokenizer.vocab_size))}
    imported = LoadedModel(lm.loaded.model, tokenizer.used_as(None, False, {}, ends), Path("tiny"))
    assert LightLM(imported).generate_until(request) == [""]


def test_generation_that_cannot_fit_the_context_is_refused(lm: LightLM) -> None:
    with pytest.raises(LightLMError, match="40"):
        lm.generate_until(instances("generate_until", [("The cat", {"until": [], "max_gen_toks": 40})]))


def test_lm_eval_builds_it_from_the_arguments_of_its_command(tmp_path: Path) -> None:
    loaded = write_world(tmp_path)
    build = get_model("lightlm")
    run = tmp_path / "runs" / "demo"
    lm = build.create_from_arg_string(f"pretrained={run},dtype=bfloat16", {"batch_size": "4", "device": "cpu"})
    assert lm.loaded.path.resolve() == loaded.path.resolve()
    assert lm.model.embed_tokens.weight.dtype == torch.bfloat16
    fast = pick_dtype("auto", torch.device("cpu"))
    assert build.create_from_arg_obj({"pretrained": str(run)}).model.embed_tokens.weight.dtype == fast
    with pytest.raises(UsageError, match="batch-size"):
        build.create_from_arg_obj({"pretrained": str(run), "batch_size": "many"})


GPT2 = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True, "num_kv_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense": 1}


@pytest.mark.parametrize("shape", [{}, GPT2, MOE], ids=["llama", "gpt2", "moe"])
def test_it_agrees_with_lm_evals_own_model_on_equal_weights(tmp_path: Path, shape: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from lightlm.convert.huggingface.folder import export_huggingface

    tokenizer = tiny_tokenizer()
    lm = LightLM(LoadedModel(tiny_model(tokenizer, **shape), tokenizer, Path("tiny")))
    export_huggingface(lm.loaded, tmp_path / "hf")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=2)
    assert theirs.max_length == lm.max_length
    for ours, hf in zip(*(m.loglikelihood(instances("loglikelihood", CONTEXTS)) for m in (lm, theirs)), strict=True):
        assert ours == (pytest.approx(hf[0], abs=1e-3), hf[1])
    rolling = instances("loglikelihood_rolling", [(LONG,), ("Ω",)])
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)
    settings = {"until": ["."], "max_gen_toks": 16, "do_sample": False}
    prompts = instances("generate_until", [("The cat sat", settings), ("A dog ran after the cat; the", settings)])
    assert lm.generate_until(prompts) == theirs.generate_until(prompts)


@pytest.mark.parametrize("own", [{}, {"repetition_penalty": None}], ids=["open", "off"])
def test_greedy_answers_follow_the_models_generation_config_as_in_lm_evals_own_model(tmp_path: Path, own: dict) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from lightlm.convert.huggingface.folder import export_huggingface

    tokenizer = tiny_tokenizer()
    plain = LightLM(LoadedModel(tiny_model(tokenizer), tokenizer, Path("tiny")))
    suggested = {"eos_token_id": tokenizer.end_of_text_id, "do_sample": True, "temperature": 0.5, "top_k": 3,
                 "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}  # fmt: skip
    imported = tokenizer.used_as(None, False, {}, suggested)
    lm = LightLM(LoadedModel(plain.loaded.model, imported, Path("tiny")))
    export_huggingface(lm.loaded, tmp_path / "hf")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=1)
    settings = {"until": [], "max_gen_toks": 16, **own}
    prompts = instances("generate_until", [("The cat sat", settings), ("A dog ran after the cat; the", settings)])
    assert lm.generate_until(prompts) == theirs.generate_until(prompts) != plain.generate_until(prompts)


def test_scores_are_finite_in_bfloat16(lm: LightLM) -> None:
    tokenizer = lm.loaded.tokenizer
    low = LightLM(LoadedModel(tiny_model(tokenizer).bfloat16(), tokenizer, Path("tiny")))
    pairs = instances("loglikelihood", CONTEXTS)
    for (coarse, _), (fine, _) in zip(low.loglikelihood(pairs), lm.loglikelihood(pairs), strict=True):
        assert math.isfinite(coarse)
        assert coarse == pytest.approx(fine, rel=0.05)


def test_progress_without_a_terminal_is_a_line_each_minute(monkeypatch, capsys) -> None:
    clock = iter([0.0, 30.0, 90.0, 100.0, 200.0])
    monkeypatch.setattr("lightlm.evaluate.harness.time.monotonic", lambda: next(clock))
    lines = _Lines("hellaswag: scoring answers", 4000)
    for count in (500, 500, 500, 500):
        lines.advance(count)
    assert capsys.readouterr().err.splitlines() == [
        "hellaswag: scoring answers: 1,000 of 4,000 (25%), about 5 min left",
        "hellaswag: scoring answers: 2,000 of 4,000 (50%), about 4 min left",
    ]


def test_a_harness_prints_its_progress_unless_told_not_to(lm: LightLM, monkeypatch, capsys) -> None:
    monkeypatch.setattr("lightlm.evaluate.harness._LINE_SECONDS", 0.0)
    requests = instances("loglikelihood", CONTEXTS)
    lm.loglikelihood(requests)
    assert "scoring answers: 4 of 4 (100%)" in capsys.readouterr().err
    LightLM(lm.loaded, show_progress=False).loglikelihood(requests)
    assert capsys.readouterr().err == ""

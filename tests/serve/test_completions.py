"""What /v1/completions answers: the text that the Python API generates from the same seed, in OpenAI's shape."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightlm.generate.engine import generate
from lightlm.generate.sampling import DEFAULT, Sampling
from tests.serve.served import PROMPT, Served

HOT = {"temperature": 1.3, "top_p": 1.0}


def test_an_answer_is_what_the_python_api_generates_with_the_same_seed(server: Served) -> None:
    body = server.complete(max_tokens=12, seed=5, n=3).json()
    assert [choice["text"] for choice in body["choices"]] == server.alone([PROMPT], 12, DEFAULT, 5, samples=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    prompt_tokens = len(server.loaded.tokenizer.encode(PROMPT))
    usage = body["usage"]
    assert usage["prompt_tokens"] == prompt_tokens
    assert usage["total_tokens"] == prompt_tokens + usage["completion_tokens"]


def test_several_prompts_with_several_samples_are_numbered_like_rows_of_the_python_api(server: Served) -> None:
    prompts = ["The cat", "A dog ran after the", "on"]
    expected = server.alone(prompts, 9, Sampling(**HOT), 3, samples=2)
    assert server.texts(prompt=prompts, max_tokens=9, seed=3, n=2, **HOT) == expected
    ids = [server.loaded.tokenizer.encode(prompt) for prompt in prompts]
    assert server.texts(prompt=ids, max_tokens=9, seed=3, n=2, **HOT) == expected
    assert server.texts(prompt=ids[1], max_tokens=9, seed=3) == server.alone(prompts[1:2], 9, DEFAULT, 3)


def test_without_a_seed_answers_differ(server: Served) -> None:
    assert len({server.texts(max_tokens=20, **HOT)[0] for _ in range(3)}) == 3


def test_concurrent_requests_get_what_each_gets_alone(server: Served) -> None:
    """More requests than rows, of other lengths and settings, so that they join and leave at any step."""
    asked = [
        {"prompt": PROMPT * (1 + i % 3), "max_tokens": 5 + 7 * (i % 5), "seed": i, "temperature": (0, 0.7, 1.4)[i % 3]}
        for i in range(30)
    ]
    with ThreadPoolExecutor(30) as pool:
        together = list(pool.map(lambda fields: server.texts(**fields)[0], asked))
    for fields, text in zip(asked, together, strict=True):
        sampling = Sampling(temperature=fields["temperature"])
        assert [text] == server.alone([fields["prompt"]], fields["max_tokens"], sampling, fields["seed"])


def test_a_stream_has_the_same_text_in_parts(server: Served) -> None:
    fields = {"max_tokens": 25, "seed": 8, "n": 2, **HOT}
    events = server.events(**fields, stream_options={"include_usage": True})
    *parts, last = events
    texts = ["", ""]
    for event in parts:
        assert event["usage"] is None
        [choice] = event["choices"]
        texts[choice["index"]] += choice["text"]
    whole = server.complete(**fields).json()
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len(parts) > 20
    reasons = [choice["finish_reason"] for event in parts for choice in event["choices"] if choice["finish_reason"]]
    assert sorted(reasons) == sorted(choice["finish_reason"] for choice in whole["choices"])
    assert all("usage" not in event for event in server.events(max_tokens=2))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer_before_it(server: Served, stream: bool) -> None:
    fields = {"max_tokens": 60, "seed": 21, **HOT}
    [free] = server.texts(**fields)
    stop = free[20:23]
    assert free.find(stop) >= 0
    expected = free[: free.index(stop)]
    if stream:
        choices = [event["choices"][0] for event in server.events(**fields, stop=[stop, "never in it"])]
    else:
        choices = server.complete(**fields, stop=stop).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == expected
    assert choices[-1]["finish_reason"] == "stop"


def test_echo_puts_the_prompt_before_the_text(server: Served) -> None:
    fields = {"prompt": ["The cat", "A dog"], "max_tokens": 4, "seed": 2, "n": 2}
    plain = server.texts(**fields)
    echoed = [prompt + text for prompt, text in zip(["The cat", "The cat", "A dog", "A dog"], plain, strict=True)]
    assert server.texts(**fields, echo=True) == echoed
    texts = [""] * 4
    for event in server.events(**fields, echo=True):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == echoed


def test_log_probabilities_are_those_of_the_plain_forward_pass(server: Served) -> None:
    choice = server.complete(max_tokens=15, seed=4, logprobs=3, **HOT).json()["choices"][0]
    told, tokenizer = choice["logprobs"], server.loaded.tokenizer
    prompt = tokenizer.encode(PROMPT)
    [alone] = generate(server.loaded.model, [prompt], 15, Sampling(**HOT), 4, {tokenizer.end_of_text_id})
    with torch.no_grad():
        log_probs_TV = server.loaded.model(torch.tensor([prompt + alone.ids]))[0].double().log_softmax(-1)
    names = tokenizer.bytes_of
    rows = zip(alone.ids, told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    for i, (token, name, value, top) in enumerate(rows, len(prompt) - 1):
        assert as_bytes(name) == names(token)
        assert value == pytest.approx(float(log_probs_TV[i, token]), abs=1e-4)
        best = log_probs_TV[i].topk(3).indices.tolist()
        best += [token] if token not in best else []
        assert list(map(as_bytes, top)) == [names(index) for index in best]
        assert list(top.values()) == pytest.approx(log_probs_TV[i, best].tolist(), abs=1e-4)
    assert len(told["text_offset"]) == len(alone.ids)
    assert told["text_offset"] == sorted(told["text_offset"])
    alone = server.complete(max_tokens=2, logprobs=0).json()["choices"][0]["logprobs"]
    own = zip(alone["tokens"], alone["token_logprobs"], strict=True)
    assert alone["top_logprobs"] == [{name: value} for name, value in own]


def as_bytes(name: str) -> bytes:
    return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) if name.startswith("bytes:") else name.encode()


def test_a_full_context_ends_an_answer(server: Served) -> None:
    context = server.loaded.model.config.max_seq_len
    ids = [5] * (context - 3)
    choice = server.complete(prompt=ids, max_tokens=50, logit_bias={"7": 100}).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    response = server.complete(prompt=[5] * (context + 1))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "257 tokens" in response.json()["error"]["message"]


def test_an_empty_prompt_starts_a_text(server: Served) -> None:
    assert server.texts(prompt="", max_tokens=5)


def test_the_model_is_listed_and_another_name_is_an_error(server: Served) -> None:
    [model] = server.client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 256)
    assert server.client.get("/v1/models/tiny").json() == model
    assert server.complete(model="tiny", max_tokens=1).status_code == 200
    for response in (server.complete(model="gpt-4"), server.client.get("/v1/models/gpt-4")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_metrics_count_what_happened(server: Served) -> None:
    before = {
        name: server.metric(f"lightlm_{name}_total") for name in ("requests", "generated_tokens", "prompt_tokens")
    }
    server.texts(prompt=[5, 6, 7], max_tokens=9, logit_bias={"7": 100}, temperature=0)
    assert server.metric("lightlm_generated_tokens_total") == before["generated_tokens"] + 9
    assert server.metric("lightlm_prompt_tokens_total") == before["prompt_tokens"] + 3
    assert server.metric("lightlm_requests_total") >= before["requests"] + 1
    assert server.metric("lightlm_rows_used") == 0
    assert server.client.get("/health").json() == {"status": "ok"}


def test_answers_are_json_in_any_script(server: Served) -> None:
    response = server.complete(prompt="naïve Ω 猫 😀", max_tokens=3)
    json.loads(response.content.decode())
    assert response.status_code == 200

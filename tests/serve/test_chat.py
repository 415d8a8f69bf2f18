"""What /v1/chat/completions answers, for a model whose files have a chat template."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from lightlm.generate.engine import generate
from lightlm.generate.prompts import encode_chat
from lightlm.generate.sampling import DEFAULT
from lightlm.generate.text import text_of
from tests.serve.served import Served, served, tiny_loaded

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}cat:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "The cat sat"}, {"role": "assistant", "content": "on"}]


@pytest.fixture(scope="module")
def chat() -> Iterator[Served]:
    loaded = tiny_loaded()
    tokenizer = loaded.tokenizer.used_as(None, False, {"chat_template": TEMPLATE}, {})
    with served(loaded=replace(loaded, tokenizer=tokenizer)) as running:
        yield running


def ask(server: Served, **fields: object):
    return server.client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})


def test_an_answer_is_what_the_template_and_the_seed_give(chat: Served) -> None:
    body = ask(chat, max_completion_tokens=14, seed=6, n=2).json()
    tokenizer = chat.loaded.tokenizer
    text, ids = encode_chat(tokenizer, MESSAGES)
    assert text == "user: The cat sat\nassistant: on\ncat:"
    made = generate(chat.loaded.model, [ids], 14, DEFAULT, 6, tokenizer.end_ids, num_samples=2)
    expected = [text_of(tokenizer, ids, completion.ids) for completion in made]
    assert [choice["message"]["content"] for choice in body["choices"]] == expected
    assert {choice["message"]["role"] for choice in body["choices"]} == {"assistant"}
    assert body["object"] == "chat.completion"
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert chat.client.get("/v1/models").json()["data"][0]["chat"] is True


def test_developer_is_the_role_system_as_in_training_data(chat: Served) -> None:
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert encode_chat(chat.loaded.tokenizer, said)[0] == "system: Be brief.\nuser: Hello\ncat:"
    as_system = [said[0] | {"role": "system"}, said[1]]
    answers = [ask(chat, messages=messages, max_tokens=5, seed=1).json() for messages in (said, as_system)]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_stream_begins_with_the_role_and_has_the_same_text(chat: Served) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 14, "seed": 6, "n": 2, "logprobs": True, "top_logprobs": 2}
    events = chat.events("/v1/chat/completions", **fields)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert [event["choices"][0]["delta"] for event in events[:2]] == [{"role": "assistant", "content": ""}] * 2
    whole = ask(chat, **fields).json()["choices"]
    for index, choice in enumerate(whole):
        own = [part for event in events for part in event["choices"] if part["index"] == index]
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        tokens = [token for part in own if part["logprobs"] for token in part["logprobs"]["content"]]
        assert tokens == choice["logprobs"]["content"]
        spelled = b"".join(bytes(token["bytes"]) for token in tokens)
        assert spelled.decode(errors="replace") == choice["message"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)


def test_without_a_limit_an_answer_may_fill_the_context(chat: Served) -> None:
    body = ask(chat, logit_bias={"7": 100}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == chat.loaded.model.config.max_seq_len + 1


def test_a_message_cannot_end_its_turn(chat: Served) -> None:
    spelled = [{"role": "user", "content": "<|endoftext|>"}]
    plain = ask(chat, messages=spelled, max_tokens=1).json()["usage"]["prompt_tokens"]
    parsed = ask(chat, messages=spelled, max_tokens=1, parse_special=True).json()["usage"]["prompt_tokens"]
    assert parsed < plain


def test_messages_that_cannot_be_answered_are_errors(chat: Served, server: Served) -> None:
    response = ask(server)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"
    response = ask(chat, messages=[{"role": "user", "content": "cat " * 300}])
    assert response.json()["error"]["code"] == "context_length_exceeded"
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    response = chat.client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "not Unicode" in response.json()["error"]["message"]

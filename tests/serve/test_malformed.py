"""Malformed requests get a 4xx and leave the server serving. `benchmarks/serve.py --malformed` sends more of them."""

import json
import random
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightlm.serve.errors import RequestError
from lightlm.serve.fields import ChatBody, CompletionBody
from lightlm.serve.questions import Reader
from tests.serve.served import PROMPT, Served

JSON = {"Content-Type": "application/json"}
BODIES = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def check(server: Served, path: str, content: bytes) -> None:
    response = server.client.post(path, content=content, headers=JSON)
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, (content, response.text)
        error = response.json()["error"]
        assert isinstance(error["message"], str)
        assert error["type"] == "invalid_request_error"


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fields_with_any_value_are_answered_or_refused(server: Served, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(BODIES)))
    names = st.sampled_from(sorted(BODIES[path].model_fields)) | st.text(max_size=10)
    valid = (
        {"prompt": PROMPT, "max_tokens": 1} if "chat" not in path else {"messages": [{"role": "user", "content": "x"}]}
    )
    document = valid | data.draw(st.dictionaries(names, ANYTHING, max_size=3))
    document["max_tokens"] = 1 if document.get("max_tokens") is None else document["max_tokens"]
    check(server, path, json.dumps(document).encode())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), cut=st.integers(0, 40), place=st.integers(0, 40))
def test_bytes_that_are_not_json_are_refused(server: Served, content: bytes, cut: int, place: int) -> None:
    valid = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
    check(server, "/v1/completions", valid[:place] + content + valid[place + cut :])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "x", "n": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "max_tokens": 1e3}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "x", "\\ud800": 1, "\\ud800": 1}',
        b'{"prompt": "x", "logit_bias": {"\\ud800": 1}}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        '{"prompt": "x"}'.encode("utf-16"),
        b'{"prompt": "caf\xe9"}',
        b'{"prompt": [99999999999999999999]}',
        b'{"prompt": [-1]}',
        b'{"prompt": "x", "logit_bias": {"99999": 1}}',
        b'{"prompt": "x", "logit_bias": {"99999999999999999999": 1}}',
        b'{"prompt": "x", "max_tokens": 3, "min_new_tokens": 4}',
        b'{"prompt": "x", "n": 128}',
        b'{"prompt": "x", "n": 2, "n": 1}',
        json.dumps({"prompt": ["x"] * 5000}).encode(),
        json.dumps({"prompt": "x" * 900_000}).encode(),
    ],
)
def test_hard_cases_are_refused(server: Served, content: bytes) -> None:
    response = server.client.post("/v1/completions", content=content, headers=JSON)
    assert 400 <= response.status_code < 500, response.text
    assert response.json()["error"]["message"]


def test_too_many_choices_are_refused_before_work_is_spent_on_each(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightlm.serve.questions.encode_prompt", lambda *_, **__: pytest.fail("a prompt was encoded"))
    response = server.client.post("/v1/completions", json={"prompt": ["x"] * 40, "n": 2})
    assert response.status_code == 400
    assert "80 choices in one request; this server takes at most 72" in response.json()["error"]["message"]


def test_broken_http_and_early_ends_leave_the_server_serving(server: Served) -> None:
    source = random.Random(0)
    url = server.client.base_url
    whole = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole += b'Content-Length: 48\r\n\r\n{"prompt": "The cat", "max_tokens": 9, "n": 2  }'
    for number in range(120):
        with socket.create_connection((url.host, url.port), timeout=20) as client:
            if number % 3 == 0:
                client.sendall(whole[: source.randrange(len(whole) + 1)])  # and goes
                continue
            changed = bytearray(whole)
            for _ in range(source.randrange(1, 6)):
                changed[source.randrange(80)] = source.randrange(256)
            client.sendall(changed)
            client.shutdown(socket.SHUT_WR)
            status = client.recv(65536)[9:12]
            assert status == b"" or status == b"200" or status.startswith(b"4"), (changed, status)
    assert server.texts(max_tokens=2)


@pytest.mark.parametrize("given_as", ["id", "text"])
def test_an_entry_of_the_tokenizer_without_a_row_is_refused(server: Served, given_as: str) -> None:
    """As in a character-level model of nanoGPT, which has no row for the end of text."""
    tokenizer = server.loaded.tokenizer.with_special_tokens(["<extra>"])
    config = replace(server.loaded.model.config, vocab_size=tokenizer.vocab_size - 1)
    reader = Reader(replace(server.loaded, tokenizer=tokenizer, model=SimpleNamespace(config=config)), 4)
    index = tokenizer.id_of("<extra>")
    body = {"prompt": [index]} if given_as == "id" else {"prompt": "<extra>", "parse_special": True}
    with pytest.raises(RequestError, match=f"{index} is not a token id of this model; they are below {index}") as error:
        reader.completion(CompletionBody.model_validate(body))
    assert error.value.param == "prompt"

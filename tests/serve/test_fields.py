import pytest

from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.serve.errors import RequestError
from lightlm.serve.fields import ChatBody, CompletionBody, read

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def test_fields_become_settings_and_null_means_the_default() -> None:
    document = {"prompt": "x", "temperature": 1, "top_k": 5, "logit_bias": {"7": -100}, "min_p": None, "stop": None}
    body = read(CompletionBody, document)
    assert body.sampling == Sampling(temperature=1.0, top_k=5, logit_bias=((7, -100.0),))
    assert body.stops == ()
    assert read(CompletionBody, {"prompt": "x"}).sampling == DEFAULT


@pytest.mark.parametrize(
    "field",
    [
        *({"best_of": 1}, {"best_of": 3, "n": 3}, {"suffix": None}, {"tools": []}, {"reasoning_effort": "none"}),
        *({"response_format": {"type": "text"}}, {"moderation": None}),
        *({"prompt_cache_key": "k"}, {"prompt_cache_retention": "24h"}, {"prompt_cache_options": {"ttl": "30m"}}),
    ],
)
def test_unsupported_fields_may_have_the_value_that_asks_for_nothing(field: dict) -> None:
    assert read(CompletionBody, {"prompt": "x", **field}).prompts == ["x"]


def read_all(document: dict) -> tuple:
    body = read(CompletionBody, document)
    return body.sampling, body.stops, body.prompts


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"nonsense": None}, "nonsense", "unknown field 'nonsense'"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        ({"moderation": {"model": "omni"}}, "moderation", "not supported"),
        ({"best_of": 3, "n": 2}, "best_of", "not supported"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "0 (greedy) or above"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"top_p": 2}, "top_p", "top_p must be"),
        ({"min_p": 2}, "min_p", "min_p must be"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"5": "much"}}, "logit_bias.5", "valid number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"seed": "one"}, "seed", "integer"),
        ({"stop": ""}, "stop", "1 to 256 characters"),
        ({"stop": ["x" * 257]}, "stop", "1 to 256 characters"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": 3}, "stop", "string"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"stream_options": {"include_usage": True}}, None, "needs stream: true"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "False",
        ),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
        ({"prompt": 5}, "prompt", "give a text"),
        ({"prompt": []}, "prompt", "give a text"),
        ({"prompt": [[]]}, "prompt", "give a text"),
        ({"prompt": ["x", 5]}, "prompt", "give a text"),
        ({"prompt": [True]}, "prompt", "give a text"),
        ({"prompt": [1.5]}, "prompt", "give a text"),
        ({"prompt": None}, "prompt", "missing"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(fields: dict, param: str | None, words: str) -> None:
    with pytest.raises(RequestError) as raised:
        read_all({"prompt": "x", **fields})
    assert raised.value.status == 400
    assert raised.value.param == param
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hello"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "x", "Size": 5}]}, "messages.0.Size", "unknown field"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages.0", "tool_calls is not"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content", "missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content.0.type",
            "should be 'text'",
        ),
        ({"max_tokens": 5, "max_completion_tokens": 5}, None, "not both"),
        ({"top_logprobs": 5}, None, "needs logprobs: true"),
        ({"prompt": "x"}, "prompt", "unknown field"),
        ({"echo": True}, "echo", "unknown field"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(fields: dict, param: str | None, words: str) -> None:
    with pytest.raises(RequestError) as raised:
        read(ChatBody, CHAT | fields)
    assert param is None or raised.value.param == param
    assert words in str(raised.value)


@pytest.mark.parametrize("document", [None, 5, "x", ["prompt"], True])
def test_a_body_is_an_object(document: object) -> None:
    with pytest.raises(RequestError, match="must be a JSON object"):
        read(CompletionBody, document)


def test_parts_of_a_message_are_one_text() -> None:
    hint = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    parts = [{"type": "text", "text": "Hel", **hint}, {"type": "text", "text": "lo", "prompt_cache_breakpoint": None}]
    assert read(ChatBody, {"messages": [{"role": "user", "content": parts}]}).messages[0].text == "Hello"


def test_an_answer_may_be_sent_back_as_clients_hold_it() -> None:
    message = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "tool_calls": [],
        "annotations": [],
        "audio": None,
    }
    [read_back] = read(ChatBody, {"messages": [message | {"name": None, "function_call": None}]}).messages
    assert (read_back.role, read_back.text) == ("assistant", "Hi")


def test_null_is_the_default_inside_a_field_too() -> None:
    body = read(CompletionBody, {"prompt": "x", "stream": True, "stream_options": {"include_usage": None}})
    assert body.stream_options is not None
    assert body.stream_options.include_usage is False

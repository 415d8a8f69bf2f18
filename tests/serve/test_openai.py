"""The official client against the server."""

from dataclasses import replace

import pytest

from lightlm.generate.sampling import Sampling
from lightlm.serve.access import Access
from lightlm.serve.fields import ChatBody, CompletionBody, read
from tests.serve.served import PROMPT, Served, served, tiny_loaded, wait_until

openai = pytest.importorskip("openai", reason="needs the package openai")


@pytest.fixture(scope="module")
def client(server: Served):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_it_completes_and_streams_the_same_text(server: Served, client) -> None:
    [model] = client.models.list()
    assert client.models.retrieve(model.id) == model
    fields = {"model": model.id, "prompt": PROMPT, "max_tokens": 20, "seed": 9, "temperature": 1.2, "n": 2}
    answer = client.completions.create(**fields, logprobs=2, extra_body={"min_p": 0.01})
    sampling = Sampling(temperature=1.2, min_p=0.01)
    assert [choice.text for choice in answer.choices] == server.alone([PROMPT], 20, sampling, 9, samples=2)
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in answer.choices)
    texts = ["", ""]
    usage = None
    options = {"include_usage": True}
    for chunk in client.completions.create(**fields, extra_body={"min_p": 0.01}, stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in answer.choices]
    assert usage == answer.usage


def test_the_name_that_the_server_was_started_with_means_the_model() -> None:
    with served(reference="org/Model-1.5M") as running:
        named = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        assert named.models.retrieve("org/Model-1.5M").id == "tiny"
        assert named.completions.create(model="org/Model-1.5M", prompt=PROMPT, max_tokens=3).model == "tiny"
        assert named.completions.create(model="tiny", prompt=PROMPT, max_tokens=3).model == "tiny"
        with pytest.raises(openai.NotFoundError):
            named.models.retrieve("Model-1.5M")


def test_it_stops(server: Served, client) -> None:
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "extra_body": {"logit_bias": {"7": 100}}}
    with client.completions.create(**fields, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: server.metric("lightlm_rows_used") == 0)
    free = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, seed=21).choices[0].text
    stopped = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, seed=21, stop=[free[9:11]])
    assert stopped.choices[0].text == free[: free.index(free[9:11])]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_conversation_goes_on_with_the_answer_that_it_gave() -> None:
    loaded = tiny_loaded()
    settings = {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"}
    loaded = replace(loaded, tokenizer=loaded.tokenizer.used_as(None, False, settings, {}))
    with served(loaded=loaded) as running:
        chats = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0).chat.completions
        messages = [{"role": "user", "content": PROMPT}]
        for turns in (1, 3):
            assert len(messages) == turns
            answer = chats.create(model="tiny", messages=messages, max_tokens=4, tools=[]).choices[0].message
            messages += [answer, {"role": "user", "content": "on"}]


def test_every_field_of_the_client_may_be_null() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase as Chats
    from openai.types.completion_create_params import CompletionCreateParamsBase as Completions

    needed = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    for kind, params in ((ChatBody, Chats), (CompletionBody, Completions)):
        read(kind, {name: needed.get(name) for name in params.__annotations__})


def test_its_errors_are_the_expected_ones(server: Served, client) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="best_of is not supported") as raised:
        client.completions.create(model="tiny", prompt="x", best_of=3)
    assert raised.value.param == "best_of"
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    with served(access=Access("sk-1")) as locked:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sk-2", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sk-1").models.list().data[0].id == "tiny"

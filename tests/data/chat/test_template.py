"""Chat templates, as transformers renders them, and what one cannot do."""

from typing import Any

import pytest

from lightlm.data.chat.template import ChatTemplate
from lightlm.errors import LightLMError, UsageError

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\n' ~ messages[0].content | trim ~ '\n<</SYS>>\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- set before = system if loop.first and system is defined else '' %}
        {{- bos_token ~ '[INST] ' ~ before ~ message.content.strip() ~ ' [/INST]' }}
    {%- else %}
        {%- generation %} {{ message.content | trim }} {{ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""
TOOLS = """{% set ns = namespace(seen=0) %}
{% for message in messages if message.role != 'skip' %}
    {% set ns.seen = ns.seen + 1 %}
    {% if ns.seen > 3 %}{% break %}{% endif %}
{{ dict(role=message.role) | tojson }} {{ message | tojson(indent=2) }} {{ message.content.split(' ')[-1] }}
{% endfor %}
{% if tools is not none and tools %}tools{% endif %}{{ documents }}{{ unknown }}{{ pad_token }}
{% for n in range(2) %}{{ n }}{% endfor %}"""
TALK = [
    {"role": "user", "content": "  Grüße & <b>hi</b>  "},
    {"role": "assistant", "content": "naïve 'quotes' \"too\"\n"},
    {"role": "user", "content": "日本語"},
]
SYSTEM = [{"role": "system", "content": "Be kind."}]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("messages", [TALK, TALK[:1], SYSTEM + TALK], ids=["talk", "first", "system"])
@pytest.mark.parametrize("source", [SMOLLM2, LLAMA2, TOOLS], ids=["smollm2", "llama2", "tools"])
def test_the_text_is_that_of_transformers(source: str, messages: list[dict[str, Any]], answer: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    [expected], _ = utils.render_jinja_template([messages], chat_template=source, add_generation_prompt=answer, **NAMES)
    assert ChatTemplate(source, NAMES).render(messages, answer=answer) == expected


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages[0]['content'].format.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ ('{0.__class__}').format(messages) }}",
        "{{ ('%s' | attr('__class__')) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('touch hacked') }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.__mro__ }}",
        "{% for n in range(1000000000) %}{% endfor %}",
        "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_hostile_template_reaches_nothing(attack: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = ChatTemplate(attack, NAMES).render(messages)
    except LightLMError:
        text = ""
    assert not any(word in text for word in ("class", "function", "module", "builtin", "uid=", "root:"))
    assert messages == [{"role": "user", "content": "hi"}]
    assert not list(tmp_path.iterdir())


def test_a_template_that_refuses_or_is_broken_is_one_message() -> None:
    with pytest.raises(LightLMError, match=r"chat template does not take these messages: roles must alternate"):
        ChatTemplate(LLAMA2, NAMES).render(TALK[1:])
    with pytest.raises(LightLMError, match="not valid in line 2"):
        ChatTemplate("fine\n{% if %}", NAMES)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "not a list"),
        ("hello", "not a list"),
        (["hello"], "message 1 is not an object"),
        ([TALK[0], {"role": "user"}], "message 2: content"),
        ([{"role": 7, "content": ""}], "message 1: role"),
    ],
)
def test_malformed_messages_are_named(messages: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ChatTemplate(SMOLLM2, NAMES).render(messages)

"""Chat templates, as transformers renders them, and what one cannot do."""

from typing import Any

import jinja2
import pytest

from lightlm.data.chat import sandbox
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
MISTRAL = """{{ bos_token }}{% set system = namespace(text='') %}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set system.text = message['content'] ~ '\n\n' -%}
{%- elif message['role'] == 'user' -%}{{ '[INST] ' }}{{ system.text if loop.last else '' }}{{ message['content'] }}
{{- ' [/INST]' -}}
{%- else -%}{{ ' ' + message['content'] + eos_token }}{%- endif -%}
{%- endfor -%}"""
PHI = (
    "{% macro turn(role, text) %}<|{{ role }}|>\n{{ text }}<|end|>\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m['content'] | trim) }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
QWEN = """{%- if tools %}{{- '# Tools\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages[::-1] %}
    {%- if m.role == 'user' and ns.last < 0 %}{%- set ns.last = messages | length - loop.index %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>' }}
    {{- '\n' if not loop.last or loop.index0 >= ns.last else '' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
TALK = [
    {"role": "user", "content": "  Grüße & <b>hi</b>  "},
    {"role": "assistant", "content": "naïve 'quotes' \"too\"\n"},
    {"role": "user", "content": "日本語"},
]
SYSTEM = [{"role": "system", "content": "Be kind."}]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("messages", [TALK, TALK[:1], SYSTEM + TALK], ids=["talk", "first", "system"])
@pytest.mark.parametrize(
    "source",
    [SMOLLM2, LLAMA2, TOOLS, MISTRAL, PHI, QWEN],
    ids=["smollm2", "llama2", "tools", "mistral", "phi", "qwen"],
)
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


@pytest.mark.parametrize(
    ("endless", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in 'x' %}{% endfor %}{% endfor %}{% endfor %}",
         "more than 10,000 steps"),
        ("{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}", "steps|recursion"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "steps"),
        ("{% macro f(n) %}{% if n %}{% call g(n - 1) %}{% endcall %}{% endif %}{% endmacro %}"
         "{% macro g(n) %}{{ caller() }}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
         "steps"),
        ("{% set ns = namespace(x='ab') %}{% for n in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
         "makes a text or list of"),
        ("{% set ns = namespace(x=[1]) %}{% for n in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
         "makes a text or list of"),
        ("{{ 'a' * 10 ** 12 }}", "makes a text or list of"),
        ("{{ 1000000000000 * ['a'] }}", "makes a text or list of"),
        ("{% set s = 'a' * 1000000 %}{% for n in range(1000) %}{{ s }}{% endfor %}", "makes a text or list of"),
        ("{% set n = namespace(x=9) %}{% for _ in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}", "10,000 bits"),
        ("{{ 9 ** (9 ** 9) }}", "more than 10,000 bits"),
    ],
)  # fmt: skip
def test_what_a_template_computes_is_bounded(endless: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 10_000)
    with pytest.raises(LightLMError, match=words):
        ChatTemplate(endless, NAMES).render(TALK)


def test_bounds_hold_for_each_rendering_alone_and_change_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 1_000)
    source = (
        "{% macro twice(x) %}{{ x ~ x }}{{ caller() if caller }}{% endmacro %}"
        "{% for m in messages recursive %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ twice(m.content) }}"
        "{% if m.content is string and loop.depth < 2 and m.parts is defined %}{{ loop(m.parts) }}{% endif %}"
        "{% else %}none{% endfor %}{% call twice('a' + 'b' * 2) %}in{{ 2 ** 3 }}{{ unknown ~ 1 }}{% endcall %}"
        "{% for n in range(800) %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}]
    expected = jinja2.Environment().from_string(source).render(messages=messages)
    template = ChatTemplate(source, NAMES)
    assert [template.render(messages) for _ in range(3)] == [expected] * 3


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

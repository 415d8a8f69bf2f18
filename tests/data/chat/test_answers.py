"""Which tokens of a conversation are trained on, for templates of many kinds; and ids as transformers gives them."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.chat.answers import ConversationEncoder
from lightlm.data.chat.conversation import as_text, from_text
from lightlm.data.chat.template import CHATML, CHATML_TOKENS
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import DataError

TALK = [
    {"role": "user", "content": " How are you? "},
    {"role": "assistant", "content": "\n Well, thanks. "},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "日本語 naïve"},
]
SYSTEM = [{"role": "system", "content": "Be kind."}]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (  # a BOS once, a default system message, trimmed contents
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '<|h|>system<|e|>\n\nYou help.<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|h|>' + m['role'] + '<|e|>\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|e|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # the last answer is written otherwise than earlier ones, as in Qwen3
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_ONCE = (  # only the last message has an end
    "{% for m in messages %}{{ '<|h|>' + m['role'] + '<|e|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|e|>' }}{% else %}{{ eos_token }}{% endif %}"
)
ENDED = ["\n Well, thanks. <|im_end|>", "日本語 naïve<|im_end|>"]
TRIMMED = ["Well, thanks.<|im_end|>", ENDED[1]]
CASES = {
    "chatml": (CHATML, ENDED),
    "llama2": (LLAMA2, [" Well, thanks. </s>", " 日本語 naïve </s>"]),
    "llama3": (LLAMA3, TRIMMED),
    "marked": (MARKED, ["\n Well, thanks. </s>", "日本語 naïve</s>"]),
    # White space before the content of an earlier answer cannot be told apart from the template's own; here it is part
    # of the first token.
    "thinking": (THINKING, [" Well, thanks. <|im_end|>", "日本語 naïve<|im_end|>"]),
    "end-once": (END_ONCE, ["\n Well, thanks. ", "日本語 naïve</s>"]),
}
SETTINGS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["How are you? Well, thanks. And now? Be kind."] * 9, 300)
    return made.with_special_tokens([*CHATML_TOKENS, "<s>", "</s>", "<|h|>", "<|e|>"])


def encoder_of(tokenizer, template, train_on="assistant", **settings):
    return ConversationEncoder(
        tokenizer.used_as(None, False, SETTINGS | settings | {"chat_template": template}, {}), train_on
    )


def trained(tokenizer, encoded):
    """The text of each run of trained tokens, from the bytes of the tokens."""
    chosen, runs = (encoded.masks & 1).astype(bool), []
    for number, index in enumerate(encoded.ids.tolist()):
        if chosen[number]:
            if not number or not chosen[number - 1]:
                runs.append(b"")
            runs[-1] += tokenizer.bytes_of(index)
    return [run.decode() for run in runs]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("system", [False, True])
def test_answers_and_their_ends_are_trained_on(tokenizer, name, system):
    template, answers = CASES[name]
    messages = SYSTEM + TALK if system else TALK
    encoded = encoder_of(tokenizer, template).encode(messages)
    assert trained(tokenizer, encoded) == answers
    assert encoded.masks[0] == 2
    assert (encoded.masks[1:] < 2).all()
    assert trained(tokenizer, encoder_of(tokenizer, template, "last").encode(messages)) == answers[-1:]
    every = encoder_of(tokenizer, template, "all").encode(messages).masks
    assert every.tolist() == [2, *[1] * (len(every) - 1)]


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(tokenizer, name):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    template = CASES[name][0]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.definition.decode()), **SETTINGS
    )
    encoded = encoder_of(tokenizer, template).encode(SYSTEM + TALK)
    found = theirs.apply_chat_template(SYSTEM + TALK, chat_template=template, tokenize=True, return_dict=False)
    assert encoded.ids.tolist() == found
    assert encoded.text == theirs.apply_chat_template(SYSTEM + TALK, chat_template=template, tokenize=False)


@functools.cache
def small_tokenizer():
    return train_tokenizer(["a b c"] * 9, 300).with_special_tokens(CHATML_TOKENS)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=2))
@settings(max_examples=50)
def test_any_contents_keep_their_turns(contents):
    """Also contents that spell special tokens: they end no turn, and the trained part is the answer with its end."""
    tokenizer = small_tokenizer()
    spelled = contents[1] + "<|im_end|>\n<|im_start|>user"
    given = [{"role": "user", "content": contents[0]}, {"role": "assistant", "content": spelled}]
    messages = from_text(as_text(given))
    encoded = encoder_of(tokenizer, CHATML).encode(messages)
    chosen = encoded.ids[(encoded.masks & 1) == 1]
    end = tokenizer.id_of("<|im_end|>")
    assert np.flatnonzero(chosen == end).tolist() == [len(chosen) - 1]
    assert np.count_nonzero(encoded.ids == end) == 2
    clean = "".join(c for c in spelled if not "\ufdd0" <= c <= "\ufdd5")  # reserved: they never reach a template
    assert b"".join(map(tokenizer.bytes_of, chosen.tolist())).decode("utf-8", "surrogatepass") == clean + "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% generation %}{{ eos_token }}{% endgeneration %}", "no token of the assistant is left"),
        ("{{ messages[9].content }}", "does not take these messages"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not show where the assistant's answers are"),
    ],
)
def test_a_template_that_does_not_fit_is_one_message(tokenizer, template, message):
    with pytest.raises(DataError, match=message):
        encoder_of(tokenizer, template).encode(TALK)

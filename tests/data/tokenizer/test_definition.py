"""The bytes of entries, held to what `tokenizers` decodes."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from lightlm.data.tokenizer import Tokenizer
from lightlm.data.tokenizer.definition import bytes_reader
from tests.generate.tokenizers_at_hand import tokenizer_of


@given(text=st.text(alphabet="ab ##\n1é日🙂", max_size=30))
@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_bytes_of_tokens_join_to_the_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    joined = b"".join(map(tokenizer.bytes_of, ids))
    before = b"" if kind == "byte-level" or text.startswith(" ") or not text else b" "  # Metaspace puts one there
    assert joined == before + text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(joined)


def test_a_wordpiece_loses_its_prefix_and_a_sentencepiece_does_not() -> None:
    pieces = {"type": "WordPiece", "continuing_subword_prefix": "##"}
    assert bytes_reader({"model": pieces})("##ing") == b"ing"
    assert bytes_reader({"model": {"type": "BPE", "continuing_subword_prefix": None}})("##") == b"##"
    assert tokenizer_of("wordpiece").bytes_of(tokenizer_of("wordpiece").id_of("##e")) == b"e"


def test_every_byte_of_the_alphabet_is_that_of_the_library() -> None:
    read = bytes_reader({"decoder": {"type": "ByteLevel"}})
    spelled = {}
    for character in map(chr, [*range(0x800), 0x800, *range(0x1000, 0x11_0000, 0x1000)]):
        if not 0xD800 <= ord(character) < 0xE000:
            [(name, _)] = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)
            spelled |= dict(zip(name, character.encode(), strict=True))
    assert len(spelled) == 243  # the other 13 are in no text
    assert {name: read(name) for name in spelled} == {name: bytes([byte]) for name, byte in spelled.items()}


def test_added_tokens_stand_for_their_characters() -> None:
    values = json.loads(tokenizer_of("byte-level").definition)
    raw = tokenizers.Tokenizer.from_str(json.dumps(values))
    raw.add_tokens(["猫と"])
    tokenizer = Tokenizer(raw.to_str().encode(), origin="test")
    [index] = tokenizer.encode("猫と")
    assert tokenizer.bytes_of(index) == "猫と".encode()
    assert tokenizer.token_bytes()[index] == 6
    assert tokenizer.bytes_of(tokenizer.end_of_text_id) == b"<|endoftext|>"
    assert tokenizer.token_bytes()[tokenizer.end_of_text_id] == 0

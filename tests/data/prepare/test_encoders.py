"""Both encoders: the same ids, special tokens as ordinary text, and what happens when they differ."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Definition

from lightlm.data.prepare import encoders as module
from lightlm.data.prepare.blocks import split_hashes
from lightlm.data.prepare.encoders import (
    HARD_TEXTS,
    Encoder,
    EncoderError,
    GigatokenEncoder,
    check_ids,
    choose_encoder,
    encode_large,
)
from lightlm.data.prepare.run import prepare
from lightlm.data.tokenizer import Tokenizer, train_tokenizer
from lightlm.errors import DataError
from tests.corpus import texts, write_jsonl

TRAINED = train_tokenizer([*texts(200), *HARD_TEXTS] * 2, 600)
ENCODERS: list[Encoder] = [GigatokenEncoder(TRAINED), Encoder(TRAINED)]
LETTERS = "ab 1'.\n\r\t\u00a0é日。 "


def packed(*documents: str) -> Any:
    return pyarrow.array(documents, pyarrow.large_string())


def encoded(encoder: Encoder, *documents: str) -> list[list[int]]:
    ids, lengths = encoder.encode(packed(*documents))
    return [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.name)
def test_no_document_can_inject_an_end_of_text_id(encoder: Encoder) -> None:
    for text in ("<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", " <|endoftext|>\n"):
        [ids] = encoded(encoder, text)
        assert TRAINED.end_of_text_id not in ids
        assert TRAINED.decode(ids) == text


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", [GigatokenEncoder, Encoder])
def test_whatever_a_definition_calls_its_special_tokens(kind: type, special: bool) -> None:
    """A definition may list its end-of-text token as an ordinary added one; it is found in no text all the same."""
    definition = Definition.from_str(TRAINED.definition.decode())
    definition.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    content = json.loads(definition.to_str())
    for token in content["added_tokens"]:
        token["special"] = special or token["content"] == "<|im_end|>"
    tokenizer = Tokenizer(json.dumps(content).encode(), origin="test")
    [ids] = encoded(kind(tokenizer), "one<|im_end|>two<|endoftext|>")
    assert not {tokenizer.end_of_text_id, definition.token_to_id("<|im_end|>")} & set(ids)


@given(documents=st.lists(st.text() | st.text(LETTERS), max_size=8))
def test_the_encoders_agree(documents: list[str]) -> None:
    for ours, reference in zip(encoded(ENCODERS[0], *documents), encoded(ENCODERS[1], *documents), strict=True):
        assert ours == reference


def test_a_slice_of_an_array_is_encoded_as_itself() -> None:
    array = packed("first", "second text", "", "third").slice(1, 2)
    ids, lengths = ENCODERS[0].encode(array)
    assert ids.tolist() == TRAINED.encode("second text")
    assert lengths.tolist() == [len(ids), 0]


@given(parts=st.lists(st.text(LETTERS, min_size=1, max_size=40), min_size=1, max_size=8), data=st.data())
def test_a_text_encoded_in_parts_has_the_ids_of_the_whole(parts: list[str], data: st.DataObject) -> None:
    encoder = data.draw(st.sampled_from(ENCODERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightlm.data.prepare.encoders.WINDOW", 3)
        pieces = list(encode_large(parts, encoder, "test"))
    assert "".join(text for text, _ in pieces) == "".join(parts)
    assert np.concatenate([ids for _, ids in pieces]).tolist() == TRAINED.encode("".join(parts))


def test_long_texts_are_cut_into_many_parts() -> None:
    parts = ["The old clock watches the morning. " * 50] * 9
    assert len(list(encode_large(parts, ENCODERS[0], "test"))) >= 9


def test_a_text_with_no_place_to_cut_is_refused_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightlm.data.prepare.encoders.UNCUT_CHARACTERS", 3_000)
    with pytest.raises(DataError, match="no place where the tokenizer lets them be cut"):
        list(encode_large(["ab" * 500] * 5, ENCODERS[0], "test"))


class Wrong(Encoder):
    """An encoder that is right but for texts that contain `mistake`."""

    name = "gigatoken"

    def __init__(self, mistake: str) -> None:
        super().__init__(TRAINED)
        self._mistake = mistake

    def encode(self, array: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = ENCODERS[1].encode(array)
        wrong = np.array([self._mistake in text for text in array.to_pylist()])
        return np.where(np.repeat(wrong, lengths), ids ^ 1, ids), lengths


@pytest.mark.parametrize("documents", [["tiny"] * 5, ["a long text. " * 1_000]], ids=["short", "long"])
def test_the_first_difference_stops_with_the_command_to_resume(documents: list[str]) -> None:
    for mistake in (documents[0][:4], None):
        encoder, array = Wrong(mistake or "absent"), packed(*documents)
        ids, lengths = encoder.encode(array)
        if mistake is None:
            check_ids(encoder, array, ids, lengths, split_hashes(array), "unit 1")
            continue
        with pytest.raises(EncoderError, match=r"gigatoken .* for unit 1: .*--encoder tokenizers"):
            check_ids(encoder, array, ids, lengths, split_hashes(array), "unit 1")


def test_a_difference_in_the_middle_of_a_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl")
    TRAINED.save(tmp_path / "tokenizer.json")
    real = module._made

    def made(definition: bytes, name: str, end: int | None) -> Encoder:
        return Wrong("Every student") if name == "gigatoken" else real(definition, name, end)

    prepare(str(source), str(tmp_path), tmp_path / "right", encoder="tokenizers")
    monkeypatch.setattr(module, "_made", made)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 1 << 30)
    with pytest.raises(EncoderError, match="--encoder tokenizers"):
        prepare(str(source), str(tmp_path), tmp_path / "out", skip_bad=True)
    prepare(str(source), str(tmp_path), tmp_path / "out", encoder="tokenizers")
    for path in (tmp_path / "right").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_the_folder_does_not_depend_on_the_encoder(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl")
    for name in ("gigatoken", "tokenizers"):
        prepare(str(source), "train:400", tmp_path / name, encoder=name, shard_tokens=1_000)
    for path in (tmp_path / "gigatoken").iterdir():
        assert path.read_bytes() == (tmp_path / "tokenizers" / path.name).read_bytes()


def test_a_run_begins_with_hard_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    definition = tmp_path / "tokenizer.json"
    encoder, reason = choose_encoder("auto", definition)
    assert (encoder.name, reason) == ("gigatoken", None)
    encoders = {"tokenizers": Encoder(TRAINED), "gigatoken": Wrong("1234567890")}
    monkeypatch.setattr(module, "_made", lambda _, name, end: encoders[name])
    with pytest.raises(EncoderError, match="a test text"):
        choose_encoder("auto", definition)
    encoder, reason = choose_encoder("tokenizers", definition)
    assert (encoder.name, reason) == ("tokenizers", None)


def test_without_gigatoken_the_reference_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    module._made.cache_clear()
    encoder, reason = choose_encoder("auto", tmp_path / "tokenizer.json")
    assert encoder.name == "tokenizers"
    assert "gigatoken" in (reason or "")
    with pytest.raises(DataError, match="--encoder tokenizers"):
        choose_encoder("gigatoken", tmp_path / "tokenizer.json")

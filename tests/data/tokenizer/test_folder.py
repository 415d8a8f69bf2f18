"""Tokenizers as folders hold them: which token separates documents, and GPT-2's two files against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lightlm.data.tokenizer.folder import read_definition
from lightlm.errors import DataError, UsageError
from tests.corpus import texts, write_jsonl

TRAINED = train_tokenizer(texts(100), 400)
HARD = [
    "I'm 12.5% sure, they'll\n\n  come  ",
    "naïve 深海 \U0001f469‍\U0001f467",
    " <|im_end|> a<|endoftext|>b <tool>x",
    "",
]


def never(repo: str, hint: str) -> Path:
    raise AssertionError(f"{repo} was downloaded")


def write(folder: Path, **files: Any) -> Path:
    """Write JSON files, named without their suffix."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def with_specials(*names: str) -> dict[str, Any]:
    """The definition of TRAINED with more special tokens, from id 400 on."""
    added = [
        {**TRAINED.content["added_tokens"][0], "id": TRAINED.vocab_size + number, "content": name}
        for number, name in enumerate(names)
    ]
    return TRAINED.content | {"added_tokens": [*TRAINED.content["added_tokens"], *added]}


def write_two_files(folder: Path, **files: Any) -> Path:
    model = TRAINED.content["model"]
    write(folder, vocab=model["vocab"], **files)
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "separator"),
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>", "special": True}}}, "<|im_end|>"),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<stop>"}}, "<stop>"),
        ({"config": {"eos_token_id": 400}, "tokenizer_config": {"eos_token": "<stop>"}}, "<|im_end|>"),
        ({"generation_config": {"eos_token_id": [401, 400]}}, "<stop>"),
        ({"config": {"eos_token_id": 2}, "tokenizer_config": {"eos_token": "<stop>"}}, "<stop>"),  # a class's default
        ({"config": {"eos_token_id": 99_999, "end_of_text_id": 401}}, "<stop>"),
        ({"tokenizer_config": {"eos_token": "absent"}, "manifest": ["another program's"]}, "<|endoftext|>"),
    ],
)
def test_the_separator_is_what_the_folder_names(files: dict[str, Any], separator: str, tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer=with_specials("<|im_end|>", "<stop>"), **files)
    assert load_tokenizer(str(folder), never).end_of_text == separator
    assert load_tokenizer(str(folder / "tokenizer.json"), never).end_of_text == separator
    assert load_tokenizer(str(folder), never, "<|im_end|>").end_of_text == "<|im_end|>"


def test_a_separator_that_is_no_token_lists_those_that_are(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer=with_specials("<|im_end|>"))
    with pytest.raises(DataError, match=r"no token '<end>' .*--eot: <\|endoftext\|>, <\|im_end\|>\."):
        load_tokenizer(str(folder), never, "<end>")
    nameless = with_specials("<stop>")
    nameless["added_tokens"] = nameless["added_tokens"][1:]
    folder = write(tmp_path / "nameless", tokenizer=nameless)
    with pytest.raises(DataError, match=r"no end-of-text token .*--eot: <stop>\."):
        load_tokenizer(str(folder), never)


def test_documents_are_separated_by_the_named_token(tmp_path: Path) -> None:
    folder = write(tmp_path / "tok", tokenizer=with_specials("<|im_end|>", "<stop>"))
    source = str(write_jsonl(tmp_path / "in.jsonl", 30))

    def made(name: str, spec: str, end_of_text: str | None = None) -> tuple[str, int]:
        manifest = prepare(source, spec, tmp_path / name, end_of_text=end_of_text, val_fraction=0.3)
        data = DataFolder.open(tmp_path / name)
        documents = [data.tokenizer.decode(ids) for split in ("train", "val") for ids in data.split(split).documents()]
        assert sorted(documents) == sorted(texts(30))
        return manifest.end_of_text, manifest.end_of_text_id

    assert made("one", str(folder), "<stop>") == ("<stop>", TRAINED.vocab_size + 1)
    assert made("two", str(tmp_path / "one")) == ("<stop>", TRAINED.vocab_size + 1)  # a data folder's own
    assert made("trained", "train:300", "<|im_end|>") == ("<|im_end|>", 0)
    assert made("plain", str(folder)) == ("<|endoftext|>", 0)
    with pytest.raises(DataError, match="end_of_text: <stop> there, None now"):
        made("one", str(folder))
    write(folder, tokenizer_config={"eos_token": "<stop>"})
    made("one", str(folder))  # the file names what the option named
    with pytest.raises(DataError, match="end_of_text: None there, <stop> now"):
        made("plain", str(folder))
    with pytest.raises(UsageError, match="--eot"):
        made("blank", str(folder), " ")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
        {
            "added_tokens": {"<|im_end|>": TRAINED.vocab_size, "<tool>": TRAINED.vocab_size + 1},
            "special_tokens_map": {"eos_token": {"content": "<|im_end|>", "lstrip": True, "normalized": False}},
            "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"},
        },
        {"tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": "<|im_end|>", "unk_token": "<|im_end|>"}},
    ],
)
def test_two_files_encode_as_in_transformers(files: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_two_files(tmp_path, **files)
    ours = load_tokenizer(str(folder), never)
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    assert ours.end_of_text_id == theirs.eos_token_id
    plain = [text for text in HARD if "<|" not in text]  # special tokens in texts are ordinary characters for LightLM
    plain += ["a <tool> b"] if "special_tokens_map" in files else []
    for text in (*plain, *texts(20, seed=3)):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids)
    assert read_definition(folder) == read_definition(folder / "vocab.json")


def test_two_files_are_the_definition_that_they_came_from(tmp_path: Path) -> None:
    built = Tokenizer.read(write_two_files(tmp_path))
    assert (built.vocab_size, built.end_of_text_id) == (TRAINED.vocab_size, TRAINED.end_of_text_id)
    assert [built.encode(text) for text in HARD] == [TRAINED.encode(text) for text in HARD]
    assert built.token_bytes().tolist() == TRAINED.token_bytes().tolist()


def break_merges(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nthe\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), r"merges\.txt is missing"),
        (lambda folder: (folder / "vocab.json").unlink(), r"vocab\.json is missing"),
        (break_merges, r"merges\.txt:3: 'the' is not a pair"),
        (lambda folder: (folder / "merges.txt").write_text("x y\n"), r"do not fit together"),
        (lambda folder: (folder / "merges.txt").write_text("t h</w>\n"), r"cannot make one of vocab\.json"),
        (lambda folder: (folder / "vocab.json").write_text("[]"), r"vocab\.json is not a JSON object"),
        (
            lambda folder: write(folder, tokenizer_config={"tokenizer_class": "NoTokenizer"}),
            r"cannot make one of vocab",
        ),
        (lambda folder: write(folder, added_tokens={"<x>": 999}), r"'<x>' should have the id 999"),
        (lambda folder: write(folder, tokenizer=["cut"]), r"is not a tokenizer\.json"),
        (lambda folder: write(folder, generation_config=[]), r"generation_config\.json is not a JSON object"),
    ],
)
def test_damaged_folders_say_what_is_wrong(damage: Any, message: str, tmp_path: Path) -> None:
    damage(write_two_files(tmp_path))
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path), never)

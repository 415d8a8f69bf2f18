"""Tokenizers in GGUF: every way of splitting text, there and back, and in llama.cpp where it is installed."""

import importlib.util
import json
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Definition

from lightlm.convert.gguf.file import export_gguf, import_gguf
from lightlm.convert.gguf.header import read_header
from lightlm.convert.gguf.llamacpp import llama_cpp
from lightlm.convert.gguf.vocabulary import TokenType, write_vocabulary
from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import ConvertError
from tests.convert.gguf.models import MODELS
from tests.convert.gguf.texts import hard_texts
from tests.convert.models import loaded

TEXTS = hard_texts(200)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# As the tokenizer.json files of these models write them.
PATTERNS = {
    "llama-3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen-2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen-3.5": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])
        for name, pattern in PATTERNS.items()
    },
}
NAMES = {"gpt-2": "gpt-2", "smollm": "smollm", "llama-3": "dbrx", "qwen-2": "qwen2", "qwen-3.5": "qwen35"}


def trained(split, change=lambda content: None, added=(), **options):
    """A tokenizer with an own way to split text; `change` edits its tokenizer.json."""
    definition = Definition(models.BPE(**options))
    definition.pre_tokenizer = split
    definition.decoder = decoders.ByteLevel()
    definition.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|endoftext|>", "<|im_end|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    definition.add_tokens([AddedToken(text, normalized=False) for text in added])
    content = json.loads(definition.to_str())
    change(content)
    return Tokenizer(json.dumps(content).encode(), origin="test", end_of_text_id=0)


def in_file(tokenizer, tmp_path, extra_rows=0):
    model = loaded(replace(MODELS["llama"], vocab_size=tokenizer.vocab_size + extra_rows), tokenizer)
    export_gguf(model, tmp_path / "model.gguf", "float32")
    return tmp_path / "model.gguf"


def assert_equal_in_llama_cpp(tokenizer, path):
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not installed; it is in the extra [gguf]")
    with llama_cpp(path, positions=256) as theirs:
        different = [
            text for text in TEXTS if theirs.tokenize(text) != [*tokenizer.context_ids, *tokenizer.encode(text)]
        ]
    assert different == []


@pytest.mark.parametrize("name", SPLITS)
def test_every_way_of_splitting(name, tmp_path):
    """200 texts have the same tokens after the way there and back, and in llama.cpp."""
    tokenizer = trained(SPLITS[name])
    path = in_file(tokenizer, tmp_path)
    assert read_header(path).metadata["tokenizer.ggml.pre"] == NAMES[name]
    back = import_gguf(path).tokenizer
    assert back.difference(tokenizer) == ""
    assert back.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert_equal_in_llama_cpp(tokenizer, path)


def test_whole_words_before_merges(tmp_path):
    """As Llama 3: a word that is a token is taken even where no merges lead to it."""

    def change(content):
        content["model"]["ignore_merges"] = True
        content["model"]["vocab"]["Ġunmergeable"] = len(content["model"]["vocab"])

    tokenizer = trained(SPLITS["llama-3"], change)
    path = in_file(tokenizer, tmp_path)
    assert read_header(path).metadata["tokenizer.ggml.pre"] == "llama-bpe"
    back = import_gguf(path).tokenizer
    assert len(back.encode("x unmergeable")) == len(tokenizer.encode("x unmergeable")) == 2
    assert back.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert_equal_in_llama_cpp(tokenizer, path)


def test_added_tokens_and_rows_without_a_token(tmp_path):
    """Special tokens are not read from text, other added ones are; rows beyond the tokenizer stay unused."""
    tokenizer = trained(SPLITS["gpt-2"], added=["<tool>", "    ", "日本"])
    path = in_file(tokenizer, tmp_path, extra_rows=5)
    types = read_header(path).metadata["tokenizer.ggml.token_type"].tolist()
    assert types[0] == types[1] == TokenType.CONTROL
    assert types[-8:] == [TokenType.USER_DEFINED] * 3 + [TokenType.UNUSED] * 5
    back = import_gguf(path)
    assert back.tokenizer.vocab_size == tokenizer.vocab_size == back.model.config.vocab_size - 5
    assert back.tokenizer.special_tokens == tokenizer.special_tokens
    texts = [*TEXTS, "a<tool>b      日本語<|im_end|>"]
    assert back.tokenizer.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert_equal_in_llama_cpp(tokenizer, path)


def test_beginning_of_text_ends_and_chat_template_are_kept(tmp_path):
    plain = trained(SPLITS["gpt-2"], lambda content: content.update(post_processor=_begins_with("<|im_end|>")))
    settings = {"bos_token": "<|im_end|>", "eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    tokenizer = plain.used_as(1, True, settings, {"eos_token_id": [0, 1]})
    path = in_file(tokenizer, tmp_path)
    back = import_gguf(path).tokenizer
    assert (back.bos_id, back.adds_bos, back.context_ids) == (1, True, [1])
    assert back.end_ids == {0, 1}
    assert dict(back.settings) == settings
    export_huggingface(import_gguf(path), tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [0, 1]}
    assert_equal_in_llama_cpp(tokenizer, path)


def test_the_unknown_token_may_have_id_0_and_a_fourth_end_is_named(caplog):
    plain = trained(SPLITS["gpt-2"])
    settings = {"unk_token": "<|endoftext|>"}
    values = write_vocabulary(plain.used_as(None, False, settings, {"eos_token_id": [0, 1, 2, 3]}), plain.vocab_size)
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    assert repr([plain.name_of(3)]) in caplog.text


def _begins_with(token, index=1):
    sequence = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {token: {"id": token, "ids": [index], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": sequence, "pair": sequence, "special_tokens": special}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), "a way of splitting text"),
        (lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES])), "a way of splitting text"),
        (
            lambda: trained(SPLITS["gpt-2"], lambda c: c.update(normalizer=json.loads(LOWERCASE))),
            "its normalizer Lowercase",
        ),
        (
            lambda: trained(SPLITS["gpt-2"], lambda c: c["added_tokens"][1].update(special=False, lstrip=True)),
            "the added token '<|im_end|>' with lstrip",
        ),
        (lambda: trained(SPLITS["gpt-2"], lambda c: c["model"].update(ignore_merges=True)), "a way of splitting text"),
        (lambda: Tokenizer(WORDS, origin="test", end_of_text_id=0), "its model is WordLevel, must be BPE"),
        (lambda: pieces(lambda c: c.update(pre_tokenizer={"type": "Whitespace"})), "prepares text otherwise"),
        (lambda: pieces(lambda c: c["model"]["merges"].pop()), "its merges are not those of SentencePiece"),
        (lambda: pieces(lambda c: c["model"]["merges"].sort()), "its merges are not those of SentencePiece"),
        (lambda: pieces(lambda c: c["model"].update(byte_fallback=False)), "a token for each byte"),
    ],
)
def test_what_llama_cpp_splits_otherwise_is_refused(tokenizer, message):
    built = tokenizer()
    with pytest.raises(ConvertError, match=message):
        write_vocabulary(built, built.vocab_size)


LOWERCASE = '{"type": "Lowercase"}'
WORDS = Definition(models.WordLevel({"<|endoftext|>": 0, "word": 1}, unk_token="<|endoftext|>")).to_str().encode()


def test_a_normalizer_that_composes_characters_is_left_out(tmp_path):
    """Qwen's; llama.cpp has none."""
    tokenizer = trained(SPLITS["qwen-2"], lambda content: content.update(normalizer={"type": "NFC"}))
    back = import_gguf(in_file(tokenizer, tmp_path)).tokenizer
    composed = [normalizers.NFC().normalize_str(text) for text in TEXTS]
    assert back.encode_batch(composed) == tokenizer.encode_batch(composed)


def pieces(change=lambda content: None):
    """A tokenizer as SentencePiece makes them: scores by the order of training, and every pair that makes a token."""
    trained = Definition(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=900, show_progress=False))
    made = ["".join(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(
        {letter for text in TEXTS for letter in text.replace(" ", "▁") if letter.isalnum() or letter in "▁.,"}
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    names += [token for token in dict.fromkeys(made) if set(token) <= set(letters)]
    merges = [
        [token[:cut], token[cut:]]
        for token in names[3 + 256 + len(letters) :]
        for cut in range(1, len(token))
        if token[:cut] in names and token[cut:] in names
    ]
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for index, name in enumerate(names[:3])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _begins_with("<s>"),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": merges,
        },
    }
    change(content)
    tokenizer = Tokenizer(json.dumps(content).encode(), origin="test", end_of_text_id=2)
    return tokenizer.used_as(1, True, {}, {})


@pytest.mark.parametrize("form", ["prefix", "no prefix", "metaspace"])
def test_sentencepiece(form, tmp_path):
    """As Llama 2: scores in place of merges, bytes for what has no token, a blank and <s> before each text."""

    def change(content):
        if form != "prefix":
            content["decoder"]["decoders"].pop()
            content["normalizer"] = content["normalizer"]["normalizers"][1]
        if form == "metaspace":
            metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
            content.update(normalizer=None, pre_tokenizer=metaspace)

    tokenizer = pieces(change)
    path = in_file(tokenizer, tmp_path)
    back = import_gguf(path).tokenizer
    assert (back.bos_id, back.adds_bos, back.end_of_text_id, back.unknown_id) == (1, True, 2, 0)
    assert back.content["model"]["merges"] == tokenizer.content["model"]["merges"]
    assert back.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    readable = [text for text in TEXTS if "▁" not in text]
    assert [back.decode(ids) for ids in back.encode_batch(readable)] == readable
    assert_equal_in_llama_cpp(tokenizer, path)


def test_every_row_of_sentencepiece_has_a_score(tmp_path):
    """Special tokens beyond model.vocab, as a chat template adds them, and rows without a token."""
    tokenizer = pieces().with_special_tokens(["<|im_start|>", "<|im_end|>"])
    path = in_file(tokenizer, tmp_path, extra_rows=30)
    metadata = read_header(path).metadata
    scores = metadata["tokenizer.ggml.scores"].tolist()
    assert len(scores) == len(metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 30
    assert set(scores[-32:]) == {min(scores)}
    back = import_gguf(path).tokenizer
    assert back.special_tokens == tokenizer.special_tokens
    assert back.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert_equal_in_llama_cpp(tokenizer, path)

"""What an imported model's files say about prompts and answers: read as transformers does, and kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from lightlm.checkpoint import LoadedModel, load_model, save_model
from lightlm.convert.huggingface.folder import export_huggingface, import_huggingface
from lightlm.convert.load import load_pretrained
from lightlm.data.chat.template import ChatTemplate
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import CheckpointError, ConvertError
from lightlm.files import checksum
from tests.evaluate.tiny_run import tiny_model
from tests.generate.tokenizers_at_hand import tokenizer_of

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}é"
GENERATION = {"eos_token_id": [0, 5], "temperature": 0.6, "do_sample": True, "transformers_version": "4.56.0"}
SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": {"content": "<s>", "special": True},
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_start|>",
    "chat_template": TEMPLATE,
    "model_max_length": 77,
}


def write_folder(folder: Path, generation: Any = GENERATION, settings: Any = SETTINGS, **config: Any) -> Path:
    tokenizer = tokenizer_of("byte-level")
    export_huggingface(LoadedModel(tiny_model(tokenizer), tokenizer, Path("x")), folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config), encoding="utf-8")
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_both_conversions_keep_them(tmp_path: Path) -> None:
    given = import_huggingface(write_folder(tmp_path / "hf"))
    save_model(tmp_path / "ours", given.model, given.tokenizer)
    ours = load_model(tmp_path / "ours")
    export_huggingface(ours, tmp_path / "again")
    for loaded in (given, ours, load_pretrained(tmp_path / "again")):
        tokenizer = loaded.tokenizer
        assert tokenizer.generation_config == GENERATION
        assert tokenizer.end_ids == {0, 5, tokenizer.id_of("<|im_end|>")}
        assert ChatTemplate.of(tokenizer).render([{"role": "user", "content": "hi"}]) == "<s>hi<|im_end|>é"
    settings = read(tmp_path / "again", "tokenizer_config.json")
    assert settings["chat_template"] == TEMPLATE
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == (
        "<s>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert (tmp_path / "again" / "generation_config.json").read_text() == json.dumps(GENERATION, indent=2) + "\n"
    assert read(tmp_path / "again", "config.json")["eos_token_id"] == [0, 5]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi<|im_end|>é"
    assert theirs.eos_token == "<|im_end|>"


@pytest.mark.parametrize("chats", [True, False])
def test_the_card_asks_a_chat_model_by_its_template(tmp_path: Path, chats: bool, capsys: Any) -> None:
    settings = {key: value for key, value in SETTINGS.items() if chats or key != "chat_template"}
    export_huggingface(import_huggingface(write_folder(tmp_path / "hf", settings=settings)), tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert ("lightlm generate --chat" in card) is chats
    assert ("apply_chat_template" in card) is chats
    exec("\n".join(line[4:] for line in card.partition("\n## Model")[0].splitlines() if line.startswith("    ")), {})
    assert capsys.readouterr().out


def test_the_end_of_the_documents_of_a_run_is_added(tmp_path: Path) -> None:
    """It may have been trained on documents that end otherwise than the model it began with."""
    folder = write_folder(tmp_path / "hf", GENERATION | {"eos_token_id": 5}, {"eos_token": "<s>"}, eos_token_id=0)
    given = import_huggingface(folder)
    export_huggingface(given, tmp_path / "again")
    assert read(tmp_path / "again", "generation_config.json")["eos_token_id"] == [0, 5]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [0, 5]}, {"eos_token_id": 0}, {0, 5}),
        ({"eos_token_id": [0, 5]}, {"eos_token_id": [0, 5]}, {0, 5}),
        (None, {"eos_token_id": [0, 5]}, {0, 5}),
        ({"eos_token_id": 5}, {"eos_token_id": 0}, {0, 5}),
        ({}, {"eos_token_id": 0}, {0}),
        ({"eos_token_id": None}, {}, {0}),
        ({"eos_token_id": [0, 99999, -1, True, "x"]}, {}, {0}),
    ],
)
def test_every_end_of_text_counts(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    folder = write_folder(tmp_path / "hf", generation, {"tokenizer_class": "GPT2Tokenizer"}, **config)
    assert import_huggingface(folder).tokenizer.end_ids == expected


def test_where_a_template_is_found(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = write_folder(tmp_path / "hf", settings=SETTINGS | {"chat_template": named})
    assert import_huggingface(folder).tokenizer.settings["chat_template"] == "plain"
    (folder / "chat_template.jinja").write_text("a file", encoding="utf-8")  # transformers prefers it
    assert import_huggingface(folder).tokenizer.settings["chat_template"] == "a file"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConvertError, match=r"chat_template\.jinja cannot be read"):
        import_huggingface(folder)


def test_our_own_models_have_none_of_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte-level")
    save_model(tmp_path / "ours", tiny_model(tokenizer), tokenizer)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "complete.json", "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert load_model(tmp_path / "ours").tokenizer.end_ids == {tokenizer.end_of_text_id}


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    given = import_huggingface(write_folder(tmp_path / "hf"))
    save_model(tmp_path / "ours", given.model, given.tokenizer)
    path = tmp_path / "ours" / "generation_config.json"
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged"):
        load_model(tmp_path / "ours")
    marker = read(tmp_path / "ours", "complete.json")
    marker["files"][path.name] = {"bytes": 2, "xxh3": checksum(path)}
    (tmp_path / "ours" / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_model(tmp_path / "ours")


def test_further_tokens_sides_and_named_templates(tmp_path: Path) -> None:
    """Through a checkpoint, and as transformers reads the result."""
    named = [{"name": "tool_use", "template": "tools é"}, {"name": "default", "template": "plain"}]
    said = {
        "chat_template": named,
        "padding_side": "left",
        "additional_special_tokens": ["<s>", {"content": "<|im_end|>"}],
    }
    folder = write_folder(tmp_path / "hf", settings=SETTINGS | said)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("from a file", encoding="utf-8")
    given = import_huggingface(folder)
    save_model(tmp_path / "ours", given.model, given.tokenizer)
    export_huggingface(load_model(tmp_path / "ours"), tmp_path / "again")
    assert import_huggingface(tmp_path / "again").tokenizer.settings == given.tokenizer.settings
    special = read(tmp_path / "again", "special_tokens_map.json")
    assert (special["pad_token"], special["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert special["additional_special_tokens"] == ["<s>", "<|im_end|>"]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs.chat_template == {"default": "plain", "tool_use": "tools é", "rag": "from a file"}
    assert (theirs.padding_side, theirs.pad_token) == ("left", "<|im_start|>")
    assert (
        json.loads((tmp_path / "again" / "tokenizer.json").read_text())["added_tokens"]
        == (json.loads((folder / "tokenizer.json").read_text())["added_tokens"])
    )


def add_token(folder: Path, index: int, content: str) -> None:
    values = read(folder, "tokenizer.json")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append({"id": index, "content": content, **flags, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


def test_added_tokens_without_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "hf", settings=SETTINGS | {"pad_token": "<pad>"})
    size = read(folder, "config.json")["vocab_size"]
    before = import_huggingface(folder).tokenizer
    add_token(folder, size, "<pad>")
    given = import_huggingface(folder).tokenizer
    assert f"<pad> (id {size}): left out, because the model has rows for {size} tokens only" in caplog.text
    assert given.vocab_size == size
    assert given.encode_special("hi<|im_end|><pad>") == before.encode_special("hi<|im_end|><pad>")
    assert given.settings["pad_token"] == given.settings["eos_token"]  # as for our own models
    export_huggingface(import_huggingface(folder), tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert len(again) == size
    assert again.pad_token_id < size
    assert read(tmp_path / "again", "generation_config.json").get("pad_token_id", 0) < size
    add_token(folder, size + 1, "<end>")
    (folder / "config.json").write_text(json.dumps(read(folder, "config.json") | {"eos_token_id": size + 1}))
    with pytest.raises(ConvertError, match=r"tokenizer\.json has \d+ tokens, config\.json's vocab_size is"):
        import_huggingface(folder)


def test_further_tokens_are_written_as_every_version_reads_them(tmp_path: Path) -> None:
    """transformers 5 saves a list as `extra_special_tokens`, for which transformers 4 expects an object."""
    named = {"additional_special_tokens": ["<|im_end|>"], "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    folder = write_folder(tmp_path / "hf", settings=SETTINGS | named)
    export_huggingface(import_huggingface(folder), tmp_path / "again")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        written = read(tmp_path / "again", name)
        assert written["additional_special_tokens"] == ["<|im_end|>", "<|im_start|>"]
        assert "extra_special_tokens" not in written
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert {"<|im_start|>", "<|im_end|>"} <= set(again.all_special_tokens)


def test_no_role_is_invented(tmp_path: Path) -> None:
    """An imported model without a token for padding has none afterwards; our own models pad with end-of-text."""
    folder = write_folder(tmp_path / "hf", settings={"eos_token": "<|im_end|>"})
    (folder / "special_tokens_map.json").unlink()
    export_huggingface(import_huggingface(folder), tmp_path / "again")
    assert "pad_token" not in read(tmp_path / "again", "tokenizer_config.json")
    assert read(tmp_path / "again", "special_tokens_map.json").keys() == {"bos_token", "eos_token"}
    tokenizer = tokenizer_of("byte-level")
    export_huggingface(LoadedModel(tiny_model(tokenizer), tokenizer, Path("x")), tmp_path / "own")
    assert read(tmp_path / "own", "tokenizer_config.json")["pad_token"] == tokenizer.end_of_text
    chat = tokenizer.used_as(None, False, {"chat_template": "{{ messages }}", "eos_token": "x"}, {"eos_token_id": [1]})
    export_huggingface(LoadedModel(tiny_model(chat), chat, Path("x")), tmp_path / "chat")
    assert read(tmp_path / "chat", "tokenizer_config.json")["pad_token"] == tokenizer.end_of_text
    generation = read(tmp_path / "chat", "generation_config.json")
    assert (generation["pad_token_id"], generation["bos_token_id"]) == (tokenizer.end_of_text_id,) * 2


def test_padding_that_only_config_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", None, pad_token_id=3, eos_token_id=[0, 5])
    assert import_huggingface(folder).tokenizer.generation_config == {"eos_token_id": [0, 5], "pad_token_id": 3}


def export(tokenizer: Tokenizer, folder: Path) -> Path:
    export_huggingface(LoadedModel(tiny_model(tokenizer), tokenizer, Path("x")), folder)
    return folder


@pytest.mark.parametrize("pad", [{}, {"pad_token": None}, {"pad_token": "<|im_start|>"}])
def test_a_model_that_chats_by_a_tokenizer_that_names_its_roles(tmp_path: Path, pad: Any) -> None:
    """As SmolLM2's, in data that a model was trained on from scratch: LightLM puts end-of-text before its texts."""
    plain = tokenizer_of("byte-level")
    roles = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<s>", "chat_template": "{{ messages }}"}
    said = plain.used_as(None, False, roles | pad, {})
    end, turn = plain.end_of_text_id, plain.id_of("<|im_end|>")
    folder = export(plain.chatting_like(said), tmp_path / "hf")
    padding = end if pad.get("pad_token") is None else plain.id_of(pad["pad_token"])
    expected = {"bos_token_id": end, "eos_token_id": turn, "pad_token_id": padding}
    assert read(folder, "generation_config.json") == expected | {"eos_token_id": [end, turn]}
    assert read(folder, "tokenizer_config.json")["pad_token"] == plain.name_of(padding)


def test_the_ids_of_an_import_without_generation_settings(tmp_path: Path) -> None:
    """Those that config.json has, as transformers takes them; no token for padding is invented."""
    folder = write_folder(tmp_path / "hf", None, {"eos_token": "<|im_end|>"}, eos_token_id=[0, 5])
    (folder / "special_tokens_map.json").unlink()
    export_huggingface(import_huggingface(folder), tmp_path / "again")
    bos = read(folder, "config.json")["bos_token_id"]
    assert read(tmp_path / "again", "generation_config.json") == {"bos_token_id": bos, "eos_token_id": [0, 5]}
    write_folder(tmp_path / "padded", None, {"eos_token": "<|im_end|>"}, pad_token_id=3)
    export_huggingface(import_huggingface(tmp_path / "padded"), tmp_path / "again padded")
    expected = {"bos_token_id": bos, "eos_token_id": 0, "pad_token_id": 3}
    assert read(tmp_path / "again padded", "generation_config.json") == expected


def test_the_end_of_text_of_a_chat_model_survives_both_conversions(tmp_path: Path) -> None:
    plain = tokenizer_of("byte-level")
    chat = plain.used_as(None, False, {"chat_template": "{{ messages }}", "eos_token": "<|im_end|>"}, {})
    turn, end = plain.id_of("<|im_end|>"), plain.end_of_text_id
    folder = export(plain.used_as(None, False, {}, {"eos_token_id": [end]}).chatting_like(chat), tmp_path / "hf")
    assert read(folder, "generation_config.json")["eos_token_id"] == [turn, end]
    assert read(folder, "config.json")["eos_token_id"] == [end, turn]  # LightLM reads the first as end of text
    back = import_huggingface(folder).tokenizer
    assert (back.end_of_text_id, back.end_ids) == (end, {end, turn})


def test_inputs_that_the_models_read_are_named(tmp_path: Path) -> None:
    """transformers 4 would return token_type_ids too: Llama refuses them, and GPT-2 adds embeddings for them."""
    folder = export(tokenizer_of("byte-level"), tmp_path / "hf")
    assert read(folder, "tokenizer_config.json")["model_input_names"] == ["input_ids", "attention_mask"]

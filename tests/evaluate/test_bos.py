"""Tokens before a text, compared with lm-eval's `hf` on the same folder."""

import json
from pathlib import Path

import pytest

from lightlm.checkpoint import LoadedModel, load_model, save_model
from lightlm.convert.huggingface.folder import export_huggingface
from lightlm.convert.load import load_pretrained
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import UsageError
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks.manager import Tasks
from tests.evaluate.test_harness import CONTEXTS, LONG, instances
from tests.evaluate.tiny_run import tiny_model, tiny_tokenizer

START = "<s>"


def definition(framed: bool) -> dict:
    """A tokenizer.json with the entry `<s>`, which its post-processor puts before a text, as Llama's does."""
    values = json.loads(tiny_tokenizer().definition)
    start = 1 + max(values["model"]["vocab"].values())
    entry = {"id": start, "content": START, "single_word": False, "lstrip": False, "rstrip": False}
    values["added_tokens"].append({**entry, "normalized": False, "special": True})
    if framed:
        pieces = [{"SpecialToken": {"id": START, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        values["post_processor"] = {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {START: {"id": START, "ids": [start], "tokens": [START]}},
        }
    return values


def write_folder(folder: Path, framed: bool, **names: str | None) -> Path:
    """A model in Hugging Face's form whose tokenizer files are written by hand."""
    content = json.dumps(definition(framed)).encode()
    tokenizer = Tokenizer(content, origin="test")
    export_huggingface(LoadedModel(tiny_model(tokenizer), tokenizer, Path("x")), folder)
    (folder / "tokenizer.json").write_bytes(content)
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kept, **names}))
    (folder / "special_tokens_map.json").unlink()  # the export's own, which names other tokens
    return folder


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize(
    ("framed", "names"),
    [
        (True, {"bos_token": START}),  # Llama
        (False, {"bos_token": START}),  # SmolLM2-Instruct: has the token, adds it nowhere
        (False, {}),  # GPT-2
    ],
    ids=["added", "named", "none"],
)
def test_scores_and_texts_are_those_of_lm_evals_own_model(
    tmp_path: Path, framed: bool, names: dict[str, str], add_bos_token: bool | None
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = write_folder(tmp_path / "hf", framed, **names)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2, add_bos_token=add_bos_token)
    ours = LightLM(load_pretrained(folder), add_bos_token=add_bos_token)
    assert ours.prefix_token_id == theirs.prefix_token_id
    if names or not add_bos_token:  # without such a token `hf` adds none
        assert ours.tok_encode("The cat") == theirs.tok_encode("The cat")
    else:
        assert ours.tok_encode("The cat") == [ours.eot_token_id, *theirs.tok_encode("The cat")]
        return
    for mine, hf in zip(*(m.loglikelihood(instances("loglikelihood", CONTEXTS)) for m in (ours, theirs)), strict=True):
        assert mine == (pytest.approx(hf[0], abs=1e-3), hf[1])
    rolling = instances("loglikelihood_rolling", [(LONG,), ("Ω",)])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)
    settings = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    prompts = instances("generate_until", [("The cat sat", settings)])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_it_survives_conversion_both_ways(tmp_path: Path) -> None:
    imported = load_pretrained(write_folder(tmp_path / "hf", True, bos_token=START))
    save_model(tmp_path / "ours", imported.model, imported.tokenizer)
    converted = load_model(tmp_path / "ours")
    export_huggingface(converted, tmp_path / "again")
    expected = LightLM(imported).tok_encode("The cat")
    assert expected[0] == imported.tokenizer.bos_id != imported.tokenizer.end_of_text_id
    assert LightLM(converted).tok_encode("The cat") == LightLM(load_pretrained(tmp_path / "again")).tok_encode(
        "The cat"
    )
    assert LightLM(converted).tok_encode("The cat") == expected
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / "again"))("The cat")["input_ids"] == expected


def test_a_model_of_ours_is_shown_texts_as_in_training_whatever_its_tokenizer_adds(tmp_path: Path) -> None:
    tokenizer = Tokenizer(json.dumps(definition(True)).encode(), origin="test")
    loaded = LoadedModel(tiny_model(tokenizer), tokenizer, Path("runs/x"))
    plain = tokenizer.encode("The cat")
    assert LightLM(loaded).tok_encode("The cat") == plain
    assert LightLM(loaded).prefix_token_id == tokenizer.end_of_text_id
    before = LightLM(loaded, add_bos_token=True)
    assert before.tok_encode("The cat") == [tokenizer.end_of_text_id, *plain]
    entry = {"id": tokenizer.end_of_text_id, "token": "<|endoftext|>"}
    assert before.describe_bos("yes") == {"setting": "yes", "before_contexts": [entry], "without_context": entry}


def test_a_token_named_in_another_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", False)
    start = definition(False)["added_tokens"][-1]["id"]
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": START}}))
    assert load_pretrained(folder).tokenizer.bos_id == start
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": None}))
    assert load_pretrained(folder).tokenizer.bos_id is None  # Qwen's: nothing, although config.json names one


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(UsageError, match="--bos perhaps"):
        Tasks(Settings(["heldout"], bos="perhaps"))

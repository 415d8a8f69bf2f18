"""nanoGPT's ckpt.pt against its definition in float64, and against transformers' GPT-2."""

import json
import pickle
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lightlm.convert.formats import FORMATS, format_of
from lightlm.convert.load import find_start, load_pretrained
from lightlm.errors import ConvertError
from tests.cli.runner import Runner
from tests.convert.programs.reference import gelu, gpt2_logits, gpt2_shapes, greedy, largest_difference, numbers

TEXT = "To be, or not to be:\nthat is the question.\n"
CHARACTERS = sorted(set(TEXT))


def write_checkpoint(path, *, prefix="", data_set="shakespeare_char", drop=(), **shape):
    """As train.py saves it, with AdamW's state; return the tensors."""
    bias = shape.setdefault("bias", False)
    tensors = numbers(gpt2_shapes(**shape))
    state = tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "bias": bias, "dropout": 0.0}
    arguments["vocab_size"] = shape.get("vocab", 300)
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": {key: value for key, value in arguments.items() if key not in drop},
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": data_set, "compile": bool(prefix)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return tensors


def write_characters(path, characters=CHARACTERS):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = {character: index for index, character in enumerate(characters)}
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(characters)), "stoi": ids}
    path.write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_logits_are_those_of_its_definition(bias, prefix, tokenizer, tmp_path):
    tensors = write_checkpoint(tmp_path / "ckpt.pt", bias=bias, prefix=prefix)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_pretrained(tmp_path / "ckpt.pt")
    tokens = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(1))
    logits = gpt2_logits(tensors, tokens, heads=4, activation=gelu)
    assert largest_difference(loaded, logits, tokens) < 1e-5
    assert logits.abs().max() > 1
    assert loaded.model.config.bias == bias
    assert loaded.tokenizer.sha256 == tokenizer.sha256


def test_transformers_computes_the_same(tokenizer, tmp_path):
    """GPT2LMHeadModel with the same weights and GELU itself."""
    tensors = write_checkpoint(tmp_path / "ckpt.pt", bias=True)
    tokenizer.save(tmp_path / "tokenizer.json")
    config = GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=4, activation_function="gelu")
    theirs = GPT2LMHeadModel(config).eval()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: tensor.T if name.endswith(turned) else tensor for name, tensor in tensors.items()}
    theirs.load_state_dict(state | {"lm_head.weight": tensors["transformer.wte.weight"]})
    tokens = torch.arange(48)[None] * 6
    with torch.no_grad():
        assert largest_difference(load_pretrained(tmp_path), theirs(tokens).logits, tokens) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_it_exports_to_transformers(bias, tokenizer, tmp_path):
    """GPT2LMHeadModel has biases always: those of a model without are zeros."""
    write_checkpoint(tmp_path / "ckpt.pt", bias=bias)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_pretrained(tmp_path)
    FORMATS["hf"].write(loaded, tmp_path / "hf", torch.float32)
    tokens = torch.arange(48)[None] * 6
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert largest_difference(loaded, theirs(tokens).logits, tokens) < 1e-5
        assert largest_difference(load_pretrained(tmp_path / "hf"), theirs(tokens).logits, tokens) < 1e-5
    assert theirs.config.activation_function == "gelu"


def test_the_commands_open_it(tmp_path, monkeypatch, capsys):
    """A folder of nanoGPT: out-char/ckpt.pt beside data/char/meta.pkl, where its sample.py looks for it."""
    monkeypatch.chdir(tmp_path)
    tensors = write_checkpoint(tmp_path / "out-char" / "ckpt.pt", data_set="char", vocab=len(CHARACTERS))
    write_characters(tmp_path / "data" / "char" / "meta.pkl")
    expected = greedy(
        lambda tokens: gpt2_logits(tensors, tokens, heads=4, activation=gelu),
        [CHARACTERS.index(character) for character in "to be"],
        30,
    )
    lightlm = Runner(monkeypatch, capsys)
    arguments = ("to be", "--temperature", "0", "--max-new-tokens", "30", "--json")
    text = "".join(CHARACTERS[index] for index in expected).replace("\n", "\\n")
    assert lightlm("convert", "out-char", "--verify").code == 0
    assert lightlm("convert", "out-char", "--to", "hf", "--verify").code == 0
    for name in ("config.json", "generation_config.json"):  # of the end-of-text token, the model has no row
        assert json.loads((tmp_path / "out-char-hf" / name).read_text())["eos_token_id"] is None
    assert AutoTokenizer.from_pretrained(tmp_path / "out-char-hf").eos_token is None
    for model in ("out-char/ckpt.pt", "out-char", "out-char-lightlm", "out-char-hf"):
        assert text in lightlm("generate", *arguments, "--checkpoint", model).stdout
    assert find_start("out-char").model.vocab_size == len(CHARACTERS)
    # An empty prompt begins with a line end, and a text never ends by itself.
    tokenizer = load_pretrained("out-char").tokenizer
    assert tokenizer.start_id == CHARACTERS.index("\n")
    assert not tokenizer.end_ids & set(range(len(CHARACTERS)))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    # A configuration that names an end of text for which there is no row belongs to another model.
    config = tmp_path / "out-char-hf" / "config.json"
    config.write_text(config.read_text().replace('"eos_token_id": null', f'"eos_token_id": {len(CHARACTERS)}'))
    with pytest.raises(ConvertError, match="belongs to another model"):
        load_pretrained("out-char-hf")


def test_padded_vocabularies_take_gpt2s_tokenizer(tokenizer, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "ckpt.pt", data_set="openwebtext", vocab=50_304)
    monkeypatch.setattr("lightlm.data.tokenizer.load_tokenizer", lambda name, _: {"gpt2": tokenizer}[name])
    assert load_pretrained(tmp_path / "ckpt.pt").tokenizer is tokenizer


def test_gpt2s_tokenizer_without_a_network(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "ckpt.pt", data_set="openwebtext", vocab=50_257)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ConvertError, match=r"copy the model's tokenizer\.json into"):
        load_pretrained(tmp_path / "ckpt.pt")


def test_checkpoints_of_other_times(tokenizer, tmp_path):
    """Without `bias` among its arguments, with a mask per block, and with a head of its own."""
    tensors = write_checkpoint(tmp_path / "ckpt.pt", bias=True, drop=("bias",))
    tokenizer.save(tmp_path / "tokenizer.json")
    content = torch.load(tmp_path / "ckpt.pt")
    content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    content["model"]["lm_head.weight"] = torch.randn(300, 32)
    torch.save(content, tmp_path / "ckpt.pt")
    loaded = load_pretrained(tmp_path / "ckpt.pt")
    assert (loaded.model.config.bias, loaded.model.config.tie_embeddings) == (True, False)
    tokens = torch.arange(20)[None]
    logits = gpt2_logits(tensors, tokens, heads=4, activation=gelu)
    assert largest_difference(loaded, logits, tokens) > 0.1  # the head counts


def test_what_does_not_fit_is_named(tokenizer, tmp_path):
    path = tmp_path / "ckpt.pt"
    write_checkpoint(path)
    with pytest.raises(ConvertError, match=r"holds no tokenizer, there is none beside it, and its vocabulary of 300"):
        load_pretrained(path)
    write_characters(tmp_path / "meta.pkl", [chr(200 + index) for index in range(301)])
    with pytest.raises(ConvertError, match=r"vocabulary of 300, and the tokenizer beside it has 302 entries"):
        load_pretrained(path)
    (tmp_path / "meta.pkl").unlink()
    tokenizer.save(tmp_path / "tokenizer.json")
    for change, message in (
        ({"n_layer": 3}, "n_layer is 3, but the weights have 2 blocks"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, not a whole number of at most 16,777,216"),
        ({"n_embd": 32.0}, r"n_embd is 32\.0, not a whole number"),
        ({"n_head": -4}, "n_head is -4"),
        ({"n_head": 5}, "5 does not divide hidden_size 32"),
        ({"bias": "yes"}, "bias is 'yes', must be False or True"),
        ({"bias": True}, r"transformer\.h\.0\.ln_1\.bias is missing"),
    ):
        content = torch.load(path)
        content["model_args"] |= change
        shutil.copy(path, tmp_path / "other.pt")
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ConvertError, match=message):
            load_pretrained(tmp_path / "other.pt")
    content = torch.load(path)
    del content["model_args"]
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ConvertError, match="it has no model_args"):
        load_pretrained(tmp_path / "other.pt")


def test_only_one_format_takes_it(tmp_path):
    write_checkpoint(tmp_path / "ckpt.pt")
    assert [known.name for known in FORMATS.values() if known.detect(tmp_path / "ckpt.pt")] == ["nanogpt"]
    found = format_of(tmp_path)
    assert found is not None
    assert found.name == "nanogpt"

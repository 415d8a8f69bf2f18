"""llm.c's .bin files against their definition, and its file of token bytes against the tokenizer it came from."""

import struct

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightlm.convert.formats import FORMATS
from lightlm.convert.load import load_pretrained
from lightlm.data.tokenizer import train_tokenizer
from lightlm.data.tokenizer.definition import byte_alphabet
from lightlm.errors import ConvertError
from lightlm.generate.engine import generate
from lightlm.generate.sampling import GREEDY
from tests.convert.conftest import TEXTS
from tests.convert.programs.reference import gelu_tanh, gpt2_logits, gpt2_shapes, greedy, largest_difference, numbers

VOCABULARY, PADDED = 300, 384
GROUPS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def write_checkpoint(path, version=3, **changes):
    """As write_model of train_gpt2.py: header, tables, then each kind of tensor for all blocks; return the tensors."""
    tensors = numbers(gpt2_shapes(vocab=VOCABULARY))
    if version == 5:
        tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    padding = torch.full((PADDED - VOCABULARY, 32), 1e9)
    table = torch.cat((tensors["transformer.wte.weight"], padding))
    order = [table, tensors["transformer.wpe.weight"]]
    for group in GROUPS:
        for kind in ("weight", "bias"):
            order += [tensors[f"transformer.h.{block}.{group}.{kind}"] for block in range(2)]
    order += [tensors["transformer.ln_f.weight"], tensors["transformer.ln_f.bias"]]
    header = {"magic": 20240326, "version": version, "block_size": 48, "vocab_size": VOCABULARY, "n_layer": 2}
    header |= {"n_head": 4, "n_embd": 32, "padded_vocab_size": PADDED, **changes}
    data = torch.cat([tensor.flatten() for tensor in order])
    content = data.bfloat16().view(torch.int16).numpy() if version == 5 else data.numpy()
    path.write_bytes(struct.pack("<256i", *header.values(), *[0] * (256 - len(header))) + content.tobytes())
    return tensors


def write_token_bytes(path, tokenizer, version=2):
    """As write_tokenizer of train_gpt2.py: end-of-text is the last token, others are in the order of their merges."""
    alphabet = byte_alphabet()
    vocabulary = tokenizer.content["model"]["vocab"]
    words = [name for name in sorted(vocabulary, key=vocabulary.__getitem__) if name != tokenizer.end_of_text]
    tokens = [bytes(alphabet[character] for character in name) for name in words] + [b"<|endoftext|>"]
    header = struct.pack("<256i", 20240328, version, len(tokens), len(tokens) - 1 if version == 2 else 0, *[0] * 252)
    path.write_bytes(header + b"".join(bytes([len(token)]) + token for token in tokens))
    return [*words, "<|endoftext|>"]


@pytest.mark.parametrize("version", [3, 5])
def test_logits_are_those_of_its_definition(version, tokenizer, tmp_path):
    tensors = write_checkpoint(tmp_path / "model.bin", version)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_pretrained(tmp_path / "model.bin")
    tokens = torch.randint(VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
    logits = gpt2_logits(tensors, tokens, heads=4, activation=gelu_tanh)
    assert largest_difference(loaded, logits, tokens) < 1e-5
    assert loaded.model.config.vocab_size == VOCABULARY  # without the rows of padding


def test_transformers_computes_the_same(tokenizer, tmp_path):
    tensors = write_checkpoint(tmp_path / "model.bin")
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=4)).eval()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: tensor.T if name.endswith(turned) else tensor for name, tensor in tensors.items()}
    theirs.load_state_dict(state | {"lm_head.weight": tensors["transformer.wte.weight"]})
    tokens = torch.arange(48)[None] * 6
    with torch.no_grad():
        assert largest_difference(load_pretrained(tmp_path / "model.bin"), theirs(tokens).logits, tokens) < 1e-5


@pytest.mark.parametrize("version", [1, 2])
def test_its_token_bytes_make_the_tokenizer(version, tmp_path):
    original = train_tokenizer([*TEXTS, "the cat and the hat, that they had: another mother"] * 3, VOCABULARY)
    assert original.vocab_size == VOCABULARY
    names = write_token_bytes(tmp_path / "gpt2_tokenizer.bin", original, version)
    tensors = write_checkpoint(tmp_path / "model.bin")
    loaded = load_pretrained(tmp_path / "model.bin")
    assert (loaded.tokenizer.end_of_text_id, loaded.tokenizer.end_of_text) == (299, "<|endoftext|>")
    for text in (*TEXTS, "\x00\x7f\u00a0 \u2028 another  mother\r\n", "\U0001f600 there"):
        ids = loaded.tokenizer.encode(text)
        assert [names[index] for index in ids] == [original.name_of(index) for index in original.encode(text)]
        assert loaded.tokenizer.decode(ids) == text
    prompt = loaded.tokenizer.encode("the cat")
    [completion] = generate(loaded.model, [prompt], 12, GREEDY, vocab_size=300)
    expected = greedy(lambda tokens: gpt2_logits(tensors, tokens, heads=4, activation=gelu_tanh), prompt, 12)
    assert list(completion.ids) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 2**30}, "its header has n_layer 1073741824"),
        ({"n_layer": 2**23}, r"has [\d,]+ bytes, but the model in its header takes [\d,]{15,}"),
        ({"n_embd": -1}, "its header has n_embd -1"),
        ({"n_head": 0}, "its header has n_head 0"),
        ({"n_head": 5}, "5 does not divide hidden_size 32"),
        ({"padded_vocab_size": 10}, "pads 300 tokens to fewer"),
        ({"version": 1}, r"has version 1 of llm\.c's form; LightLM reads 3 \(float32\) and 5 \(bfloat16\)"),
        ({"magic": 20240803}, "holds Llama 3 in llm.c's form"),
    ],
)
def test_headers_that_do_not_fit(changes, message, tokenizer, tmp_path):
    write_checkpoint(tmp_path / "model.bin", **changes)
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ConvertError, match=message):
        load_pretrained(tmp_path / "model.bin")


def test_damaged_files(tokenizer, tmp_path):
    path = tmp_path / "model.bin"
    write_checkpoint(path)
    whole = path.read_bytes()
    for damaged, message in ((whole[:-2], "cut off or damaged"), (whole[:700], "ends inside its header")):
        path.write_bytes(damaged)
        with pytest.raises(ConvertError, match=message):
            load_pretrained(path)
    path.write_bytes(whole)
    beside = tmp_path / "gpt2_tokenizer.bin"
    write_token_bytes(beside, train_tokenizer(TEXTS, VOCABULARY))
    content = beside.read_bytes()
    for damaged, message in (
        (content[:-3], "its 3.. tokens take"),
        (content[:500], "is not a tokenizer of llm.c|take"),
        (struct.pack("<256i", 1, *[0] * 255), "is not a tokenizer of llm.c: magic 1"),
        (struct.pack("<256i", 20240328, 2, 2**31 - 1, *[0] * 253), "is not a tokenizer of llm.c"),
        (content[:1024] + bytes([1, 65]) * 20 + content[1064:], "is not a vocabulary of byte-level BPE|take"),
    ):
        beside.write_bytes(damaged)
        with pytest.raises(ConvertError, match=message):
            load_pretrained(path)


def test_token_shards_are_not_models(tmp_path):
    (tmp_path / "a_train_000000.bin").write_bytes(struct.pack("<256i", 20240520, 1, *[0] * 254))
    assert not any(known.detect(tmp_path / "a_train_000000.bin") for known in FORMATS.values())

"""Folders that are damaged or made to harm: one clear error, nothing executed, memory bounded."""

import contextlib
import json
import struct
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightlm.convert.huggingface.config import read_config, write_config
from lightlm.convert.huggingface.folder import import_huggingface
from lightlm.convert.huggingface.layouts import LAYOUTS
from lightlm.errors import ConvertError, LightLMError
from lightlm.model.config import ModelConfig
from tests.convert.models import edit, write
from tests.convert.test_pickles import Attack

transformers = pytest.importorskip("transformers")


def tiny(vocab_size):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=48, vocab_size=vocab_size, eos_token_id=0, bos_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def folder(tokenizer, tmp_path):
    return write(tiny(tokenizer.vocab_size), tokenizer, tmp_path / "hf")


@pytest.fixture
def sharded(tokenizer, tmp_path):
    return write(tiny(tokenizer.vocab_size), tokenizer, tmp_path / "hf", max_shard_size="30KB")


@pytest.fixture
def pickled(folder):
    """The folder with its weights as transformers once wrote them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def refused(folder, match):
    with pytest.raises(LightLMError, match=match) as error:
        import_huggingface(folder)
    assert len(str(error.value)) < 1000


def change(folder, **tensors):
    """Replace tensors of a safetensors file; None removes one."""
    path = folder / "model.safetensors"
    state = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def test_a_pickle_that_would_run_code(pickled, tmp_path):
    marker = tmp_path / "ran"
    state = torch.load(pickled / "pytorch_model.bin")
    torch.save({**state, "model.norm.weight": Attack(marker)}, pickled / "pytorch_model.bin")
    refused(pickled, r"pytorch_model\.bin is refused: reading it would call \S+, which could be any code")
    assert not marker.exists()


def test_a_pickle_of_something_else(pickled):
    torch.save([torch.ones(2)], pickled / "pytorch_model.bin")
    refused(pickled, r"pytorch_model\.bin is not a model's weights")


@pytest.mark.parametrize("part", ["../{}", "/{}", "a/{}", "..\\{}", "", "a" * 5000])
def test_an_index_that_points_elsewhere(part, sharded, tmp_path):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(iter(index.values()))
    (tmp_path / name).write_bytes((sharded / name).read_bytes())
    moved = {key: part.format(name) if value == name else value for key, value in index.items()}
    edit(sharded / "model.safetensors.index.json", weight_map=moved)
    refused(sharded, r"index\.json names '.*', which is not a file of its folder")


@pytest.mark.parametrize("weights", [{}, {"a": 3}, {"a": ["b"]}, "x", None])
def test_an_index_without_a_map(weights, sharded):
    edit(sharded / "model.safetensors.index.json", weight_map=weights)
    refused(sharded, r"index\.json is damaged: it has no weight_map")


def test_a_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    refused(sharded, rf"{second.name} holds {name}, which another file of")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"model__norm__weight": None}, r"model\.norm\.weight is missing"),
        ({"model__norm__other": torch.ones(3)}, r"model\.norm\.other belongs to no part"),
        ({"model__norm__weight": torch.ones(31)}, r"norm\.weight has shape \(31,\)"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, r"norm\.weight is stored as int8, perhaps quant"),
        ({"model__norm__weight": torch.ones(32).to(torch.float8_e4m3fn)}, r"stored as float8_e4m3fn"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.complex64)}, r"stored as complex64"),
        ({"model__norm__weight": torch.tensor(1.0)}, r"model\.norm\.weight is a single number"),
    ],
)
def test_tensors_that_do_not_fit(tensors, match, folder):
    change(folder, **tensors)
    refused(folder, match)


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[1099511627776,1099511627776,1099511627776],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        '{"a"',
    ],
)
def test_headers_that_lie(header, folder):
    content = struct.pack("<Q", len(header)) + header.encode() + bytes(4)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors cannot be read: it is damaged or cut off")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + content[8:])
    refused(folder, r"model\.safetensors cannot be read: it is damaged or cut off")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**9}, "describes a model of .* parameters, but its weights have only"),
        ({"num_hidden_layers": 40, "hidden_size": 2, "intermediate_size": 2}, "at least 40 tensors, and there are 21"),
        ({"vocab_size": 10**15}, "vocab_size: must be below 2,147,483,648"),
        ({"hidden_size": 2**31 - 1}, "describes a model of"),
        ({"intermediate_size": 2**31 - 1}, "describes a model of"),
        ({"head_dim": 2**31 - 2}, "describes a model of"),
        ({"num_attention_heads": 10**9, "num_key_value_heads": 1, "head_dim": 8}, "describes a model of"),
        ({"hidden_size": 32.5}, "hidden_size is '32.5', not a whole number"),
        ({"hidden_size": True}, "hidden_size is 'True', not a whole number"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', not a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
        ({"num_hidden_layers": -3}, "num_layers: must be at least 1"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"max_position_embeddings": 10**30}, "max_seq_len: must be below 2,147,483,648"),
        ({"initializer_range": 10**400}, "init_std: must be a number above 0"),
    ],
)
def test_absurd_configurations(changes, match, folder):
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edit(folder / "config.json", **changes)
    refused(folder, match)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e5 * (1024 if sys.platform == "darwin" else 1)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, derandomize=True)
@given(st.data())
def test_any_configuration_is_read_or_refused(data):
    """A configuration of each class, with some of its values replaced by anything that JSON can hold."""
    model_type = data.draw(st.sampled_from(sorted(LAYOUTS)))
    layout = LAYOUTS[model_type]
    shape = {name: next(iter(known)) for name, (_, known) in layout.choices.items()}
    shape["attention"] = layout.fixed["attention"]
    config = ModelConfig(num_layers=2, hidden_size=8, num_heads=2, max_seq_len=8, vocab_size=9, **shape).resolved()
    values = {**write_config(model_type, config), "rope_scaling": None, "sliding_window": None, "layer_types": None}
    names = data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3, unique=True))
    changed = values | {name: data.draw(JUNK, label=name) for name in names}
    with contextlib.suppress(ConvertError):
        read_config(changed, "config.json")


def test_experts_by_the_billion(folder):
    edit(
        folder / "config.json", model_type="qwen3_moe", num_experts=10**9, num_experts_per_tok=2, hidden_size=1,
        moe_intermediate_size=1, decoder_sparse_step=1, head_dim=2, norm_topk_prob=True, rope_theta=1e4,
    )  # fmt: skip
    refused(folder, "describes a model of")
    edit(folder / "config.json", num_experts=10**5)
    refused(folder, r"at least 200,000 tensors, and there are 21")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_lists_in_lists(name, folder):
    (folder / name).write_text("[" * 200_000)
    refused(folder, "recursion")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
def test_git_lfs_pointers(name, folder):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(folder, rf"{name} is a Git LFS pointer, not the file itself; run `git lfs pull`")

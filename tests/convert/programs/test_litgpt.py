"""litgpt's folders against its definition in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import yaml

from lightlm.convert.formats import FORMATS
from lightlm.convert.load import load_pretrained
from lightlm.errors import ConvertError
from lightlm.generate.engine import generate
from lightlm.generate.sampling import GREEDY
from tests.convert.programs.reference import (
    attention,
    doubles,
    gelu,
    gelu_tanh,
    greedy,
    largest_difference,
    layer_norm,
    linear,
    numbers,
    rms_norm,
    rotated,
)

# The settings of its Config, 0.5.13, as save_config writes them; widths, then what litgpt derives.
CONFIG = {
    "name": "", "hf_config": {}, "block_size": 48, "n_layer": 2, "n_embd": 32, "vocab_size": 300,
    "padding_multiple": 64, "padded_vocab_size": 320, "norm_class_name": "RMSNorm", "norm_eps": 1e-5,
    "norm_qk": False, "norm_qk_type": "default", "post_attention_norm": False, "post_mlp_norm": False,
    "parallel_residual": False, "shared_attention_norm": False, "n_head": 4, "head_size": 8, "n_query_groups": 2,
    "attn_bias": False, "attention_scores_scalar": None, "sliding_window_size": None, "sliding_window_indices": None,
    "attention_logit_softcapping": None, "rope_base": 10_000, "rotary_percentage": 1.0, "rope_condense_ratio": 1,
    "rope_adjustments": None, "rope_interleave": False, "intermediate_size": 48, "moe_intermediate_size": None,
    "bias": False, "mlp_class_name": "LLaMAMLP", "gelu_approximate": "none", "n_expert": 0, "n_shared_expert": None,
    "n_expert_groups": None, "n_topk_groups": None, "n_topk_scores_per_group": None, "n_expert_per_token": 0,
    "first_k_dense_replace": None, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "scale_embeddings": False,
    "lm_head_bias": False, "final_logit_softcapping": None, "norm_1": True, "norm_2": True, "latent_attention": None,
    "rope_local_base_freq": None, "rope_indices": None,
}  # fmt: skip
NEOX = {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm"}
MIXTURE = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 16}
SHAPES = {
    "Llama": {},
    "Qwen2": {"attn_bias": True, "norm_eps": 1e-6},
    "Qwen3": {"norm_qk": True, "head_size": 16, "rope_base": 1_000_000},
    "biases": {"bias": True},
    "sequential GPT-NeoX": {**NEOX, "bias": True, "n_query_groups": 4},
    "LayerNorm alone has biases": {**NEOX, "gelu_approximate": "tanh", "n_query_groups": 1},
    "scaled embeddings": {"scale_embeddings": True},
    "condensed positions": {"rope_condense_ratio": 2},
    "linear scaling": {"rope_adjustments": {"factor": 4.0}},
    "Llama 3's scaling": {
        "rope_adjustments": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
    },
    "Mixtral": MIXTURE,
    "shared experts": {**MIXTURE, "n_shared_expert": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
}


def shapes_of(config):
    """The tensors of its GPT."""
    width, heads, groups, size = (config[key] for key in ("n_embd", "n_head", "n_query_groups", "head_size"))
    shapes = {"lm_head.weight": (320, width), "transformer.wte.weight": (320, width)}

    def norm(name, channels=width):
        shapes[f"{name}.weight"] = (channels,)
        if config["norm_class_name"] == "LayerNorm":
            shapes[f"{name}.bias"] = (channels,)

    def project(name, inputs, outputs, bias=config["bias"]):
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def network(name, inner, kind):
        for part in ("fc",) if kind == "GptNeoxMLP" else ("fc_1", "fc_2"):
            project(f"{name}.{part}", width, inner)
        project(f"{name}.proj", inner, width)

    for i in range(config["n_layer"]):
        block = f"transformer.h.{i}"
        norm(f"{block}.norm_1")
        project(f"{block}.attn.qkv", width, (heads + 2 * groups) * size, config["bias"] or config["attn_bias"])
        project(f"{block}.attn.proj", heads * size, width)
        if config["norm_qk"]:
            norm(f"{block}.attn.norm_q", size)
            norm(f"{block}.attn.norm_k", size)
        norm(f"{block}.norm_2")
        if config["mlp_class_name"] == "LLaMAMoE" and i >= (config["first_k_dense_replace"] or 0):
            project(f"{block}.mlp.gate", width, config["n_expert"])
            for expert in range(config["n_expert"]):
                network(f"{block}.mlp.experts.{expert}", config["moe_intermediate_size"], "LLaMAMLP")
            if config["n_shared_expert"]:
                inner = config["moe_intermediate_size"] * config["n_shared_expert"]
                network(f"{block}.mlp.shared_experts", inner, "LLaMAMLP")
        else:
            network(f"{block}.mlp", config["intermediate_size"], config["mlp_class_name"])
    norm("transformer.ln_f")
    return shapes


def frequencies_of(config):
    """The angle of one position for each pair of channels."""
    size = config["head_size"]
    frequencies = config["rope_base"] ** (-torch.arange(0, size, 2).double() / size) / config["rope_condense_ratio"]
    said = config["rope_adjustments"]
    if said is None:
        return frequencies
    if "original_max_seq_len" not in said:
        return frequencies / said["factor"]
    scaled = []
    for frequency in frequencies.tolist():
        turns = said["original_max_seq_len"] * frequency / (2 * math.pi)
        kept = (turns - said["low_freq_factor"]) / (said["high_freq_factor"] - said["low_freq_factor"])
        kept = min(max(kept, 0.0), 1.0)
        scaled.append(kept * frequency + (1 - kept) * frequency / said["factor"])
    return torch.tensor(scaled, dtype=torch.double)


def logits_of(tensors, config, tokens):
    w = doubles(tensors)
    heads, groups, size, eps = (config[key] for key in ("n_head", "n_query_groups", "head_size", "norm_eps"))
    activation = {"none": gelu, "tanh": gelu_tanh}[config["gelu_approximate"]]

    def norm(name, x):
        if config["norm_class_name"] == "LayerNorm":
            return layer_norm(w, name, x, eps)
        return rms_norm(w[f"{name}.weight"], x, eps)

    def network(name, x):
        if f"{name}.fc.weight" in w:
            return linear(w, f"{name}.proj", activation(linear(w, f"{name}.fc", x)))
        return linear(w, f"{name}.proj", F.silu(linear(w, f"{name}.fc_1", x)) * linear(w, f"{name}.fc_2", x))

    def mixture(name, x):
        chosen, experts = linear(w, f"{name}.gate", x).topk(config["n_expert_per_token"])
        shares = chosen.softmax(-1) * config["routed_scaling_factor"]
        y = torch.zeros_like(x)
        for expert in range(config["n_expert"]):
            share = (shares * (experts == expert)).sum(-1, keepdim=True)
            y = y + share * network(f"{name}.experts.{expert}", x)
        return y + (network(f"{name}.shared_experts", x) if config["n_shared_expert"] else 0)

    x = w["transformer.wte.weight"][tokens]
    if config["scale_embeddings"]:
        x = x * math.sqrt(config["n_embd"])
    for i in range(config["n_layer"]):
        block = f"transformer.h.{i}"
        qkv = linear(w, f"{block}.attn.qkv", norm(f"{block}.norm_1", x))
        q, k, v = (
            part.unflatten(2, (-1, size)) for part in qkv.split([heads * size, groups * size, groups * size], -1)
        )
        if config["norm_qk"]:
            q, k = norm(f"{block}.attn.norm_q", q), norm(f"{block}.attn.norm_k", k)
        frequencies = frequencies_of(config)
        q, k = rotated(q, frequencies), rotated(k, frequencies)
        x = x + linear(w, f"{block}.attn.proj", attention(q, k, v))
        h = norm(f"{block}.norm_2", x)
        x = x + (mixture if f"{block}.mlp.gate.weight" in w else network)(f"{block}.mlp", h)
    return norm("transformer.ln_f", x) @ w["lm_head.weight"].T


def write_folder(folder, tokenizer, *, wrapped=True, tied=False, **changes):
    """A folder with a checkpoint; return its tensors and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(CONFIG) | changes
    tensors = numbers(shapes_of(config))
    if tied:
        tensors["transformer.wte.weight"] = tensors["lm_head.weight"]
    torch.save({"model": tensors} if wrapped else tensors, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.dump(config))
    tokenizer.save(folder / "tokenizer.json")
    return tensors, config


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_its_definition(shape, tokenizer, tmp_path):
    tensors, config = write_folder(tmp_path, tokenizer, **SHAPES[shape])
    loaded = load_pretrained(tmp_path)
    tokens = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(1))
    logits = logits_of(tensors, config, tokens)
    assert largest_difference(loaded, logits, tokens) < 1e-5
    assert logits.abs().max() > 0.5
    prompt = tokenizer.encode("The cat")
    [completion] = generate(loaded.model, [prompt], 12, GREEDY)
    assert list(completion.ids) == greedy(lambda ids: logits_of(tensors, config, ids), prompt, 12)


def test_biases_of_queries_keys_and_values_alone(tokenizer, tmp_path):
    write_folder(tmp_path, tokenizer, **SHAPES["Qwen2"])
    config = load_pretrained(tmp_path).model.config
    assert (config.bias, config.bias_in) == (True, "qkv")
    assert FORMATS["hf"].target(config) == "Qwen2ForCausalLM"


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_also_the_head(tied, tokenizer, tmp_path):
    write_folder(tmp_path, tokenizer, wrapped=False, tied=tied)
    assert load_pretrained(tmp_path / "lit_model.pth").model.config.tie_embeddings == tied


@pytest.mark.parametrize("bias", [True, False])
def test_the_old_order_of_queries_keys_and_values(bias, tokenizer, tmp_path):
    """Before 2025 `attn.attn` held each group's queries, its key and its value."""
    tensors, _ = write_folder(tmp_path, tokenizer, bias=bias)
    expected = load_pretrained(tmp_path).model.state_dict()
    old = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            q, k, v = tensor.split([32, 16, 16])
            rows = [torch.cat((q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8])) for g in range(2)]
            name, tensor = name.replace("qkv", "attn"), torch.cat(rows)
        old[name] = tensor
    torch.save(old, tmp_path / "lit_model.pth")
    found = load_pretrained(tmp_path).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_residual": True, "rotary_percentage": 0.25}, "parallel_residual is True, must be False; rotary_p"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, must be None"),
        ({"rope_adjustments": {"factor": 4.0, "beta_fast": 32}}, "rope_adjustments is .*: must be a factor, or Llama"),
        ({"rope_adjustments": {"factor": "4"}}, "must be a factor, or Llama"),
        ({"rope_adjustments": [4]}, "must be a factor, or Llama"),
        ({"rope_condense_ratio": 0}, "rope_condense_ratio is 0"),
        ({"attention_scores_scalar": 144}, "attention_scores_scalar is 144, must be head_size, 8"),
        ({"sliding_window_size": 20}, "sliding_window_size is 20, must be null or at least block_size"),
        ({"mlp_class_name": "GemmaMLP"}, "mlp_class_name is 'GemmaMLP', must be 'LLaMAMLP' or"),
        ({"mlp_class_name": ["x"]}, r"mlp_class_name is \['x'\]"),
        ({"name": "Gemma-2b"}, "name is 'Gemma-2b', for which litgpt computes other norms"),
        ({"new_setting": 1}, "new_setting is 1, which this version of LightLM does not know"),
        ({"n_layer": 10**12}, "n_layer is 1000000000000, not a whole number of at most"),
        ({"n_layer": 3}, "n_layer is 3, but the weights have 2 blocks"),
        ({"n_query_groups": 4}, "has 64 rows, its settings give 96"),
        ({"norm_eps": "small"}, "norm_eps is 'small', not a number"),
        ({"n_embd": None, "head_size": None}, "n_embd is 4096|has|fit"),
        ({"intermediate_size": 40}, "48.*40|40.*48"),
    ],
)
def test_what_lightlm_does_not_have(changes, message, tokenizer, tmp_path):
    write_folder(tmp_path, tokenizer)
    (tmp_path / "model_config.yaml").write_text(yaml.dump(CONFIG | changes))
    with pytest.raises(Exception, match=message) as caught:
        load_pretrained(tmp_path)
    assert type(caught.value).__module__ == "lightlm.errors"


def test_a_window_that_hides_nothing(tokenizer, tmp_path):
    tensors, config = write_folder(tmp_path, tokenizer, sliding_window_size=48)
    tokens = torch.arange(48)[None]
    assert largest_difference(load_pretrained(tmp_path), logits_of(tensors, config, tokens), tokens) < 1e-5


def test_settings_that_cannot_be_read(tokenizer, tmp_path):
    write_folder(tmp_path, tokenizer)
    settings = tmp_path / "model_config.yaml"
    for text, message in (
        ("[1, 2", "cannot be read"),
        ("- 1", "is not a list of settings"),
        ("!!python/object/apply:os.system [touch x]", "cannot be read"),
        ("a: " + "x" * (1 << 20), "litgpt's have some thousand"),
    ):
        settings.write_text(text)
        with pytest.raises(ConvertError, match=message):
            load_pretrained(tmp_path)
    settings.unlink()
    with pytest.raises(ConvertError, match="litgpt writes it beside"):
        load_pretrained(tmp_path)
    write_folder(tmp_path, tokenizer)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConvertError, match=r"copy the model's tokenizer\.json into"):
        load_pretrained(tmp_path)


def test_one_format_takes_a_folder_with_two_models_config(tokenizer, tmp_path):
    """litgpt copies config.json of a model of Hugging Face beside its own files."""

    def takers():
        return [known.name for known in FORMATS.values() if known.detect(tmp_path)]

    write_folder(tmp_path, tokenizer)
    assert takers() == ["litgpt"]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert takers() == ["litgpt"]
    (tmp_path / "model.safetensors").touch()
    assert takers() == ["hf"]

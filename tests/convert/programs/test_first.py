"""model.checkpoint.N.pt of the first LightLM against its definition in float64."""

import json

import pytest
import torch
import torch.nn.functional as F

from lightlm.convert.load import load_pretrained
from lightlm.errors import ConvertError
from lightlm.generate.engine import generate
from lightlm.generate.sampling import GREEDY
from tests.convert.programs.reference import (
    attention,
    doubles,
    greedy,
    largest_difference,
    linear,
    numbers,
    rms_norm,
    rotated,
)

SETTINGS = {"num_heads": 4, "context_len": 48}


def write_checkpoint(path, tokenizer, *, prefix="", settings=SETTINGS):
    """As its Trainer saves it; return the tensors."""
    shapes = {"tokens_embedding.weight": (300, 32)}
    for i in range(2):
        block = f"blocks.{i}"
        shapes |= {f"{block}.attention.w{name}.weight": (32, 32) for name in "qo"}
        shapes |= {f"{block}.attention.w{name}.weight": (16, 32) for name in "kv"}
        shapes |= {f"{block}.ffn.w1.weight": (40, 32), f"{block}.ffn.w2.weight": (32, 40)}
        shapes |= {f"{block}.ffn.w3.weight": (40, 32)}
        shapes |= {f"{block}.norm_{name}.weight": (32,) for name in ("attention", "ffn")}
    tensors = numbers(shapes | {"norm.weight": (32,)})
    state = tensors | {"ll_head.weight": tensors["tokens_embedding.weight"]}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save({"model": {prefix + name: t for name, t in state.items()}, "optimizer": optimizer}, path)
    tokenizer.save(path.parent / "tokenizer.json")
    if settings is not None:
        (path.parent / "config.json").write_text(json.dumps(settings))
    return tensors


def logits_of(tensors, tokens, theta=1e5, eps=1e-6):
    w = doubles(tensors)
    frequencies = theta ** (-torch.arange(0, 8, 2).double() / 8)
    x = w["tokens_embedding.weight"][tokens]
    for i in range(2):
        block = f"blocks.{i}"
        h = rms_norm(w[f"{block}.norm_attention.weight"], x, eps)
        q, k, v = (linear(w, f"{block}.attention.w{name}", h).unflatten(2, (-1, 8)) for name in "qkv")
        x = x + linear(w, f"{block}.attention.wo", attention(rotated(q, frequencies), rotated(k, frequencies), v))
        h = rms_norm(w[f"{block}.norm_ffn.weight"], x, eps)
        x = x + linear(w, f"{block}.ffn.w2", F.silu(linear(w, f"{block}.ffn.w1", h)) * linear(w, f"{block}.ffn.w3", h))
    return rms_norm(w["norm.weight"], x, eps) @ w["tokens_embedding.weight"].T


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("nested", [True, False])
def test_logits_are_those_of_its_definition(prefix, nested, tokenizer, tmp_path):
    path = tmp_path / "model.checkpoint.2000.pt"
    settings = {**SETTINGS, "rope_theta": 5e4}
    tensors = write_checkpoint(path, tokenizer, prefix=prefix, settings={"config": settings} if nested else settings)
    loaded = load_pretrained(path)
    tokens = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(1))
    assert largest_difference(loaded, logits_of(tensors, tokens, theta=5e4), tokens) < 1e-5
    prompt = tokenizer.encode("The cat")
    [completion] = generate(loaded.model, [prompt], 12, GREEDY)
    assert list(completion.ids) == greedy(lambda ids: logits_of(tensors, ids, theta=5e4), prompt, 12)


def test_settings_that_the_file_does_not_hold(tokenizer, tmp_path):
    path = tmp_path / "model.checkpoint.2000.pt"
    tensors = write_checkpoint(path, tokenizer, settings=None)
    with pytest.raises(ConvertError, match=r"does not hold num_heads and context_len.*write them to .*config\.json"):
        load_pretrained(path)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    tokens = torch.arange(40)[None]
    assert largest_difference(load_pretrained(path), logits_of(tensors, tokens), tokens) < 1e-5
    for change, message in (
        ({"num_heads": 3}, "3"),
        ({"num_heads": "four"}, "num_heads is 'four'"),
        ({"use_moe": True}, "use_moe is True, must be False"),
        ({"context_len": 1e3}, r"context_len is 1000\.0, not a whole number"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(SETTINGS | change))
        with pytest.raises(ConvertError, match=message):
            load_pretrained(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConvertError, match=r"config\.json cannot be read"):
        load_pretrained(path)


def test_experts_are_refused(tokenizer, tmp_path):
    path = tmp_path / "model.checkpoint.2000.pt"
    write_checkpoint(path, tokenizer)
    content = torch.load(path)
    content["model"]["blocks.1.ffn.router.weight"] = torch.ones(4, 32)
    torch.save(content, path)
    with pytest.raises(ConvertError, match="has experts"):
        load_pretrained(path)

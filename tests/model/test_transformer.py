import math

import pytest
import torch

from lightlm.model import attention, transformer
from lightlm.model.config import ModelConfig
from lightlm.model.rotary import rotary_table, rotate
from lightlm.model.transformer import Block, Transformer
from tests.shapes import SHAPES, build

TURNING = ModelConfig(num_layers=1, hidden_size=16, num_heads=1, head_dim=16, max_seq_len=8)


def reference_attention(q, k, v, window):
    """Softmax attention in float64, one query at a time: q (H, T, K), k and v (G, T, K)."""
    heads, length, size = q.shape
    out = torch.zeros(heads, length, size, dtype=torch.float64)
    for h in range(heads):
        g = h * k.shape[0] // heads
        for t in range(length):
            first = max(0, t - window + 1) if window else 0
            scores = (k[g, first : t + 1].double() @ q[h, t].double()) / math.sqrt(size)
            out[h, t] = scores.softmax(0) @ v[g, first : t + 1].double()
    return out


@pytest.mark.parametrize(("window", "gated"), [(0, False), (1, False), (4, True)])
def test_attention_matches_float64_formula(window, gated):
    """Grouped heads, the band and the gate, seen through the model's own attention module."""
    from lightlm.model.attention import Attention, build_mask

    shape = {"num_layers": 1, "hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "max_seq_len": 16}
    config = ModelConfig(**shape, attention_gate=gated).resolved()
    torch.manual_seed(0)
    attention = Attention(config)
    x = torch.randn(1, 11, 24)
    positions = torch.arange(11)[None]
    with torch.no_grad():
        y = attention(x, None, build_mask(positions, 11, window, fresh=True, aligned=True))
        q, k, v = (
            projection(x).view(11, -1, 4).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        expected = reference_attention(q, k, v, window).transpose(0, 1).reshape(11, 24)
        if gated:
            expected = expected / (1 + torch.exp(-x[0].double() @ attention.gate_proj.weight.double().T))
        torch.testing.assert_close(y[0].double(), expected @ attention.o_proj.weight.double().T, atol=1e-6, rtol=1e-5)


def test_rotation_depends_only_on_distance_and_keeps_length():
    x, y = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(a, b):
        return (
            rotate(x, *rotary_table(torch.tensor([a]), TURNING)) * rotate(y, *rotary_table(torch.tensor([b]), TURNING))
        ).sum()

    torch.testing.assert_close(score(3, 1), score(1003, 1001), atol=1e-3, rtol=1e-3)
    assert abs(score(3, 1) - score(4, 1)) > 1e-4
    torch.testing.assert_close(rotate(x, *rotary_table(torch.tensor([7]), TURNING)).norm(), x.norm())


@pytest.mark.parametrize("name", SHAPES)
def test_no_position_sees_the_future(name):
    model = build(name)
    tokens = torch.randint(97, (1, 20), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 97
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=0, rtol=0)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


def test_layers_alternate_between_full_and_banded():
    assert [SHAPES["gpt3"].window(layer) for layer in range(4)] == [0, 5, 0, 5]
    thirds = ModelConfig(
        num_layers=6, hidden_size=16, num_heads=2, max_seq_len=32, sliding_window=4, full_attention_interval=3
    )
    assert [thirds.window(layer) for layer in range(6)] == [0, 4, 4, 0, 4, 4]


def test_gradients_reach_every_parameter():
    for name in SHAPES:
        model = Transformer(SHAPES[name])
        model(torch.randint(97, (2, 10))).logsumexp(-1).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), name


def test_initialization_has_the_papers_scales():
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            num_layers=8, hidden_size=128, num_heads=4, max_seq_len=256, vocab_size=500, norm="layernorm",
            position="learned", mlp="gelu", bias=True,
        )
    )  # fmt: skip
    block = model.blocks[3]
    assert block.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (block.attention.o_proj, block.mlp.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        assert projection.bias.abs().max() == 0
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.embed_positions.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (block.mlp_norm.weight == 1).all()


def test_rotary_angles_survive_a_bfloat16_model():
    """Positions past 256 collide in bf16; the table must not be cast with the weights."""
    model = build("llama").bfloat16()
    cos, _ = rotary_table(torch.tensor([256, 257]), TURNING)
    assert cos.dtype == torch.float32
    assert not torch.equal(cos[0], cos[1])
    assert model(torch.tensor([[1, 2]])).isfinite().all()


def test_untied_head_is_its_own_matrix_and_tied_head_is_counted_once():
    tied, untied = build("llama"), build("qwen3")
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.state_dict()["lm_head.weight"].data_ptr() != untied.embed_tokens.weight.data_ptr()
    counts = untied.num_parameters()
    assert counts["embedding"] == 2 * 97 * 32
    assert counts["total"] == sum(p.numel() for p in untied.parameters())


def test_flops_follow_the_formula():
    """PaLM's formula for GPT-2 124M at 1,024: 6 (N - positions) + 12 L D T, the head being tied."""
    with torch.device("meta"):
        model = Transformer(
            ModelConfig(
                num_layers=12, hidden_size=768, num_heads=12, max_seq_len=1024, vocab_size=50257, norm="layernorm",
                position="learned", mlp="gelu", bias=True,
            )
        )  # fmt: skip
    final_norm = 2 * 768
    expected = 6 * (124_439_808 - 1024 * 768 - final_norm) + 12 * 12 * 768 * 1024
    assert model.flops_per_token(1024) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads: 5 does not divide hidden_size 32"),
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads 4"),
        ({"head_dim": 7}, "head_dim: must be even"),
        ({"num_layers": 0}, "num_layers: must be at least 1"),
        ({"norm_eps": 0}, "norm_eps: must be a number above 0"),
        ({"vocab_size": 0}, "vocab_size: must be set"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    values = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_seq_len": 48, "vocab_size": 97} | change
    with pytest.raises(ValueError, match=message):
        Transformer(ModelConfig(**values))


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="49 positions given, max_seq_len is 48"):
        build("llama")(torch.zeros(1, 49, dtype=torch.long))


def test_blocks_run_compiled_only_in_training(monkeypatch):
    """Else each length of a prompt or document would be compiled again."""
    compiled = []
    monkeypatch.setattr(transformer, "_compiled_run", lambda: lambda *args: compiled.append(1) or Block._run(*args))
    model, tokens = build("llama"), torch.randint(97, (2, 6))
    model.compile_blocks()
    expected = model(tokens)
    assert len(compiled) == model.config.depth
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected)
    torch.testing.assert_close(model(tokens, model.new_cache(2)), expected)
    assert len(compiled) == model.config.depth


def test_a_triangle_stands_for_the_flag_where_the_flag_is_wrong(monkeypatch):
    """On MPS in 16 bits `is_causal` shows later tokens to three queries of four."""
    assert [attention.masks_by_flag("mps", dtype) for dtype in (torch.float32, torch.bfloat16)] == [True, False]
    assert attention.masks_by_flag("cpu", torch.bfloat16)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    by_flag = attention.attend(q, k, v, attention.Mask(is_causal=True))
    monkeypatch.setattr(attention, "masks_by_flag", lambda *_: False)
    torch.testing.assert_close(attention.attend(q, k, v, attention.Mask(is_causal=True)), by_flag)

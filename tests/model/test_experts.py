"""Three ways to compute the experts, one of them without gradients, equal float64 one-hot sums."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.model import experts as experts_module
from lightlm.model.config import ModelConfig
from lightlm.model.experts import Experts

PATHS = ["grouped", "padded", "single"]
# Of the largest entry. bf16 has 8 significant bits, a gradient goes through four products, and few entries may cancel.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.1}


def build_experts(num_experts, chosen, hidden=16, inner=24, seed=0):
    torch.manual_seed(seed)
    config = ModelConfig(
        num_layers=1,
        hidden_size=hidden,
        num_heads=1,
        max_seq_len=8,
        head_dim=2,
        num_experts=num_experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=inner,
        norm_topk_prob=False,
    )
    experts = Experts(config.resolved())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def reference(experts, x_ND, ids_NK, weights_NK):
    """Run every expert on every token, with one-hot weights."""
    gate, up, down = (parameter.double() for parameter in experts.parameters())
    gates, ups = (torch.einsum("nd,efd->nef", x_ND, weight) for weight in (gate, up))
    y_NED = torch.einsum("nef,edf->ned", gates * torch.sigmoid(gates) * ups, down)
    one_hot_NKE = F.one_hot(ids_NK, len(gate)).double()
    return torch.einsum("nke,nk,ned->nd", one_hot_NKE, weights_NK, y_NED)


def outcome(experts, compute, x_ND, weights_NK, grad_ND):
    """Return the output and, if wanted, the gradients of tokens, weights and parameters."""
    if grad_ND is None:
        with torch.no_grad():
            return [compute(x_ND, weights_NK)]
    inputs = [x_ND.clone().requires_grad_(), weights_NK.clone().requires_grad_()]
    y_ND = compute(*inputs)
    grads = torch.autograd.grad(y_ND, [*inputs, *experts.parameters()], grad_ND.to(y_ND.dtype))
    return [y_ND.detach(), *grads]


def assert_agree(experts, ids_NK, path, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(len(ids_NK), experts.gate_proj.shape[2], generator=generator)
    weights_NK = torch.rand(ids_NK.shape, generator=generator)
    grad_ND = None if path == "single" else torch.randn(x_ND.shape, generator=generator)
    run = getattr(experts, f"_{path}")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = outcome(experts, lambda x, weights: run(x, ids_NK, weights), x_ND, weights_NK, grad_ND)
    expected = outcome(
        experts,
        lambda x, weights: reference(experts, x, ids_NK, weights),
        x_ND.double(),
        weights_NK.double(),
        grad_ND if grad_ND is None else grad_ND.double(),
    )
    names = ["output", "x", "weights", "gate_proj", "up_proj", "down_proj"][: len(expected)]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert ours.shape == theirs.shape
        if name != "output":
            assert ours.dtype == torch.float32, name
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
        assert error < ROUNDING[dtype], (path, name, error)


def balanced(tokens, num_experts, chosen):
    return (torch.arange(tokens)[:, None] * chosen + torch.arange(chosen)) % num_experts


LOADS = {
    "balanced": balanced(60, 6, 2),
    "all tokens to the same experts": torch.tensor([[4, 1]]).repeat(50, 1),
    "one expert in every token": torch.stack([torch.full((40,), 3), torch.arange(40) % 3], 1),
    "one token": torch.tensor([[5, 0]]),
    "one token to an empty expert": torch.cat([torch.tensor([[4, 1]]).repeat(50, 1), torch.tensor([[0, 2]])]),
    "every expert": balanced(9, 6, 6),
    "every expert, one token": balanced(1, 6, 6),
    "one choice": torch.tensor([[2]]).repeat(33, 1),
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("load", LOADS)
def test_extreme_loads(load, path, dtype):
    assert_agree(build_experts(6, LOADS[load].shape[1]), LOADS[load], path, dtype)


@st.composite
def choices(draw):
    """(experts, choices of each token): any number of tokens, and any preference for some of the experts."""
    num_experts = draw(st.integers(1, 9))
    chosen = draw(st.integers(1, num_experts))
    tokens = draw(st.integers(1, 70))
    preference_E = draw(st.lists(st.sampled_from([0.0, 1.0, 4.0, 50.0]), min_size=num_experts, max_size=num_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scores_NE = torch.tensor(preference_E) + torch.randn(tokens, num_experts, generator=generator)
    return num_experts, scores_NE.topk(chosen).indices


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, derandomize=True)
@given(plan=choices(), hidden=st.integers(1, 5), inner=st.integers(1, 5), mixed=st.booleans())
def test_any_shape_and_load(path, plan, hidden, inner, mixed):
    num_experts, ids_NK = plan
    # torch's grouped product needs rows of whole 16 bytes, on a CPU too.
    experts = build_experts(num_experts, ids_NK.shape[1], 8 * hidden, 8 * inner)
    assert_agree(experts, ids_NK, path, torch.bfloat16 if mixed else torch.float32)


def test_sizes_that_are_no_multiple_of_anything():
    for path in ("padded", "single"):
        for dtype in ROUNDING:
            assert_agree(build_experts(5, 3, hidden=7, inner=11), balanced(37, 5, 3), path, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_precision(dtype):
    """Without autocast: the weights' own precision, as in generation from a bf16 model."""
    experts, ids_NK = build_experts(6, 2), LOADS["balanced"]
    x_ND, weights_NK = torch.randn(60, 16), torch.rand(60, 2)
    expected = reference(experts, x_ND.double(), ids_NK, weights_NK.double())
    experts = experts.to(dtype)
    for path in PATHS[dtype == torch.float64 :]:  # torch's grouped product has no float64
        with torch.no_grad():
            y_ND = getattr(experts, f"_{path}")(x_ND.to(dtype), ids_NK, weights_NK)
        assert y_ND.dtype == dtype
        assert (y_ND - expected).abs().max() < {torch.bfloat16: 0.1, torch.float64: 1e-6}[dtype]


def taken(
    monkeypatch, tokens, *, grad, device="cpu", dtype=torch.float32, capability=(9, 0), compiling=False, inner=24
):
    """The path of a call in the given situation."""
    experts = build_experts(4, 2, inner=inner)
    called = []
    for path in PATHS:
        monkeypatch.setattr(experts, f"_{path}", lambda x, ids, weights, path=path: called.append(path))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class Tokens:
        """Tokens on a device that this machine need not have."""

        def __init__(self):
            self.device, self.dtype, self.shape = torch.device(device), dtype, (tokens, 16)

    with torch.set_grad_enabled(grad):
        experts(Tokens(), torch.zeros(tokens, 2, dtype=torch.long), torch.zeros(tokens, 2))
    return called[0]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_path_of_each_situation(monkeypatch, dtype):
    # Four experts, two choices: 7 tokens are 14 rows, fewer than 4 per expert.
    assert taken(monkeypatch, 7, grad=False, dtype=dtype) == "single"
    assert taken(monkeypatch, 8, grad=False, dtype=dtype) == "padded"
    assert taken(monkeypatch, 1, grad=True, dtype=dtype) == "padded"
    assert taken(monkeypatch, 100, grad=True, dtype=dtype, compiling=True) == "padded"


def test_grouped_products_where_a_gpu_has_them(monkeypatch):
    gpu = {"device": "cuda", "dtype": torch.bfloat16}
    for tokens, grad in ((1, False), (100, True)):
        assert taken(monkeypatch, tokens, grad=grad, **gpu) == "grouped"
    assert taken(monkeypatch, 100, grad=True, **gpu, capability=(7, 5)) == "padded"
    assert taken(monkeypatch, 100, grad=True, **gpu, inner=20) == "padded"
    assert taken(monkeypatch, 100, grad=True, device="cuda") == "padded"  # fp32


def test_single_reads_only_the_chosen_experts():
    experts = build_experts(6, 2)
    with torch.no_grad():
        x_ND, ids_NK, weights_NK = torch.randn(1, 16), torch.tensor([[5, 0]]), torch.rand(1, 2)
        expected = reference(experts, x_ND.double(), ids_NK, weights_NK.double())
        for parameter in experts.parameters():
            parameter[1:5] = torch.nan
        torch.testing.assert_close(experts(x_ND, ids_NK, weights_NK).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.99])
def test_padding_and_rows_beyond_the_batched_ones(monkeypatch, quantile):
    """Each choice has one row of its own expert, whether none, some or all rows are batched."""
    monkeypatch.setattr(experts_module, "_BATCHED_QUANTILE", quantile)
    ids_NK = LOADS["one token to an empty expert"]
    rows = experts_module._Rows.of(ids_NK, 6)
    assert rows.row_NK.unique().numel() == ids_NK.numel()
    assert rows.pair_R[rows.row_NK.flatten()].tolist() == list(range(ids_NK.numel()))
    assert (rows.pair_R == ids_NK.numel()).sum() == len(rows.pair_R) - ids_NK.numel()
    expert_R = torch.arange(6).repeat_interleave(rows.batched)
    expert_R = torch.cat([expert_R, *(torch.full((stop - start,), e) for e, start, stop in rows.beyond)])
    assert torch.equal(expert_R[rows.row_NK], ids_NK)
    assert_agree(build_experts(6, 2), ids_NK, "padded")

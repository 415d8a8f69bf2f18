"""Multi-token prediction against its formulas in float64 (arXiv 2412.19437, equations 21 to 25)."""

import itertools
import math

import pytest
import torch

from lightlm.model.attention import offsets_in_documents
from lightlm.model.config import ModelConfig
from lightlm.model.transformer import Transformer
from lightlm.train.step.loss import token_losses
from lightlm.train.step.parallel import LossModule, MicroBatch
from lightlm.train.step.routers import RouterLosses, move_selection_biases
from tests.shapes import SHAPES

SEPARATOR = 0
LLAMA = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, max_seq_len=12, vocab_size=30, tie_embeddings=False)


def built(config=LLAMA, depth=1, seed=0):
    """A model whose norms and heads all matter."""
    torch.manual_seed(seed)
    model = Transformer(config, depth)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(seed=0, rows=3, length=12, vocab_size=30):
    """Tokens with documents, which begin with the separator, and the tokens after them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (rows, length + 1), generator=generator)
    tokens[0, 5] = tokens[1, 3] = tokens[1, 4] = tokens[2, 11] = tokens[2, 12] = SEPARATOR
    return tokens[:, :-1], tokens[:, 1:]


def normed(x, norm):
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def block_by_hand(block, x_TD):
    """A Llama block in float64, one head and one query at a time."""
    heads, length, width = 2, len(x_TD), x_TD.shape[1] // 2
    y_TD = normed(x_TD, block.attention_norm)
    q, k, v = (y_TD @ getattr(block.attention, f"{name}_proj").weight.T for name in "qkv")
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2).double() / width)

    def turned(vector, position):
        first, second = vector[: width // 2], vector[width // 2 :]
        cos, sin = torch.cos(position * frequencies), torch.sin(position * frequencies)
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    rows = []
    for t in range(length):
        parts = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            query = turned(q[t, part], t)
            scores = torch.stack([turned(k[s, part], s) @ query for s in range(t + 1)]) / math.sqrt(width)
            parts.append(scores.softmax(0) @ v[: t + 1, part])
        rows.append(torch.cat(parts))
    x_TD = x_TD + torch.stack(rows) @ block.attention.o_proj.weight.T
    y_TD, mlp = normed(x_TD, block.mlp_norm), block.mlp
    gate = torch.nn.functional.silu(y_TD @ mlp.gate_proj.weight.T)
    return x_TD + (gate * (y_TD @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def losses_by_hand(model, tokens):
    """The losses of one document: of the next tokens, and of each head; a document of one token has none."""
    inputs, targets = tokens[:-1], tokens[1:]
    embedded = model.embed_tokens.weight[inputs]
    x_TD = embedded
    for block in model.blocks:
        x_TD = block_by_hand(block, x_TD)
    state_TD = normed(x_TD, model.norm)

    def losses(state_TD, targets):
        logits = state_TD @ model.head_weight.T
        return logits.logsumexp(-1) - logits[torch.arange(len(targets)), targets]

    found = [losses(state_TD, targets)]
    for number, head in enumerate(model.mtp, 1):
        if len(inputs) <= number:
            break
        known = len(inputs) - number  # columns whose token `number` on is known
        joined = torch.cat(
            [normed(state_TD[:known], head.state_norm), normed(embedded[number:], head.embedding_norm)], -1
        )
        state_TD = normed(block_by_hand(head.block, joined @ head.merge.weight.T), head.norm)
        found.append(losses(state_TD, targets[number:]))
    return found


def expected(model, documents, weight, trained=lambda tokens: tokens >= 0):
    """The objective's sum, the sum of the loss, and that of the heads with its count."""
    total, ahead, count = 0.0, [0.0] * len(model.mtp), 0
    for tokens in documents:
        counts = trained(tokens[1:])
        first, *others = losses_by_hand(model, tokens)
        total = total + first[counts].sum()
        for number, losses in enumerate(others):
            ahead[number] = ahead[number] + losses[counts[number + 1 :]].sum()
            count += int(counts[number + 1 :].sum())
    return total + weight * sum(ahead) / len(ahead), total, sum(ahead), count


def documents_of(inputs, targets):
    """Each document of a batch with the token after it."""
    for row, following in zip(inputs, targets, strict=True):
        starts = [0, *(t for t in range(1, len(row)) if row[t] == SEPARATOR), len(row)]
        for begin, end in itertools.pairwise(starts):
            yield torch.cat([row[begin:end], following[end - 1 : end]])


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_losses_and_gradients_are_those_of_the_formulas(depth, documents):
    model = built(depth=depth)
    exact = built(depth=depth).double()
    inputs, targets = batch()
    offsets = offsets_in_documents(inputs, SEPARATOR) if documents else None
    sums = token_losses(model, inputs, targets, offsets_BT=offsets, mtp_weight=torch.tensor(0.3))
    sums.objective.backward()
    rows = torch.cat([inputs, targets[:, -1:]], 1)
    objective, loss, ahead, count = expected(exact, documents_of(inputs, targets) if documents else rows, 0.3)
    objective.backward()
    assert sums.objective.item() == pytest.approx(objective.item(), rel=1e-5)
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert sums.mtp_2.tolist() == pytest.approx([ahead.item(), count], rel=1e-5)
    for (name, found), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_only_trained_targets_count():
    """As in conversations, whose other targets are negative."""
    model, exact = built(), built().double()
    inputs, targets = batch()
    trained = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    sums = token_losses(model, inputs, torch.where(trained, targets, -100), masked=True, mtp_weight=torch.tensor(1.0))
    found = [losses_by_hand(exact, torch.cat([row, last[-1:]])) for row, last in zip(inputs, targets, strict=True)]
    loss = sum(first[counts].sum() for (first, _), counts in zip(found, trained, strict=True))
    ahead = sum(second[counts[1:]].sum() for (_, second), counts in zip(found, trained, strict=True))
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert sums.mtp_2.tolist() == pytest.approx([ahead.item(), int(trained[:, 1:].sum())], rel=1e-5)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_the_model_itself_does_not_change(name):
    """Heads are initialized last, and the states, losses and counts of the model are as without them."""
    torch.manual_seed(0)
    plain = Transformer(SHAPES[name])
    torch.manual_seed(0)
    model = Transformer(SHAPES[name], 2)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in plain.state_dict().items())
    assert model.num_parameters() == plain.num_parameters()
    added = [key for key in weights if key not in plain.state_dict()]
    assert all(key.startswith(("mtp.0.", "mtp.1.")) for key in added)
    assert model.mtp_parameters == sum(weights[key].numel() for key in added if "selection_bias" not in key)
    inputs, targets = batch(length=20, vocab_size=97)
    states = []
    found = model.hidden_states(inputs, mtp_states=states)
    assert torch.equal(found, plain.hidden_states(inputs))
    assert [tuple(state.shape) for state in states] == [tuple(found.shape)] * 2
    sums = token_losses(model, inputs, targets, mtp_weight=torch.tensor(0.3))
    assert torch.equal(sums.loss, token_losses(plain, inputs, targets).loss)
    sums.objective.backward()
    assert all(parameter.grad is not None for parameter in model.mtp.parameters())


def test_a_head_sees_the_tokens_that_it_is_given_and_none_after():
    model = built(depth=2)
    inputs, _ = batch()
    other = inputs.clone()
    other[:, 7] = 1 + other[:, 7] % 28
    both = []
    for tokens in (inputs, other):
        states = []
        model.hidden_states(tokens, mtp_states=states)
        both.append(states)
    for number in (1, 2):
        first, second = (states[number - 1] for states in both)
        assert torch.equal(first[:, : 7 - number], second[:, : 7 - number])
        assert not torch.isclose(first[:, 7 - number], second[:, 7 - number]).all(-1).any()


def test_the_routers_of_heads_are_balanced_and_their_losses_count():
    model = built(SHAPES["moe"])
    module = LossModule(model, RouterLosses(balance=0.1))
    inputs, targets = batch(length=20, vocab_size=97)
    losses = module(MicroBatch(inputs, targets, mtp_weight=torch.tensor(0.3)))
    assert losses.load_LE.shape == (2, 5)  # of the second block, and of the head's
    assert losses.load_LE.sum(1).tolist() == [3 * 20 * 2] * 2
    router = model.mtp[0].block.mlp.router
    before = router.selection_bias.clone()
    move_selection_biases(model, losses.load_LE, 0.01)
    mean = losses.load_LE[1].double().mean()
    torch.testing.assert_close(router.selection_bias - before, 0.01 * torch.sign(mean - losses.load_LE[1]).float())


def test_operations_count_each_head_with_the_output_head():
    shape = SHAPES["moe"]
    plain, model = Transformer(shape), Transformer(shape, 1)
    head = model.mtp[0]
    idle = 3 * 3 * 24 * 32  # three of five experts
    attention = 4 * (8 + 8) * 48  # heads, channels of key and value, positions
    weights = sum(p.numel() for p in head.parameters()) - idle + 97 * 32
    assert model.flops_per_token(48) - plain.flops_per_token(48) == 6 * (weights + attention)


def test_recomputed_and_compiled_heads_have_the_same_gradients():
    inputs, targets = batch()
    found = []
    for change in (lambda model: None, lambda model: setattr(model, "recompute_blocks", True)):
        model = built(depth=2)
        change(model)
        token_losses(model, inputs, targets, mtp_weight=torch.tensor(0.3)).objective.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)

"""Plain float64 models in the definitions of other programs, and random weights under their names."""

import math

import torch


def numbers(shapes, seed=0):
    """Random float32 tensors of these shapes; those of norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensor = 0.2 * torch.randn(shape, generator=generator)
        is_norm = name.endswith("weight") and len(shape) == 1
        tensors[name] = tensor + 1 if is_norm else tensor
    return tensors


def doubles(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def layer_norm(w, name, x, eps=1e-5):
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rms_norm(weight, x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotated(x, frequencies):
    """Rotate heads (B, T, H, K): channel i turns with channel i + K/2, by frequencies (K/2,)."""
    length, size = x.shape[1], x.shape[3]
    angle = torch.arange(length).double()[:, None] * frequencies
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def attention(q, k, v):
    """Attend causally: queries (B, T, H, K), keys and values (B, T, G, K); return (B, T, H K)."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, v).flatten(2)


def gpt2_shapes(*, layers=2, width=32, vocab=300, context=48, bias=True):
    """The tensors of nanoGPT's and llm.c's GPT."""
    shapes = {"transformer.wte.weight": (vocab, width), "transformer.wpe.weight": (context, width)}
    for i in range(layers):
        for name, size in {
            "ln_1": (width,),
            "attn.c_attn": (3 * width, width),
            "attn.c_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = size
            if bias:
                shapes[f"transformer.h.{i}.{name}.bias"] = size[:1]
    shapes["transformer.ln_f.weight"] = (width,)
    return shapes | ({"transformer.ln_f.bias": (width,)} if bias else {})


def gpt2_logits(tensors, tokens, *, heads, activation):
    """The logits of GPT-2 with the given GELU, (B, T, V)."""
    w = doubles(tensors)
    layers = sum(name.endswith("ln_1.weight") for name in w)
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][: tokens.shape[1]]
    for i in range(layers):
        block = f"transformer.h.{i}"
        qkv = linear(w, f"{block}.attn.c_attn", layer_norm(w, f"{block}.ln_1", x))
        q, k, v = (part.unflatten(2, (heads, -1)) for part in qkv.chunk(3, -1))
        x = x + linear(w, f"{block}.attn.c_proj", attention(q, k, v))
        h = activation(linear(w, f"{block}.mlp.c_fc", layer_norm(w, f"{block}.ln_2", x)))
        x = x + linear(w, f"{block}.mlp.c_proj", h)
    return layer_norm(w, "transformer.ln_f", x) @ w["transformer.wte.weight"].T


def greedy(logits_of, tokens, count):
    """The likeliest continuation by full forward passes."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(logits_of(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-count:]


def largest_difference(loaded, logits, tokens):
    with torch.no_grad():
        return (loaded.model(tokens) - logits).abs().max().item()

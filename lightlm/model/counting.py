"""Parameter counts by arithmetic, without torch: `lightlm recipes ls` answers at once.

Shapes: V vocabulary, D hidden size, H query heads, G key/value heads, K head size, F feed-forward size, E experts.
"""

from lightlm.model.config import ModelConfig


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the counts that `Transformer(config).num_parameters()` returns: `total`, `active` and `embedding`.

    Raises:
        ValueError: this is not a model, or its vocabulary is not known.
    """
    config = config.resolved()
    if not config.vocab_size:
        raise ValueError("vocab_size: must be set to count parameters")
    width, bias = config.hidden_size, config.bias
    norm = width * (2 if config.norm == "layernorm" and bias else 1)
    tables = width * config.vocab_size * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        tables += width * config.max_seq_len
    attention = _attention(config)
    expert = 3 * width * config.moe_intermediate_size
    experts = config.num_experts * (expert + width) + config.num_shared_experts * expert  # with the router's rows
    total = tables + norm
    idle = 0  # experts that a token is not sent to
    for block in range(config.num_layers):
        routed = config.has_experts(block)
        total += attention + 2 * norm + (experts if routed else _dense(config))
        idle += routed * (config.num_experts - config.num_experts_per_tok) * expert
    return {"total": total, "active": total - idle, "embedding": tables}


def _attention(config: ModelConfig) -> int:
    query, kv, width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.hidden_size
    gate = query if config.attention_gate else 0
    weights = width * (2 * (query + kv) + gate)
    biases = query + gate + 2 * kv + width if config.bias else 0
    return weights + biases + (2 * config.head_dim if config.qk_norm else 0)


def _dense(config: ModelConfig) -> int:
    width, size = config.hidden_size, config.intermediate_size
    inner = 2 if config.mlp == "swiglu" else 1  # projections into the feed-forward network
    return (inner + 1) * width * size + (inner * size + width if config.bias else 0)

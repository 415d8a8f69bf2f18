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
    width = config.hidden_size
    norm = width * (2 if config.norm == "layernorm" and config.has_bias("norm") else 1)
    tables = width * config.vocab_size * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        tables += width * config.max_seq_len
    attention = _attention(config)
    expert = _swiglu(config, config.moe_intermediate_size)
    experts = config.num_experts * (expert + width) + _shared(config)  # with the router's rows
    routed = config.num_layers - config.first_k_dense if config.num_experts else 0
    scales = 0 if config.residual_scale is None else 2
    total = tables + norm + config.num_layers * (attention + 2 * norm + scales)
    total += routed * experts + (config.num_layers - routed) * _dense(config)
    idle = routed * (config.num_experts - config.num_experts_per_tok) * expert  # experts that a token is not sent to
    return {"total": total, "active": total - idle, "embedding": tables}


def _attention(config: ModelConfig) -> int:
    if config.attention == "mla":
        return _latent_attention(config)
    query, kv, width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.hidden_size
    matrices = [(query, width), (kv, width), (kv, width), (width, query)] + [(query, width)] * config.attention_gate
    weights = sum(_matrix(config, *shape) for shape in matrices)
    biases = query * (1 + config.attention_gate) + 2 * kv if config.has_bias("qkv") else 0
    biases += width if config.has_bias("output") else 0
    return weights + biases + (2 * config.head_dim if config.qk_norm else 0)


def _latent_attention(config: ModelConfig) -> int:
    width, heads, rank, query_rank = config.hidden_size, config.num_heads, config.kv_lora_rank, config.q_lora_rank
    matrices = [(rank, width), (config.rotary_dim, width), (width, heads * config.v_head_dim)]
    matrices += [(heads * config.qk_nope_head_dim, rank), (heads * config.v_head_dim, rank)]
    matrices += [(query_rank, width)] if query_rank else []
    matrices += [(heads * config.head_dim, query_rank or width)]
    return sum(_matrix(config, *shape) for shape in matrices) + rank + query_rank  # with the norms of latents


def _dense(config: ModelConfig) -> int:
    width, size = config.hidden_size, config.intermediate_size
    inner = 2 if config.mlp == "swiglu" else 1  # projections into the feed-forward network
    weights = inner * _matrix(config, size, width) + _matrix(config, width, size)
    return weights + (inner * size + width if config.has_bias("mlp") else 0)


def _swiglu(config: ModelConfig, size: int) -> int:
    return 2 * _matrix(config, size, config.hidden_size) + _matrix(config, config.hidden_size, size)


def _shared(config: ModelConfig) -> int:
    """Count the shared experts, one network of their joint width."""
    size = config.num_shared_experts * config.moe_intermediate_size
    return _swiglu(config, size) if size else 0


def _matrix(config: ModelConfig, rows: int, columns: int) -> int:
    """Count a matrix of a block and its multipliers."""
    multipliers = {"none": 0, "rows": rows, "columns": columns, "both": rows + columns}[config.multipliers]
    return rows * columns + multipliers

"""Which Hugging Face class a model exports to, decided from its configuration alone.

Imports nothing heavy: `train` and `recipes` ask when a recipe is read, long before anything is converted.
"""

from dataclasses import dataclass

from lightlm.model.config import ModelConfig


@dataclass(frozen=True)
class ExportTarget:
    """The Hugging Face class that computes what a model computes, or the reason why there is none."""

    architecture: str = ""  # the class, such as LlamaForCausalLM; empty when refused
    model_type: str = ""  # its `model_type` in config.json, such as llama
    refusal: str = ""  # one sentence naming the keys in the way; empty when it can be exported


def export_target(config: ModelConfig) -> ExportTarget:
    """The class this configuration exports to with equal logits, or a refusal; `vocab_size` may still be 0.

    Repeated blocks (`layer_sharing`) are written out as layers of their own, so every class takes them.

    Raises:
        ValueError: the configuration is not a model.
    """
    config = config.resolved()
    kind = (config.norm, config.position, config.mlp)
    if kind == ("layernorm", "learned", "gelu"):
        architecture, model_type, obstacles = "GPT2LMHeadModel", "gpt2", _gpt2_obstacles(config)
    elif kind == ("rmsnorm", "rope", "swiglu") and config.num_experts:
        architecture, model_type, obstacles = _moe_class(config)
    elif kind == ("rmsnorm", "rope", "swiglu") and config.qk_norm:
        architecture, model_type, obstacles = "Qwen3ForCausalLM", "qwen3", _qwen3_obstacles(config)
    elif kind == ("rmsnorm", "rope", "swiglu"):
        architecture, model_type, obstacles = "LlamaForCausalLM", "llama", _llama_obstacles(config)
    else:
        return ExportTarget(
            refusal=f"no Hugging Face class has norm: {config.norm}, position: {config.position} and mlp: {config.mlp} "
            "together (GPT2LMHeadModel has layernorm, learned and gelu; LlamaForCausalLM, Qwen3ForCausalLM and all "
            "classes with experts have rmsnorm, rope and swiglu)"
        )
    if any(0 < config.window(layer) < config.max_seq_len for layer in range(config.depth)):
        obstacles.append(f"sliding_window: {config.sliding_window} (every layer sees all positions)")
    if obstacles:
        return ExportTarget(
            refusal=f"{architecture}, the nearest Hugging Face class, cannot have {', '.join(obstacles)}"
        )
    return ExportTarget(architecture, model_type)


def _gpt2_obstacles(config: ModelConfig) -> list[str]:
    obstacles = []
    if not config.bias:
        obstacles.append("bias: false (projections and norms have biases)")
    if config.qk_norm:
        obstacles.append("qk_norm: true")
    if config.num_kv_heads != config.num_heads:
        obstacles.append(f"num_kv_heads: {config.num_kv_heads} (it is num_heads, {config.num_heads})")
    if config.head_dim * config.num_heads != config.hidden_size:
        obstacles.append(
            f"head_dim: {config.head_dim} (it is hidden_size / num_heads, {config.hidden_size} / {config.num_heads})"
        )
    return obstacles


def _llama_obstacles(config: ModelConfig) -> list[str]:
    # Checked by LlamaConfig since transformers 5, though the class itself needs only head_dim.
    if config.hidden_size % config.num_heads:
        return [f"num_heads: {config.num_heads} that does not divide hidden_size: {config.hidden_size}"]
    return []


def _qwen3_obstacles(config: ModelConfig) -> list[str]:
    return ["bias: true (the feed-forward network has none)"] if config.bias else []


def _moe_class(config: ModelConfig) -> tuple[str, str, list[str]]:
    if config.router == "sigmoid":
        # It chooses among groups of experts, of which there is one, by the sum of the best two in each.
        too_few = ["num_experts: 1 (it has at least 2)"] if config.num_experts == 1 else []
        return "Glm4MoeForCausalLM", "glm4_moe", too_few
    obstacles = []
    other = "with router: sigmoid Glm4MoeForCausalLM has it"
    if config.num_shared_experts:
        obstacles.append(f"num_shared_experts: {config.num_shared_experts} ({other})")
    if config.routed_scaling_factor != 1.0:
        obstacles.append(f"routed_scaling_factor: {config.routed_scaling_factor} ({other})")
    if config.qk_norm:
        return "Qwen3MoeForCausalLM", "qwen3_moe", obstacles
    if config.first_k_dense:
        obstacles.append(f"first_k_dense: {config.first_k_dense} (every layer has experts)")
    if not config.norm_topk_prob:
        obstacles.append("norm_topk_prob: false (weights of the chosen experts sum to 1)")
    return "MixtralForCausalLM", "mixtral", obstacles

"""Keys by other names.

Those of earlier versions: a new recipe with one is refused; the recipe of an earlier run is still read. And names in
other projects for what a recipe calls otherwise.
"""

from typing import Any

from lightlm.model.config import RENAMED_FIELDS

RENAMED = {
    "schedule.final_lr": "schedule.min_lr_ratio",
    "moe.balance_loss": "moe.balance_loss_coef",
    "moe.z_loss": "moe.z_loss_coef",
    "train.micro_batch": "train.micro_batch_size",
    **{f"model.{old}": f"model.{new}" for old, new in RENAMED_FIELDS.items()},
}

# Names of nanoGPT and transformers, and what a recipe has in their place.
ELSEWHERE = {
    "dropout": "did you mean train.dropout?",
    "epochs": "train.tokens is the length of a run, in tokens",
    "max_iters": "train.tokens is the length of a run, in tokens",
    "max_steps": "train.tokens is the length of a run, in tokens",
    "batch_size": "train.batch_tokens is the size of a batch, in tokens",
    "gradient_accumulation_steps": "it follows from train.batch_tokens and train.micro_batch_size",
    "warmup_steps": "schedule.warmup is the length of the warmup, in tokens or as a share such as 2%",
    "learning_rate": "did you mean optimizer.lr?",
    "min_lr": "schedule.min_lr_ratio is the last rate as a fraction of the peak",
    "n_layer": "did you mean model.num_layers?",
    "num_hidden_layers": "did you mean model.num_layers?",
    "n_head": "did you mean model.num_heads?",
    "num_attention_heads": "did you mean model.num_heads?",
    "n_embd": "did you mean model.hidden_size?",
    "d_model": "did you mean model.hidden_size?",
    "block_size": "did you mean model.max_seq_len?",
    "max_position_embeddings": "did you mean model.max_seq_len?",
    "tie_word_embeddings": "did you mean model.tie_embeddings?",
    "rms_norm_eps": "did you mean model.norm_eps?",
}


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain values with every renamed key under its new name."""
    return {section: _renamed(section, settings) for section, settings in values.items()}


def _renamed(section: str, settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {RENAMED.get(f"{section}.{key}", f".{key}").partition(".")[2]: value for key, value in settings.items()}

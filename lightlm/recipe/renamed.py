"""Keys of earlier versions. A new recipe with one is refused; the recipe of an earlier run is still read."""

from typing import Any

from lightlm.model.config import RENAMED_FIELDS

RENAMED = {
    "schedule.final_lr": "schedule.min_lr_ratio",
    "moe.balance_loss": "moe.balance_loss_coef",
    "moe.z_loss": "moe.z_loss_coef",
    "train.micro_batch": "train.micro_batch_size",
    **{f"model.{old}": f"model.{new}" for old, new in RENAMED_FIELDS.items()},
}


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain values with every renamed key under its new name."""
    return {section: _renamed(section, settings) for section, settings in values.items()}


def _renamed(section: str, settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {RENAMED.get(f"{section}.{key}", f".{key}").partition(".")[2]: value for key, value in settings.items()}

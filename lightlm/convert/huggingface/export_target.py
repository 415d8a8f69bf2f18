"""Which Hugging Face class a model exports to, decided only from its configuration, by the tables in `layouts`.

Imports nothing heavy: `train` and `recipes` ask when a recipe is read, long before anything is converted.
"""

from dataclasses import dataclass

from lightlm.convert.huggingface.layouts import LAYOUTS, as_yaml
from lightlm.model.config import ModelConfig

_KIND = ("norm", "position", "mlp")  # the fields that define a family of classes
# A refusal names the nearest class: the one that gets furthest in this list without an obstacle.
_DECISIVE = (*_KIND, "router", "num_experts", "qk_norm")


@dataclass(frozen=True)
class ExportTarget:
    """The Hugging Face class that computes what a model computes, or the reason why there is none."""

    architecture: str = ""  # the class, such as LlamaForCausalLM; empty when refused
    model_type: str = ""  # its `model_type` in config.json, such as llama
    refusal: str = ""  # one sentence naming the fields in the way; empty when it can be exported


def export_target(config: ModelConfig) -> ExportTarget:
    """Return the class that this configuration exports to with equal logits, or a refusal.

    A field that a class's layout does not place must have its default. `vocab_size` may still be 0.

    Raises:
        ValueError: the configuration is not a model.
    """
    config = config.resolved()
    obstacles = {model_type: layout.obstacles(config) for model_type, layout in LAYOUTS.items()}

    def distance(model_type: str) -> tuple[list[bool], int]:
        return [name in obstacles[model_type] for name in _DECISIVE], len(obstacles[model_type])

    nearest = min(LAYOUTS, key=distance)
    architecture = LAYOUTS[nearest].architecture
    if not obstacles[nearest]:
        return ExportTarget(architecture, nearest)
    if any(name in obstacles[nearest] for name in _KIND):
        kind = ", ".join(f"{name}: {getattr(config, name)}" for name in _KIND)
        return ExportTarget(refusal=f"no Hugging Face class has {kind} together ({_families()})")
    listed = ", ".join(
        f"{name}: {as_yaml(getattr(config, name))} ({reason})" for name, reason in obstacles[nearest].items()
    )
    return ExportTarget(refusal=f"{architecture}, the nearest Hugging Face class, cannot have {listed}")


def _families() -> str:
    """Return the combinations that classes have, for messages."""
    families: dict[str, list[str]] = {}
    for layout in LAYOUTS.values():
        kind = ", ".join(layout.fixed[name] for name in _KIND)
        families.setdefault(kind, []).append(layout.architecture)
    return "; ".join(f"{kind}: {', '.join(classes)}" for kind, classes in families.items())

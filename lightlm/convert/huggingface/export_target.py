"""Which Hugging Face class a model exports to, decided only from its configuration, by the tables in `layouts`.

Imports nothing heavy: `train` and `recipes` ask when a recipe is read, long before anything is converted.
"""

from dataclasses import dataclass

from lightlm.convert.huggingface.layouts import LAYOUTS, as_yaml
from lightlm.model.config import ModelConfig

# The nearest class to a configuration that none expresses: the one with the fewest obstacles among the first fields,
# then among the next, then among all.
_DECISIVE = (("norm", "position", "mlp"), ("router",), ("num_experts",), ("qk_norm",))


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

    def distance(model_type: str) -> list[int]:
        found = obstacles[model_type].keys()
        return [len(found & set(names)) for names in _DECISIVE] + [len(found)]

    nearest = min(LAYOUTS, key=distance)
    architecture = LAYOUTS[nearest].architecture
    if not obstacles[nearest]:
        return ExportTarget(architecture, nearest)
    listed = [f"{name}: {as_yaml(getattr(config, name))} ({reason})" for name, reason in obstacles[nearest].items()]
    return ExportTarget(refusal=f"{architecture}, the nearest Hugging Face class, cannot have {', '.join(listed)}")

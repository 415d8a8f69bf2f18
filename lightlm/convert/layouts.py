"""Layouts: how a program names the settings and the weights of one kind of model, as tables that read both ways.

The tables are also an allow-list. `Layout.obstacles` refuses each ModelConfig field that a layout does not place,
unless the field has its default. Imports nothing heavy.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lightlm.model.config import ModelConfig, Part


@dataclass(frozen=True)
class Link:
    """One of their modules and ours that hold the same weights, or one tensor by its full name; `{}` is the layer."""

    theirs: str  # `*` is the expert: they have one tensor per expert, ours is their stack
    ours: str  # several names: theirs is these, concatenated along the output
    transposed: bool = False  # GPT-2's Conv1D stores its weight (input, output)
    by_head: bool = False  # concatenated head by head: head 0 of the first, head 0 of the second, ...


@dataclass(frozen=True)
class Rule:
    """Which values of a ModelConfig field a class expresses, beyond what its config.json keys say."""

    accepts: Callable[[ModelConfig], bool]  # of a resolved configuration
    requirement: str = ""  # for the refusal; other fields may be named in braces


@dataclass(frozen=True)
class Layout:
    """A Hugging Face class as a set of names; `keys`, `fixed` and `rules` together place every ModelConfig field."""

    architecture: str
    keys: dict[str, str]  # ModelConfig field -> their key, which expresses every value
    fixed: dict[str, Any]  # ModelConfig field -> the value that it has in every model of this class
    rules: dict[str, Rule]  # ModelConfig field -> which values the class expresses without a key, or in spite of one
    defaults: dict[str, Any]  # their keys that may be missing (in files of older versions), and what that means
    constants: dict[str, tuple[Any, ...]]  # their keys that must hold one of these; missing means the default or first
    links: tuple[Link, ...]
    # ModelConfig field -> their key, and for each value that the class has their names, the one to write first.
    choices: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = field(default_factory=dict)
    base: str = "model."  # prefix of all weights but the head's; files saved from the bare model lack it
    # Their keys for biases, where the class leaves the choice, and the parts that get them (`ModelConfig.has_bias`).
    bias_keys: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    zero_centered: bool = False  # norms multiply by 1 + weight
    neighboring_pairs: bool = False  # rotary pairs are neighboring channels (2i, 2i + 1); ours are (i, i + K/2)
    written: dict[str, Any] = field(default_factory=dict)  # further keys of an exported config.json
    rope: dict[str, float] = field(default_factory=dict)  # rotary settings where config.json has none
    layer_types: tuple[str, ...] = ()  # what a missing `layer_types` means, where it is not full_attention throughout
    aliases: dict[str, str] = field(default_factory=dict)  # key -> its name in another version of transformers
    stacked_links: tuple[Link, ...] = ()  # names where experts are stacked on disk (save_original_format=False)

    def obstacles(self, config: ModelConfig) -> dict[str, str]:
        """Return the fields that keep a resolved configuration from this class, each with what the class requires."""
        found = {}
        for setting in fields(config):
            name, value = setting.name, getattr(config, setting.name)
            if name in self.rules:
                if not self.rules[name].accepts(config):
                    found[name] = self.rules[name].requirement.format(**vars(config))
            elif name in self.choices:
                if value not in (known := self.choices[name][1]):
                    found[name] = f"must be {' or '.join(known)}"
            elif name not in self.keys and value != (needed := self.fixed.get(name, setting.default)):
                found[name] = f"must be {as_yaml(needed)}" if name in self.fixed else "no equivalent in this class"
        return found

    @property
    def needs_all_biases(self) -> bool:
        """Whether the class has biases everywhere, and takes models without by zeros."""
        return self.fixed.get("bias") is True and "bias" in self.rules

    def offset(self, name: str) -> float:
        """Return what our tensor of this name exceeds theirs by."""
        return 1.0 if self.zero_centered and "norm" in name else 0.0


def as_yaml(value: Any) -> str:
    """Return a setting's value as a recipe writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# The nearest layout to a configuration that none expresses: the one with the fewest obstacles among the first fields,
# then among the next, then among all.
_DECISIVE = (("attention", "norm", "position", "mlp"), ("router",), ("num_experts",), ("attention_gate",), ("qk_norm",))


def nearest_layout(layouts: dict[str, Layout], config: ModelConfig) -> tuple[str, str]:
    """Return the first layout that expresses a configuration and an empty text, or the nearest and what is in its way.

    Fields that fold do not count: see `lightlm.convert.folding`. `vocab_size` may still be 0.

    Raises:
        ValueError: the configuration is not a model.
    """
    config = config.resolved().folded()
    obstacles = {name: layout.obstacles(config) for name, layout in layouts.items()}

    def distance(name: str) -> list[int]:
        found = obstacles[name].keys()
        return [len(found & set(names)) for names in _DECISIVE] + [len(found)]

    nearest = min(layouts, key=distance)
    listed = [f"{name}: {as_yaml(getattr(config, name))} ({why})" for name, why in obstacles[nearest].items()]
    return nearest, ", ".join(listed)


def layer_links(links: Iterable[Link], depth: int, repeats: int = 1) -> Iterator[Link]:
    """Yield the links of `depth` layers, with their numbers; our block i is their layers i x repeats and following."""
    for link in links:
        for layer in range(depth if "{}" in link.theirs else 1):
            ours = link.ours.replace("{}", str(layer // repeats))
            yield replace(link, theirs=link.theirs.format(layer), ours=ours)

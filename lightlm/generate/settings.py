"""How to answer one prompt: sampling, length, seed and ends. Imports no torch, so mistakes are reported at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from lightlm.errors import UsageError
from lightlm.generate.sampling import DEFAULT, Sampling
from lightlm.names import nearest

_TYPES: dict[Any, str] = {float: "a number", int: "a whole number", int | None: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Settings:
    """How to answer one prompt.

    Args:
        max_new_tokens: where the answer ends at the latest.
        seed: equal seeds give equal answers.
        stop: texts that end the answer and are not part of it; they may spell special tokens.
        sliding_window: what happens when the model's context is full. False ends the answer. True drops the oldest
            half: the model reads the newest half anew, after what its tokenizer puts before each text, and continues.

    Raises:
        UsageError: a value is out of its range.
    """

    sampling: Sampling = DEFAULT
    max_new_tokens: int = 200
    seed: int = 1337
    stop: tuple[str, ...] = ()
    sliding_window: bool = False

    def __post_init__(self) -> None:
        self.sampling.check_most(self.max_new_tokens)
        if "" in self.stop:
            raise UsageError("a stop string is empty; leave it out")

    def changed(self, values: Mapping[str, Any]) -> Settings:
        """Return these settings with others in place of some, by their names in JSON.

        Besides the names here there are those of `Sampling`. `stop` is a text or a list of texts, `logit_bias` an
        object from token ids to numbers. None leaves a setting as it is, but for `top_k`, which it switches off.

        Raises:
            UsageError: a name is unknown, or a value has the wrong type or is out of its range.
        """
        own: dict[str, Any] = {}
        sampling: dict[str, Any] = {}
        for name, value in values.items():
            if name not in changeable():
                hint = nearest(name, changeable())
                raise UsageError(f"there is no setting {name}" + (f"; do you mean {hint}?" if hint else ""))
            if value is None and name != "top_k":
                continue
            if name == "stop":
                own[name] = tuple(_validated(name, [value] if isinstance(value, str) else value, list[str]))
            elif name == "logit_bias":
                pairs = _validated(name, value, dict[str, float])
                sampling[name] = tuple((_token_id(token), bias) for token, bias in pairs.items())
            else:
                place = own if name in _own() else sampling
                place[name] = _validated(name, value, changeable()[name])
        return replace(self, **own, sampling=replace(self.sampling, **sampling))


# Settings of transformers' generation_config.json -> ours.
_SUGGESTED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
}


def suggestions(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling settings that a model's generation_config suggests, under our names."""
    return {
        ours: generation_config[theirs]
        for theirs, ours in _SUGGESTED.items()
        if generation_config.get(theirs) is not None
    }


@functools.cache
def _own() -> dict[str, Any]:
    """The types of the settings of this class, without `sampling`, whose own are listed in its place."""
    return {name: kind for name, kind in get_type_hints(Settings).items() if name != "sampling"}


@functools.cache
def changeable() -> dict[str, Any]:
    """The names that `Settings.changed` takes, and their types."""
    return {**{field.name: get_type_hints(Sampling)[field.name] for field in fields(Sampling)}, **_own()}


def _validated(name: str, value: Any, kind: Any) -> Any:
    """Return a value of JSON in its type; a whole number is a number, too. Raises UsageError."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        words = {"stop": "a text or a list of texts", "logit_bias": "an object from token ids to numbers"}.get(name)
        words = words or _TYPES[kind]
        raise UsageError(f"{name.replace('_', '-')} must be {words}, is {value!r}") from None


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdigit()):
        raise UsageError(f"logit-bias must map token ids to numbers; {name!r} is not an id")
    return int(name)


DEFAULTS = Settings()

"""What was measured once on this machine, and is remembered, so that the same command does the same again."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch

import lightlm
from lightlm.files import cache_folder, write_text
from lightlm.generate.step.fast import forward_of
from lightlm.generate.step.native import library
from lightlm.machine import cpu_features, processor
from lightlm.model.transformer import Transformer

T = TypeVar("T", bound=str | list[float])


def measured_once(facts: Any, measure: Callable[[], T], accepts: Callable[[Any], bool]) -> T:
    """Return what `measure` returns, from the first call for these facts on this machine.

    A new version of LightLM or torch measures anew. Without a folder for it, or room, each process measures.

    Args:
        facts: what the measurement depends on, as JSON.
        accepts: whether a value in the file, which others may have changed, is one that `measure` may return.
    """
    machine = [processor(), cpu_features()]  # a home folder may be shared between machines
    content = json.dumps([lightlm.__version__, machine, torch.__version__, library() is not None, facts], default=str)
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    known = _read()
    if key in known and accepts(known[key]):
        value: T = known[key]
        return value
    known[key] = value = measure()
    with contextlib.suppress(OSError, RuntimeError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_text(cache_folder() / "decoding.json", json.dumps(known, indent=1))
    return value


def speed_facts(model: Transformer) -> list[Any]:
    """Return what the speed of a model's passes depends on, as JSON, besides the machine."""
    shape = sorted(model.config.to_dict().items())
    precision = [str(model.embed_tokens.weight.dtype), model.decoding_precision]
    return [shape, precision, model.device.type, type(forward_of(model)).__name__]


def _read() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        known = json.loads((cache_folder() / "decoding.json").read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return known
    return {}

"""What the benchmarks that load torch share: model shapes, timing, and facts about the machine."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightlm.device import describe
from lightlm.machine import cpu_features, processor, versions
from lightlm.model.config import ModelConfig
from lightlm.recipe import Recipe, load_recipe

DEMO_VOCABULARY, GPT2_VOCABULARY = 8192, 50_257


def load_shape(name: str, overrides: Sequence[str] = (), *, positions: int = 0) -> tuple[Recipe, ModelConfig]:
    """Return a recipe and its model's shape, with a vocabulary and at least this many positions."""
    recipe = load_recipe(name, list(overrides))
    vocab_size = recipe.model.vocab_size or (DEMO_VOCABULARY if "demo" in name else GPT2_VOCABULARY)
    max_seq_len = max(positions, recipe.model.max_seq_len)
    return recipe, replace(recipe.model, vocab_size=vocab_size, max_seq_len=max_seq_len)


def dense_config(config: ModelConfig) -> ModelConfig:
    """Return the dense shape with as many active parameters, to the nearest feature per layer, routers not counted."""
    config = config.resolved()
    active = (config.num_experts_per_tok + config.num_shared_experts) * config.moe_intermediate_size
    layers, first = config.num_layers, config.first_k_dense
    size = round((first * config.intermediate_size + (layers - first) * active) / layers)
    fields = config.__dataclass_fields__
    moe_keys = [key for key in fields if "expert" in key or key.startswith(("moe_", "first_k", "router", "routed"))]
    return replace(config, intermediate_size=size, **{key: fields[key].default for key in moe_keys})


def seconds_of(
    function: Callable[[], object],
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds of a call, with the work that it leaves to an accelerator."""
    synchronize = torch.get_device_module(device or "cpu").synchronize
    synchronize()
    started = clock()
    function()
    synchronize()
    return clock() - started


def machine_facts(device: torch.device | None = None, *packages: str) -> dict[str, Any]:
    """Return where a result was measured: device, machine, and versions of LightLM, torch and further packages."""
    facts = {} if device is None else {"device": describe(device)}
    return facts | {
        "machine": f"{platform.platform()}, {processor()} ({cpu_features()})",
        "versions": versions(*packages),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` rather than `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")

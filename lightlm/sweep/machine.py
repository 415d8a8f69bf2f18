"""What a sweep asks of its machine, in a process of its own: the sweep holds no torch and no GPU while it waits.

Reads a request as JSON on standard input, and prints the answer as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightlm.errors import LightLMError, UsageError
from lightlm.processes import python_command, python_environment
from lightlm.recipe import Recipe, parse_recipe

_ENDLESS = 10**12  # tokens of a run that any limit of time shortens


@dataclass(frozen=True)
class Machine:
    """The device that runs use, the numbers of its GPUs, and the precision that `auto` means.

    Attributes:
        slow: what `device.pick_dtype` notes of a named precision; empty if it is not slow here.
    """

    device: str
    gpus: tuple[str, ...]
    dtype: str
    slow: str = ""


def look_at_machine(recipe: Recipe) -> Machine:
    """Return what runs of this recipe find here.

    Raises:
        UsageError: the recipe's device is missing.
    """
    found = _ask({"recipe": recipe.to_dict()}, os.environ)
    gpus: tuple[str, ...] = ()
    if found["device"] == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = tuple(visible.split(",") if visible else map(str, range(found["gpus"])))
    return Machine(found["device"], gpus, found["dtype"], found["slow"])


def fitting_tokens(recipe: Recipe, minutes: float, environment: Mapping[str, str]) -> int:
    """Return the tokens that a run of this recipe trains on within some minutes, by the time of a few steps.

    Raises:
        LightLMError: the steps failed.
    """
    return int(_ask({"recipe": recipe.to_dict(), "minutes": minutes}, environment)["tokens"])


def _ask(request: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        python_command("-m", "lightlm.sweep.machine"),
        input=json.dumps(request),
        env=python_environment(environment) | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(last) if done.returncode == UsageError.exit_code else LightLMError(last)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from lightlm.device import pick_device, training_dtype

    recipe = parse_recipe(request["recipe"], "the request", earlier=True)
    if "minutes" not in request:
        device = pick_device(recipe.train.device)
        notes: list[str] = []
        dtype = training_dtype(recipe.train.dtype, device, recipe.model.hidden_size, notes.append)
        gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
        return {"device": device.type, "gpus": gpus, "dtype": str(dtype).removeprefix("torch."), "slow": "".join(notes)}
    from lightlm.train.planning.time_limit import fit_time
    from lightlm.train.setup import open_data

    data = open_data(recipe, required=True)
    assert data is not None  # required
    # Only training counts: how often a run validates must not cost it tokens.
    endless = recipe.train.model_copy(update={"tokens": _ENDLESS})
    unvalidated = recipe.eval.model_copy(update={"every": 0})
    recipe = recipe.model_copy(update={"train": endless, "eval": unvalidated})
    return {"tokens": fit_time(recipe, data, request["minutes"]).tokens}


if __name__ == "__main__":
    try:
        print(json.dumps(_answer(json.load(sys.stdin))))
    except LightLMError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

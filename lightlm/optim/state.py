"""An optimizer's state under parameter names, as checkpoints hold it: it fits any grouping and number of processes."""

from typing import Any

import torch
from torch import nn

from lightlm.errors import CheckpointError
from lightlm.sharding import is_sharded, like_parameter, whole


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state per parameter name, without copying it.

    The state of a sharded run is gathered on the CPU, for which all processes must call.
    """
    return {
        name: {key: whole(value).cpu() if is_sharded(value) else value for key, value in state.items()}
        for name, parameter in model.named_parameters()
        if (state := optimizer.state.get(parameter))
    }


def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, dict[str, Any]]) -> None:
    """Restore what `named_state` returned.

    Raises:
        CheckpointError: the names are not those of the model's parameters.
    """
    parameters = dict(model.named_parameters())
    if states and states.keys() != parameters.keys():
        differing = sorted(states.keys() ^ parameters.keys())
        raise CheckpointError(f"the optimizer state does not fit the model; differing parameters: {differing[:5]}")
    for name, state in states.items():
        parameter = parameters[name]
        # AdamW keeps its step count in fp32 on the parameter's device when fused.
        optimizer.state[parameter] = {
            key: like_parameter(value, parameter) if isinstance(value, torch.Tensor) else value
            for key, value in state.items()
        }

"""The mean of a run's last checkpoints (arXiv 1803.05407; for language models 2209.14981)."""

from pathlib import Path

import torch

from lightlm import checkpoint
from lightlm.checkpoint import LoadedModel
from lightlm.convert.formats import require_average
from lightlm.errors import CheckpointError
from lightlm.runs import checkpoints, run_of


def load_average(newest: Path, count: int, weights: str | None = None) -> LoadedModel:
    """Load the mean of a run's checkpoint and the `count - 1` before it, summed in float64.

    Args:
        weights: which weights of each checkpoint, as for `checkpoint.load_model`.

    Raises:
        CheckpointError: the checkpoint belongs to no run, there are fewer, or one is damaged.
    """
    run, here = run_of(newest), Path.cwd()
    if run is not None and run.is_relative_to(here):  # as a user names it
        run = run.relative_to(here)
    saved = checkpoints(run) if run is not None else []
    names = [path.name for path in saved]
    if newest.resolve().name not in names:
        raise CheckpointError(f"{newest} is not a checkpoint of a run, so there are none to average; name a run")
    until = saved[: names.index(newest.resolve().name) + 1]
    if len(until) < count:
        raise CheckpointError(
            f"{run} has {len(until)} of {count} checkpoints to average up to {until[-1].name}: "
            f"{', '.join(path.name for path in until)}; "
            f"average fewer, or train with checkpoint.keep_last={count} (or keep_every) and a checkpoint.every"
        )
    chosen = until[-count:]
    for path in chosen if weights is not None else ():
        require_average(path)
    loaded = checkpoint.load_model(chosen[-1], weights=weights)
    state = loaded.model.state_dict()
    file = loaded.weights[0].name
    sums = {name: tensor.double() for name, tensor in state.items()}
    for path in chosen[:-1]:
        found = checkpoint.load_weights(path, file)
        for name, tensor in sums.items():
            tensor += found[name]
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(sums[name] / count)
    return LoadedModel(loaded.model, loaded.tokenizer, chosen[-1], tuple(path / file for path in chosen))

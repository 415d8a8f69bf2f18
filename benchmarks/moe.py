"""Training speed of a mixture of experts, beside a dense model of the same active parameters and beside transformers.

    lightlm train recipes/moe-demo.yaml
    python benchmarks/moe.py --recipe moe-demo --data data/pydocs --start runs/moe-demo optimizer.lr=1e-6
    python benchmarks/moe.py --recipe moe --sequences 2 --length 2048 --data data/corpus --contestants lightlm,dense
    python benchmarks/moe.py --recipe moe-demo --data data/pydocs \\
        --contestants "lightlm,dense,transformers eager,transformers grouped_mm,transformers batched_mm"

Prints JSON like train.py, and the parameters, FLOPs per token and load violation by layer.

The model is that of --start, or is first trained for --settle steps on the data: untrained routers send all tokens to
the same few experts, and balancing them takes hundreds of steps. A learning rate near 0 then keeps them as they are.
All contestants but the dense one start from its weights, so that they choose the same experts, and take a step of each
batch in turn. `transformers NAME` sets its experts' implementation.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from common import report
from contest import Builder, Contestant, batches_of, compete, contest_parser, shape, summary
from contest import lightlm as untrained
from measure import dense_config
from safetensors.torch import save_file

from lightlm.convert.huggingface.config import write_config
from lightlm.convert.huggingface.layouts import LAYOUTS, export_target
from lightlm.convert.huggingface.weights import with_shared_experts
from lightlm.convert.load import load_pretrained
from lightlm.convert.renaming import their_state
from lightlm.device import autocast, keep_freed_memory, pick_device, pick_dtype
from lightlm.model.transformer import Transformer
from lightlm.optim.groups import build_optimizer
from lightlm.train.step.parallel import LossModule, MicroBatch
from lightlm.train.step.routers import move_selection_biases, router_losses

SETTLING_RATE = 0.1  # of the selection bias, falling to 0 over the steps: high, because they are few


def lightlm(options: argparse.Namespace, device: torch.device, suffix: str) -> Contestant:
    """Return LightLM's mixture with the settled weights."""
    model, loss, optimizer = untrained(options, device, suffix)
    model.load_state_dict(torch.load(options.folder / "state.pt", map_location=device, weights_only=True))
    return model, loss, optimizer


def dense(options: argparse.Namespace, device: torch.device, suffix: str) -> Contestant:
    """Return LightLM's dense model of the same active size."""
    return untrained(options, device, suffix, dense=True)


def transformers(options: argparse.Namespace, device: torch.device, suffix: str) -> Contestant:
    """Return transformers' mixture with the settled weights; `suffix` is its experts' implementation."""
    import transformers

    recipe, _ = shape(options)
    chosen = {"experts_implementation": suffix} if suffix else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, **chosen)
    model = model.to(device).train()
    model.config.use_cache = False
    optimizer = build_optimizer(model, recipe.optimizer, pick_dtype(options.dtype, device))
    return model, lambda tokens: model(tokens, labels=tokens).loss, optimizer


CONTESTANTS: dict[str, Builder] = {"lightlm": lightlm, "dense": dense, "transformers": transformers}


def settle(options: argparse.Namespace) -> list[float]:
    """Train the model briefly, write it to the folder in our format and theirs, and return its layers' violations."""
    device = pick_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    recipe, config = shape(options)
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    loss, optimizer = (
        LossModule(model, router_losses(recipe)),
        build_optimizer(model, recipe.optimizer, pick_dtype(options.dtype, device)),
    )
    batches = batches_of(options, device)
    if options.start is not None:
        model.load_state_dict(load_pretrained(options.start).model.state_dict())
    violations: list[float] = []
    for step in range(options.settle if options.start is None else 1):
        tokens = next(batches)
        with autocast(device, pick_dtype(options.dtype, device)):
            result = loss(MicroBatch(tokens[:, :-1], tokens[:, 1:].contiguous()))
        assert result.load_LE is not None, "this recipe has no experts"
        violations = (result.load_LE.amax(1) / result.load_LE.double().mean(1) - 1).tolist()
        if options.start is None:
            (result.objective / (tokens.numel() - len(tokens))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            move_selection_biases(model, result.load_LE, SETTLING_RATE * (1 - step / options.settle))
    torch.save(model.state_dict(), options.folder / "state.pt")
    target = export_target(config).model_type
    values = write_config(target, config.resolved())
    (options.folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if not config.num_shared_experts:
        state = with_shared_experts(config, state, width=0)
    theirs = their_state(LAYOUTS[target], config.resolved(), state)
    save_file(theirs, options.folder / "model.safetensors", metadata={"format": "pt"})
    return violations


def main() -> None:
    parser = contest_parser(__doc__, recipe="moe-demo", contestants="lightlm,dense,transformers")
    parser.add_argument("--settle", type=int, default=40, help="steps of training before the measurement")
    parser.add_argument("--start", type=Path, help="a run or a checkpoint of the recipe, instead of --settle")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        violations = settle(options)
        seconds, peaks = compete(options, CONTESTANTS)
    _, config = shape(options)
    with torch.device("meta"):
        models = {"lightlm": Transformer(config), "dense": Transformer(dense_config(config))}
    result = summary(options, seconds, peaks) | {
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "flops_per_token": {name: model.flops_per_token(options.length) for name, model in models.items()},
        "violation": [round(violation, 2) for violation in violations],
    }
    if "dense" in seconds:
        result["step_time_to_dense"] = round(1 / result["ratio"].pop("to dense"), 3)
    report(result, options.out)


if __name__ == "__main__":
    main()

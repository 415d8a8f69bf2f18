"""`lightlm plan`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, out, print_json

if TYPE_CHECKING:
    from rich.table import Table

_PARTS = {
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer state",
    "weight_copies": "16-bit copies of weights",
    "activations": "activations of a micro-batch",
    "logits": "logits and the head's gradients",
    "backward": "backward pass of one layer",
    "gaps": "gaps between these parts, a tenth",
    "checkpoint_copy": "copy for saving",
    "process": "Python and torch",
    "total": "sum",
}


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Overrides, such as train.tokens=1B.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Plan for auto, cpu, cuda or mps instead of train.device.")] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Time a few steps on this machine.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print what a recipe takes: parameters, memory by part, steps, hours. The data need not be prepared."""
    with console.status("Planning ..."):
        from lightlm.recipe import load_recipe
        from lightlm.train.planning.plan import make_plan

        changes = list(overrides or []) + ([f"train.device={device}"] if device else [])
        document = make_plan(load_recipe(recipe, changes), probe=probe)
    if as_json:
        print_json(document)
        return
    _print(document)


def _print(plan: dict[str, Any]) -> None:
    from lightlm.quantities import format_quantity

    model, run, machine = plan["model"], plan["run"], plan["machine"]
    measured = machine["measured"]
    sizes = {
        "parameters": format_quantity(model["parameters"]),
        "active per token": format_quantity(model["active_parameters"]),
        "in tables and head": format_quantity(model["embedding_parameters"]),
        "vocabulary": f"{model['vocab_size']:,}",
        "FLOPs per token": format_quantity(model["flops_per_token"]),
        "training tokens": format_quantity(run["tokens"]),
        "steps": f"{run['steps']:,}",
        "tokens per batch": f"{run['batch_tokens']:,}",
        "validations": f"{run['validations']:,}, {format_quantity(run['validation_tokens'])} tokens in total",
        "FLOPs in total": f"{run['flops']:.3g}",
    }
    out.print(_facts(f"Plan of {plan['recipe']}", sizes))
    out.print(_facts(f"Training on {machine['device']}, {machine['dtype']}", _training(machine)))
    if measured:
        times = {
            "micro-batch, forward and backward": f"{measured['pass_seconds']:.3g} s",
            "micro-batch in validation": f"{measured['forward_seconds']:.3g} s",
            "clipping and optimizer": f"{measured['update_seconds']:.3g} s",
            "step": f"{measured['step_seconds']:.3g} s, {measured['tokens_per_second']:,.0f} tokens/s",
            "whole run": _duration(measured["hours"]),
        }
        out.print(_facts("Measured in 3 steps", times))
    out.print(_facts("Inference", _inference(plan["inference"])))
    out.print(_gpu_table(plan))
    share = f"{plan['assumed_utilization']:.0%}"
    out.print(f"Times assume {share} of the bf16 peak; small batches reach less.", soft_wrap=True)
    for note in plan["notes"]:
        out.print(f"Note: {note}", soft_wrap=True, markup=False)


def _training(machine: dict[str, Any]) -> dict[str, str]:
    rows = {"micro-batch": f"{machine['micro_batch']} sequences, {machine['accumulation']} per step"}
    rows |= {_PARTS[part]: _bytes(size) for part, size in machine["memory"].items()}
    if machine["measured"] and (peak := machine["measured"]["memory"]) is not None:
        rows["measured at the peak"] = _bytes(peak)
    if "checkpoint_copy" not in machine["memory"]:
        rows["copy for saving, CPU memory"] = _bytes(machine["host_checkpoint_copy"])
    return rows


def _inference(parts: dict[str, int]) -> dict[str, str]:
    return {
        precision: f"weights {_bytes(parts[f'weights_{name}'])}, cache {_bytes(parts[f'cache_{name}'])} per sequence"
        for precision, name in (("bf16", "bfloat16"), ("fp32", "float32"))
    }


def _facts(title: str, rows: dict[str, str]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD, min_width=60)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, Text(value), style="bold" if name == _PARTS["total"] else "")
    return table


def _gpu_table(plan: dict[str, Any]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title="One GPU of each kind (estimates)", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("GPU", "memory", "needed", "fits", "micro-batch", "time"):
        table.add_column(heading, justify="left" if heading == "GPU" else "right")
    for row in plan["gpus"]:
        table.add_row(
            row["gpu"],
            _bytes(row["device_memory"]),
            _bytes(row["memory"]),
            "yes" if row["fits"] else "no",
            str(row["micro_batch"]),
            "-" if row["hours"] is None or not row["fits"] else _duration(row["hours"]),
        )
    return table


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.3g} days"
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.3g} minutes" if hours >= 1 / 60 else f"{hours * 3600:.3g} s"

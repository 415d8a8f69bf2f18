"""`lightlm plan`."""

from typing import Annotated, Any

import typer

from lightlm.cli.console import console, out, print_json, print_table

_PARTS = {
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer state",
    "weight_copies": "copies of weights",
    "activations": "activations of a micro-batch",
    "logits": "logits and the head's gradients",
    "backward": "backward pass of one layer",
    "teacher": "teacher",
    "teacher_pass": "pass and logits of the teacher",
    "ema": "average of the weights (train.ema)",
    "gaps": "gaps between these parts, a tenth",
    "checkpoint_copy": "copy for saving",
    "process": "Python and torch",
    "total": "sum",
}


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Overrides, such as train.tokens=1B.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Plan for auto, cpu, cuda or mps instead of train.device.")] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Time a few steps on this machine.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print what a recipe takes: parameters, memory by part, steps, hours. The data need not be prepared."""
    from lightlm.choices import check_device
    from lightlm.convert.load import find_start
    from lightlm.recipe import load_recipe

    changes = list(overrides or []) + ([f"train.device={device}"] if device else [])
    notes: list[str] = []
    parsed = load_recipe(recipe, changes, notes.append, find_start)
    check_device(parsed.train.device)
    with console.status("Planning ..."):
        from lightlm.train.planning.plan import make_plan

        document = make_plan(parsed, probe=probe)
        document["notes"] = notes + document["notes"]
    if as_json:
        print_json(document)
    else:
        _print(document)


def _print(plan: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD

    from lightlm.quantities import format_quantity

    model, run, machine, parts = plan["model"], plan["run"], plan["machine"], plan["inference"]
    facts = {
        "parameters": format_quantity(model["parameters"]),
        "active per token": format_quantity(model["active_parameters"]),
        "in tables and head": format_quantity(model["embedding_parameters"]),
        **({"multi-token prediction": format_quantity(model["mtp_parameters"])} if model["mtp_parameters"] else {}),
        "vocabulary": f"{model['vocab_size']:,}",
        "FLOPs per token": format_quantity(model["flops_per_token"]),
        "training tokens": format_quantity(run["tokens"]),
        "steps": f"{run['steps']:,}",
        "tokens per batch": f"{run['batch_tokens']:,}",
        "validations": f"{run['validations']:,}, {format_quantity(run['validation_tokens'])} tokens in total",
        **{f"read of {part['name']}": _source(part) for part in run["sources"]},
        "FLOPs in total": f"{run['flops']:.3g}",
        **_teacher(run["teacher"]),
    }
    tables = {f"Plan of {plan['recipe']}": facts}
    training = {"micro-batch": f"{machine['micro_batch']} sequences, {machine['accumulation']} per step"}
    training |= {_PARTS[part]: _bytes(size) for part, size in machine["memory"].items()}
    if "checkpoint_copy" not in machine["memory"]:
        training["copy for saving, CPU memory"] = _bytes(machine["host_checkpoint_copy"])
    tables[f"Training on {machine['device']}, {machine['dtype']}"] = training
    if measured := machine["measured"]:
        tables["Measured in 3 steps"] = {
            "micro-batch, forward and backward": f"{measured['pass_seconds']:.3g} s",
            "micro-batch in validation": f"{measured['forward_seconds']:.3g} s",
            "clipping and optimizer": f"{measured['update_seconds']:.3g} s",
            "step": f"{measured['step_seconds']:.3g} s, {measured['tokens_per_second']:,.0f} tokens/s",
            "memory at the peak": "unknown" if measured["memory"] is None else _bytes(measured["memory"]),
            "whole run": _duration(measured["hours"]),
        }
    tables["Inference"] = {
        precision: f"weights {_bytes(parts[f'weights_{name}'])}, cache {_bytes(parts[f'cache_{name}'])} per sequence, "
        f"{parts[f'token_{name}']:,} bytes per token"
        for precision, name in (("bf16", "bfloat16"), ("fp32", "float32"))
    }
    for title, rows in tables.items():
        print_table(rows.items(), title=title, right=[1], box=SIMPLE_HEAD, min_width=60)
    out.print(f"Learning rate: {run['schedule']}", soft_wrap=True, markup=False)
    for name, text in run["other_schedules"].items():
        out.print(f"{name.capitalize()}: {text}", soft_wrap=True, markup=False)
    out.print()
    gpus = [
        (
            row["gpu"],
            _bytes(row["device_memory"]),
            _bytes(row["memory"]),
            "yes" if row["fits"] else "no",
            str(row["micro_batch"]),
            "-" if row["utilization"] is None else f"{row['utilization']:.0%}",
            "-" if row["hours"] is None or not row["fits"] else _duration(row["hours"]),
        )
        for row in plan["gpus"]
    ]
    headings = ("GPU", "memory", "needed", "fits", "micro-batch", "of peak", "time")
    print_table(gpus, *headings, title="One GPU of each kind (estimates)", right=range(1, 7), box=SIMPLE_HEAD)
    out.print(
        f"Times assume that products reach {plan['assumed']['compute']:.0%} of the bf16 peak, or operations "
        f"{plan['assumed']['bandwidth']:.0%} of the memory's bandwidth, whichever takes longer. Not measured on a GPU.",
        soft_wrap=True,
    )
    for note in plan["notes"]:
        out.print(f"Note: {note}", soft_wrap=True, markup=False)


def _teacher(teacher: dict[str, Any] | None) -> dict[str, str]:
    """Return what learning from a teacher takes, beside memory."""
    from lightlm.quantities import format_quantity

    if teacher is None:
        return {}
    rows = {"teacher": teacher["teacher"]}
    if teacher["flops"] is not None:
        rows["parameters of the teacher"] = format_quantity(teacher["parameters"])
        rows["its FLOPs per token"] = format_quantity(teacher["flops_per_token"])
        rows["its FLOPs in total"] = f"{teacher['flops']:.3g}"
    disk = "" if teacher["disk"] is None else f", {_bytes(teacher['disk'])} of disk"
    return rows | {"its probabilities, stored": f"{teacher['record_bytes']} bytes per token{disk}"}


def _source(part: dict[str, Any]) -> str:
    """Return what a run reads of a folder, such as `7M tokens, 1.4 epochs of 5M`."""
    from lightlm.quantities import format_quantity

    read = f"{format_quantity(part['tokens'])} tokens"
    if not part["train_tokens"]:
        return f"{read}, {'not prepared yet' if part['train_tokens'] is None else 'no train split'}"
    return f"{read}, {part['epochs']:.2g} epochs of {format_quantity(part['train_tokens'])}"


def _bytes(size: float) -> str:
    from lightlm.quantities import short_form

    return short_form(size, ((" MB", 1e6), (" GB", 1e9)))


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.3g} days" if hours < 24_000 else f"{hours / 24:,.0f} days"
    if hours >= 1:
        return f"{hours:.3g} hours"
    if hours < 1 / 3600:
        return "below 1 s"
    return f"{hours * 60:.3g} minutes" if hours >= 1 / 60 else f"{hours * 3600:.3g} s"

"""`lightlm eval`."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, print_json
from lightlm.cli.evaluation_display import print_table
from lightlm.errors import UsageError

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel
    from lightlm.evaluate.runner import Tasks


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL ...]", help="Runs, checkpoints, model folders or Hub ids; the newest run unless given."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(metavar="T1,T2", help="lm-eval's tasks, groups or globs, and heldout (bits per byte).")
    ] = "heldout",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task, for a quick look.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; each task's own unless given.")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Sequences in a batch.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 where it is fast), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Data folder of heldout; the one the run was trained on unless given."),
    ] = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Results file, or a folder; <run>/eval/ unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON document.")] = False,
) -> None:
    """Score models with lm-evaluation-harness: checkpoint -> scores.

    Stock tasks run unchanged; results are lm-eval's own JSON. To work offline, set HF_HUB_OFFLINE=1 where a folder
    bears the data set's Hub id (Rowan/hellaswag).
    """
    references: list[str | None] = list(models) if models else [None]
    if out_path is not None:
        _check_out(out_path, len(references))
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is first imported
    with console.status("Reading lm-eval's list of tasks ..."):
        from lightlm.convert.loading import load_pretrained
        from lightlm.device import pick_device
        from lightlm.evaluate.harness import batch_limits, evaluation_dtype
        from lightlm.evaluate.heldout import HELDOUT
        from lightlm.evaluate.runner import Settings, Tasks

        target = pick_device(device)
        precision = evaluation_dtype(dtype, target)
        batch_limits(batch_size, target)
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        chosen = Tasks(Settings(names, limit, num_fewshot, data))
    heldout_data = _heldout_data(references, data) if HELDOUT in chosen.names else None
    reports = []
    for reference in references:
        loaded = load_pretrained(reference, target, precision)
        reports.append(_evaluate_one(loaded, chosen, batch_size, out_path, heldout_data))
    if as_json:
        print_json({"models": reports})
    else:
        print_table(reports)


def _check_out(path: Path, models: int) -> None:
    """Refuse an --out that could not be written, before hours of evaluation rather than after them."""
    is_file = path.suffix == ".json"
    if is_file and models > 1:
        raise UsageError(f"--out {path} is one file for {models} models; give a folder")
    if is_file and path.is_dir():
        raise UsageError(f"--out {path} is a folder, and a name ending in .json means a file; choose another name")
    folder = path.parent if is_file else path
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())  # "." and "/" always do
    if not nearest.is_dir():
        hint = "choose another, or a results file with a name ending in .json" if nearest == path else "choose another"
        raise UsageError(f"--out {path}: {nearest} is a file, not a folder; {hint}")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"--out {path}: {nearest} cannot be written to; choose another folder")


def _heldout_data(references: list[str | None], data: str | None) -> Path:
    """The data folder of the task heldout, one for all models, found before any of them is loaded."""
    from lightlm.convert.loading import is_hub_id, locate
    from lightlm.evaluate.heldout import common_folder

    if data:
        return common_folder([], data)
    # A model of the Hub belongs to no run; it need not be downloaded to learn that.
    return common_folder(
        [reference if reference is not None and is_hub_id(reference) else locate(reference) for reference in references]
    )


def _evaluate_one(
    loaded: "LoadedModel", chosen: "Tasks", batch_size: str, out_path: Path | None, heldout_data: Path | None
) -> dict[str, Any]:
    """Run the tasks on one model and write its files; what the table and --json show of it."""
    from dataclasses import asdict

    from lightlm.evaluate import results
    from lightlm.evaluate.harness import LightLM
    from lightlm.evaluate.runner import run_tasks

    started = time.perf_counter()
    console.print(f"{loaded.name}: {', '.join(chosen.settings.tasks)}", markup=False)
    lm = LightLM(loaded, batch_size=batch_size)
    document = run_tasks(lm, chosen)
    counts = loaded.model.num_parameters()
    facts: dict[str, Any] = {
        "model": loaded.name,
        "path": str(loaded.path),
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "flops_per_token": loaded.model.flops_per_token(loaded.model.config.max_seq_len),
        **asdict(chosen.settings),
        "data": None if heldout_data is None else heldout_data.as_posix(),
        "device": str(lm.device),
        "dtype": document["config"]["model_args"]["dtype"],
        "batch_size": batch_size,
        "seconds": round(time.perf_counter() - started, 2),
    }
    path = results.result_file(loaded, chosen.settings, out_path)
    if path is not None:
        results.write(path, document, facts)
    console.print(
        f"{loaded.name}: {facts['seconds']:.0f} s" + (f", {path}" if path else ""), markup=False, soft_wrap=True
    )
    figures = [asdict(row) for row in results.rows(document)]
    return {**facts, "file": str(path) if path else None, "results": figures}

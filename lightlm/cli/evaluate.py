"""`lightlm eval`."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, print_json
from lightlm.cli.displays.evaluation import print_table
from lightlm.cli.prefetch import fetch_only
from lightlm.errors import UsageError
from lightlm.evaluate.compare.baselines import split_names

if TYPE_CHECKING:
    from lightlm.checkpoint import LoadedModel
    from lightlm.evaluate.compare.comparison import Answers
    from lightlm.evaluate.runner import Tasks

_UNKEPT = "{} belongs to no run, so its results and samples are kept in no file; --out DIR keeps them"


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL ...]", help="Runs, checkpoints, model folders or Hub ids; the newest run unless given."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(metavar="T1,T2", help="lm-eval's tasks, groups or globs, and heldout (bits per byte, cloze).")
    ] = "heldout",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task, for a quick look.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; each task's own unless given.")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Sequences in a batch.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16 (auto, where it is fast), float32 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Data folder of heldout; the one the run was trained on unless given."),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder with lm-eval tasks of your own, beside the stock ones.")
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A folder with data sets, laid out like the Hub: DIR/Rowan/hellaswag/..."),
    ] = None,
    bos: Annotated[
        str,
        typer.Option(
            metavar="auto|yes|no",
            help="A beginning-of-text token before every prompt: auto does as an imported model's tokenizer does.",
        ),
    ] = "auto",
    prefetch: Annotated[
        str | None,
        typer.Option(metavar="T1,T2", help="Only fetch what these tasks need, into the Hub's cache or --data-dir."),
    ] = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Results file, or a folder; <run>/eval/ unless given.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="B1,B2", help="Published figures beside them (gpt2, mobilellm-125m, ...); or further models."
        ),
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write lm-eval's samples: prompts and answers of each document.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON document.")] = False,
) -> None:
    """Score models with lm-evaluation-harness: checkpoint -> scores.

    Stock tasks run unchanged; results are lm-eval's own JSON. To work offline, --prefetch their data once: it is then
    read from the Hub's cache under HF_HUB_OFFLINE=1, or with --data-dir from a folder.
    """
    if prefetch is not None:
        fetch_only(context, prefetch, include_path, data_dir, as_json)
        return
    baselines, further = split_names(compare or "")
    references: list[str | None] = [*models, *further] if models else [None, *further]
    if out_path is not None:
        _check_out(out_path, len(references))
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is first imported
    with console.status("Reading lm-eval's list of tasks ...") as status:
        from lightlm.convert.load import load_pretrained, locate
        from lightlm.device import pick_device
        from lightlm.evaluate.compare.comparison import compare_all
        from lightlm.evaluate.harness import batch_limits, evaluation_dtype
        from lightlm.evaluate.runner import Settings, Tasks
        from lightlm.evaluate.tasks.heldout import common_folder

        target = pick_device(device)
        precision = evaluation_dtype(dtype, target)
        batch_limits(batch_size, target)
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        chosen = Tasks(Settings(names, limit, num_fewshot, data, include_path, data_dir, bos, dtype))
        status.update("Reading the tasks' data ...")
        chosen.require_data()
    located = _located(references)
    heldout_data = common_folder([] if data else located, data) if chosen.read_data else None
    for model in located:
        locate(model)  # downloads those of the Hub, so that one which is not there is known before any is scored
    reports, answers = [], []
    for model, name in zip(located, _names(located), strict=True):
        loaded = load_pretrained(model, target, precision)
        report, figures = _evaluate_one(loaded, name, chosen, batch_size, out_path, heldout_data, log_samples)
        reports.append(report)
        answers.append(figures)
    comparisons = compare_all(answers)
    if as_json:
        document = {"models": reports, "comparisons": [comparison.to_dict() for comparison in comparisons]}
        print_json(document | {"baselines": [baseline.to_dict(answers[0], limit) for baseline in baselines]})
    else:
        print_table(reports, answers, comparisons, baselines)


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


def _located(references: list[str | None]) -> list[str | Path]:
    """The folder of each model, or its id on the Hub, from where none is fetched yet."""
    from lightlm.convert.load import is_hub_id, locate

    return [
        reference if reference is not None and is_hub_id(reference) else locate(reference) for reference in references
    ]


def _names(models: list[str | Path]) -> list[str]:
    """What models are called in tables and files: two that would bear one name by their paths."""
    from lightlm.checkpoint import model_name

    paths = [Path(model) for model in models]
    places: dict[str, set[Path]] = {}
    for path in paths:
        places.setdefault(model_name(path), set()).add(path.resolve())
    return [path.as_posix() if len(places[model_name(path)]) > 1 else model_name(path) for path in paths]


def _evaluate_one(
    loaded: "LoadedModel",
    name: str,
    chosen: "Tasks",
    batch_size: str,
    out_path: Path | None,
    heldout_data: Path | None,
    log_samples: bool,
) -> tuple[dict[str, Any], list["Answers"]]:
    """Run the tasks on one model and write its files; what the table and --json show of it."""
    from dataclasses import asdict

    from rich.markup import escape

    from lightlm.evaluate.compare.comparison import answers_of
    from lightlm.evaluate.harness import LightLM
    from lightlm.evaluate.results import documents, samples
    from lightlm.evaluate.results import store as results
    from lightlm.evaluate.results.provenance import describe_bos, provenance
    from lightlm.evaluate.runner import BOS, run_tasks

    started = time.perf_counter()
    console.print(f"{name}: {', '.join(chosen.settings.tasks)}", markup=False)
    path = results.result_file(loaded, chosen.settings, out_path, name)
    if path is None:
        console.print(f"[yellow]Note:[/] {escape(_UNKEPT.format(name))}", soft_wrap=True)
    lm = LightLM(loaded, batch_size=batch_size, add_bos_token=BOS[chosen.settings.bos])
    document = run_tasks(lm, chosen, log_samples=True)
    for note in chosen.take_notes():
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
    logged = document.pop("samples")
    scored = documents.of_samples(logged)
    counts = loaded.model.num_parameters()
    facts: dict[str, Any] = {
        "model": name,
        "path": str(loaded.path),
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "flops_per_token": loaded.model.flops_per_token(loaded.model.config.max_seq_len),
        **asdict(chosen.settings),
        "bos": describe_bos(lm, chosen.settings.bos),
        "data": None if heldout_data is None else heldout_data.as_posix(),
        "device": str(lm.device),
        "dtype": document["config"]["model_args"]["dtype"],
        "batch_size": batch_size,
        "seconds": round(time.perf_counter() - started, 2),
    }
    if path is not None:
        results.write(path, document, facts | provenance(lm, chosen))
        documents.write(documents.documents_file(path), scored)
        if log_samples:
            samples.write(path, logged)
    console.print(f"{name}: {facts['seconds']:.0f} s" + (f", {path}" if path else ""), markup=False, soft_wrap=True)
    figures = [asdict(row) for row in results.rows(document)]
    report = {**facts, "file": str(path) if path else None, "results": figures}
    return report, answers_of(name, document, scored, facts)

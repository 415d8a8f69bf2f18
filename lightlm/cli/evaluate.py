"""`lightlm eval`."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightlm.cli.console import console, print_json
from lightlm.cli.displays.evaluation import print_scores
from lightlm.cli.generate.model import DeviceOption, WeightsOption
from lightlm.cli.prefetch import fetch_only
from lightlm.errors import LightLMError, UsageError
from lightlm.evaluate.settings import Settings, batch_sequences, split_list
from lightlm.train.signals import interrupted_by_signals

if TYPE_CHECKING:
    import torch

    from lightlm.checkpoint import LoadedModel
    from lightlm.evaluate.compare.baselines import Baseline
    from lightlm.evaluate.runner import Evaluation
    from lightlm.evaluate.tasks.manager import Tasks


@interrupted_by_signals()
def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Runs, checkpoints, model folders or Hub ids; default is the newest run."),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="T1,T2",
            help="lm-eval's tasks, groups or globs; ours: heldout (bits per byte, cloze), open_slm, small_lm.",
        ),
    ] = "heldout",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task, for a quick look.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; default is each task's own.")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Sequences per batch.")] = "auto",
    weights: WeightsOption = None,
    dtype: Annotated[
        str, typer.Option(help="Precision: auto (bfloat16 where it is fast), bfloat16, float32 or float16.")
    ] = "auto",
    device: DeviceOption = "auto",
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Data folder of heldout; default is the one the run was trained on."),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder with your own lm-eval tasks, beside the stock ones.")
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A folder with data sets, laid out like the Hub: DIR/Rowan/hellaswag/..."),
    ] = None,
    bos: Annotated[
        str,
        typer.Option(
            metavar="auto|yes|no",
            help="Beginning-of-text token before every prompt: auto follows an imported model's tokenizer.",
        ),
    ] = "auto",
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Write prompts as conversations, with the model's template.")
    ] = False,
    system_instruction: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text before each prompt; with a chat template, the system message."),
    ] = None,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
            help="Write few-shot examples as earlier turns (the default with a template), or into the question.",
            show_default=False,
        ),
    ] = None,
    prefetch: Annotated[
        str | None,
        typer.Option(metavar="T1,T2", help="Only fetch the data of these tasks, into the Hub's cache or --data-dir."),
    ] = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Results file or folder; default is <run>/eval/.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist at --out.")] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="B1,B2", help="Compare with published figures (gpt2, mobilellm-125m, ...) or further models."
        ),
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write lm-eval's samples: each document's prompts and answers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON document.")] = False,
) -> None:
    """Score models with lm-evaluation-harness: checkpoint -> scores.

    Stock tasks run unchanged; results are lm-eval's own JSON. To work offline, --prefetch the data once. Then set
    HF_HUB_OFFLINE=1 to read it from the Hub's cache, or give --data-dir to read it from a folder.
    """
    if prefetch is not None:
        fetch_only(context, prefetch, include_path, data_dir, as_json)
        return
    from lightlm.convert.load import locate
    from lightlm.evaluate.compare.baselines import split_names

    baselines, further = split_names(compare or "", _note)
    references: list[str | None] = [*models, *further] if models else [None, *further]
    if out_path is not None:
        _check_out(out_path, len(references))
    settings = Settings(
        split_list(tasks),
        limit,
        num_fewshot,
        data,
        include_path,
        data_dir,
        bos,
        dtype,
        weights,
        apply_chat_template,
        system_instruction,
        fewshot_as_multiturn,
    )
    batch_sequences(batch_size)
    located = _find_models(references, settings, device)
    # All that needs neither torch nor lm-eval is checked by now: importing them takes seconds.
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is first imported
    chosen, target, precision = _open_tasks(settings, device)
    if (folder := chosen.find_data([] if data else located, data)) is not None:  # reports different folders
        _note_data(located, folder, data)
    for model in located:
        if not isinstance(model, Path):  # a run that trains may have deleted its checkpoint meanwhile
            locate(model)  # downloads Hub models now, so that a missing one is reported before any model is scored
    names = _names(located)
    if out_path is not None and not overwrite:
        _check_free(out_path, chosen.settings, names)
    scoring = _Scoring(chosen, folder, target, precision, out_path, batch_size, log_samples)
    scores = _score_all(scoring, references, located, names)
    _report(scores, baselines, limit, as_json)


def _find_models(references: list[str | None], settings: Settings, device: str) -> list[str | Path]:
    """Check what needs neither torch nor lm-eval, and return the models' paths; those on the Hub keep their names."""
    from lightlm import choices
    from lightlm.convert.formats import require_average
    from lightlm.convert.load import is_hub_id, locate
    from lightlm.evaluate.tasks import references as named

    choices.check_device(device)
    choices.check_dtype(settings.dtype)
    choices.check_weights(settings.chosen_weights)
    named.check(settings)
    located = [name if name is not None and is_hub_id(name) else locate(name) for name in references]
    for found in located if settings.chosen_weights is not None else ():
        if isinstance(found, Path):
            require_average(found)
    return located


def _open_tasks(settings: Settings, device: str) -> "tuple[Tasks, torch.device, torch.dtype]":
    """Return the tasks, whose data can be read, and the device and precision to score on."""
    with console.status("Reading lm-eval's list of tasks ...") as status:
        from lightlm.cpu import FEW_SLICES, use_threads
        from lightlm.device import pick_device, pick_dtype
        from lightlm.evaluate.tasks.manager import Tasks

        target = pick_device(device)
        if target.type == "cpu":
            use_threads("auto", _note, slices=FEW_SLICES)
        chosen = Tasks(settings, _note)
        precision = pick_dtype(chosen.dtype, target, note=lambda slow: _note(f"--dtype {slow}"))
        status.update("Reading the tasks' data ...")
        chosen.require_data()
    return chosen, target, precision


@dataclass(frozen=True)
class _Scoring:
    """How each model is loaded and scored, and where its results go.

    Args:
        data: the data folder of heldout; None if no task reads one.
        out: the value of --out.
    """

    tasks: "Tasks"
    data: Path | None
    device: "torch.device"
    dtype: "torch.dtype"
    out: Path | None
    batch_size: str
    log_samples: bool

    def load(self, reference: str | None) -> "LoadedModel":
        """Load a model."""
        from lightlm.convert.load import load_pretrained

        return load_pretrained(reference, self.device, self.dtype, self.tasks.settings.chosen_weights)

    def score(self, loaded: "LoadedModel", name: str) -> "Evaluation":
        """Score a model and store the results.

        Raises:
            LightLMError: its run cannot be written to, or no task could be scored.
        """
        from lightlm.evaluate.results.store import result_file
        from lightlm.evaluate.runner import evaluate_model

        console.print(f"{name}: {', '.join(self.tasks.settings.tasks)}", markup=False)
        place = partial(result_file, loaded, out=self.out, name=name)
        if (file := place(self.tasks.settings)) is None:
            _note(f"{name} does not belong to a run, so its results are not stored; give --out DIR to store them")
        elif self.out is None and (fault := _unwritable(file.parent)):
            raise UsageError(f"the results of {name} belong in {file.parent}, but {fault}; give --out DIR")
        return evaluate_model(
            loaded, self.tasks, name, place, data=self.data, batch_size=self.batch_size, log_samples=self.log_samples
        )


@dataclass(frozen=True)
class _Scores:
    """What has been scored, what went wrong, and whether an interruption ended it early."""

    evaluations: "list[Evaluation]"
    problems: list[str]
    interrupted: bool


def _score_all(scoring: _Scoring, references: list[str | None], located: list[str | Path], names: list[str]) -> _Scores:
    """Score models one after the other; of several, one that fails does not stop the others."""
    from lightlm.runs import run_of

    evaluations: list[Evaluation] = []
    problems: list[str] = []
    for reference, model, name in zip(references, located, names, strict=True):
        try:
            loaded = scoring.load(reference)
            if run_of(loaded.path) is not None and loaded.path.resolve() != Path(model).resolve():
                name = loaded.name  # the run has saved another checkpoint meanwhile
            done = scoring.score(loaded, name)
        except LightLMError as error:
            if len(located) == 1:
                raise
            problems.append(f"{name}: {error}")
            continue
        except KeyboardInterrupt:
            return _Scores(evaluations, problems, interrupted=True)
        stored = f", {done.file}" if done.file else ""
        console.print(f"{name}: {done.facts['seconds']:.0f} s{stored}", markup=False, soft_wrap=True)
        evaluations.append(done)
        problems += [f"{name}: {problem}" if len(located) > 1 else problem for problem in done.problems]
        if done.interruption is not None:
            return _Scores(evaluations, problems, interrupted=True)
    return _Scores(evaluations, problems, interrupted=False)


def _report(scores: _Scores, baselines: "list[Baseline]", limit: int | None, as_json: bool) -> None:
    """Print the scores and draw the runs' reports; fail if a model failed, and exit with 130 after an interruption."""
    if scores.interrupted:
        finished = any(done.answers for done in scores.evaluations)
        _note("interrupted; " + ("the scores are those of the finished tasks" if finished else "no task was finished"))
    if scores.evaluations:
        _print(scores.evaluations, baselines, limit, as_json)
    if not scores.interrupted:
        _refresh_reports(scores.evaluations)
    if scores.problems:
        raise LightLMError("\n".join(scores.problems))
    if scores.interrupted:
        raise typer.Exit(130)


def _print(evaluations: "list[Evaluation]", baselines: "list[Baseline]", limit: int | None, as_json: bool) -> None:
    """Print the scores and comparisons, as a table or as one JSON document."""
    from lightlm.evaluate.compare.comparison import compare_all
    from lightlm.evaluate.compare.table import Score, score_lines, score_table

    answers = [done.answers for done in evaluations]
    comparisons = compare_all(answers)
    if as_json:
        document = {
            "models": [done.to_dict() for done in evaluations],
            "comparisons": [comparison.to_dict() for comparison in comparisons],
            "baselines": [baseline.to_dict(answers[0], limit) for baseline in baselines],
        }
        print_json(document)
        return
    facts = [done.facts for done in evaluations]
    lines = score_lines([[Score(None, limit, answer) for answer in model] for model in answers])
    print_scores(score_table(lines, [fact["model"] for fact in facts], comparisons, baselines), facts)


def _refresh_reports(evaluations: "list[Evaluation]") -> None:
    """Show the scores in the pages of their runs. They are stored already, so a failure is only a note."""
    from lightlm.runs import run_of

    runs = (run_of(Path(done.facts["path"])) for done in evaluations if done.file is not None)
    for run in dict.fromkeys(filter(None, runs)):
        try:
            with console.status("Drawing the report ..."):
                from lightlm.report.build import refresh_report

                page = refresh_report(run)
        except Exception as error:
            _note(f"{run}: the report does not show the scores yet ({error}); try `lightlm report {run}`")
            continue
        if page is not None:
            console.print(f"Scores are in {page}", markup=False, soft_wrap=True)


def _note_data(models: "Sequence[str | Path | None]", folder: Path, data: str | None) -> None:
    """Name the models that are scored on the data of another one's run."""
    from lightlm.evaluate.tasks.heldout import NoRunError, dataset_of

    for model in models if data is None else ():
        try:
            dataset_of(model)
        except NoRunError:
            _note(f"{model} belongs to no run, so heldout uses the data of the others: {folder}")


def _note(message: str) -> None:
    from rich.markup import escape

    console.print(f"[yellow]Note:[/] {escape(message)}", soft_wrap=True)


def _check_out(path: Path, models: int) -> None:
    """Refuse an --out that cannot be written, before hours of evaluation."""
    is_file = path.suffix == ".json"
    if is_file and models > 1:
        raise UsageError(f"--out {path} is one file for {models} models; give a folder")
    if is_file and path.is_dir():
        raise UsageError(f"--out {path} is a folder, and a name ending in .json means a file; choose another name")
    if fault := _unwritable(path.parent if is_file else path):
        raise UsageError(f"--out {path}: {fault}; choose another folder, or a file ending in .json")


def _check_free(out: Path, settings: Settings, names: list[str]) -> None:
    """Refuse to replace results that exist at --out."""
    from lightlm.evaluate.results.store import out_file

    for name in names:
        if (existing := out_file(out, settings, name)).exists():
            raise UsageError(
                f"{existing} exists already; choose another path with --out, or replace it with --overwrite"
            )


def _unwritable(folder: Path) -> str:
    """Return why no file can be written to a folder, which need not exist; empty if one can."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())  # "." and "/" always do
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return ""
    return f"{nearest} {'does not permit writing' if nearest.is_dir() else 'is a file, not a folder'}"


def _names(models: list[str | Path]) -> list[str]:
    """Return the models' names in tables and files; models with equal names get their paths."""
    from lightlm.checkpoint import model_name

    paths = [Path(model) for model in models]
    places = {(model_name(path), path.resolve()) for path in paths}
    counts = Counter(name for name, _ in places)
    return [path.as_posix() if counts[model_name(path)] > 1 else model_name(path) for path in paths]

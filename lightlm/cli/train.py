"""`lightlm train`."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, out, print_json
from lightlm.cli.launch import launch, report_once
from lightlm.errors import UsageError

if TYPE_CHECKING:
    from lightlm.cli.displays.training import TrainingDisplay
    from lightlm.recipe import Recipe
    from lightlm.train.distributed import World
    from lightlm.train.trainer import Result, Trainer

NEWEST = "runs/latest"  # the value of a bare --resume


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one (lightlm recipes ls)."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=value",
            help="Overrides, such as optimizer.lr=1e-3. `lightlm recipes keys` lists all keys.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Run folder under runs/; the recipe's name unless given.")] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="[RUN]", help="Resume this run, or the newest one.")
    ] = None,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Resume runs/NAME if it exists, else start it.")
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine: one per GPU, or CPU processes.")] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts of all processes from the last checkpoint after one dies.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and data, print the plan, train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Train a model from a recipe: shards -> checkpoints under runs/.

    Jobs that a cluster or torchrun may start again: give --name and --auto-resume to resume their run.
    """
    changes = list(overrides or [])
    if recipe is not None and "=" in recipe:
        changes, recipe = [recipe, *changes], None
    for argument, given in (("RECIPE", recipe), ("--name", name), ("--auto-resume", auto_resume)):
        if resume is not None and given:
            raise UsageError(
                f"--resume uses the name and recipe of its run; leave {argument} out, and give changes as key=value"
            )
    if resume is None and recipe is None:
        raise UsageError("name a recipe, for example `lightlm train recipes/demo.yaml`, or --resume a run")

    request = _Request(recipe, changes, name, resume, auto_resume, dry_run, as_json)
    if nproc > 1 or max_restarts:
        if "WORLD_SIZE" in os.environ:
            raise UsageError("--nproc and --max-restarts start processes, which torchrun did already; leave them out")
        first = request.with_fixed_run() if max_restarts else request
        again = first if resume is not None else replace(first, auto_resume=True)
        raise typer.Exit(launch(first.arguments(), again.arguments(), nproc, max_restarts))

    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is first imported

    from lightlm.train.distributed import join_world

    with join_world() as world, report_once(world), world.watched():
        interrupted = _train(world, request)
    if interrupted:
        raise typer.Exit(130)


@dataclass(frozen=True)
class _Request:
    """What the command line asks of each process."""

    recipe: str | None
    changes: list[str]
    name: str | None
    resume: str | None
    auto_resume: bool
    dry_run: bool
    as_json: bool

    def arguments(self) -> list[str]:
        """Return the command line of this request."""
        options = {"--name": self.name, "--resume": self.resume}
        flags = {"--auto-resume": self.auto_resume, "--dry-run": self.dry_run, "--json": self.as_json}
        return [
            *("train", *([self.recipe] if self.recipe else []), *self.changes),
            *(f"{option}={value}" for option, value in options.items() if value is not None),
            *(flag for flag, given in flags.items() if given),
        ]

    def with_fixed_run(self) -> "_Request":
        """Return a request that names its run, so that a restart finds the run of the first attempt."""
        from lightlm.recipe import load_recipe
        from lightlm.runs import find_run, free_folder

        if self.resume == NEWEST:
            return replace(self, resume=str(find_run()))
        if self.recipe is None or self.auto_resume:
            return self
        name = self.name or load_recipe(self.recipe, self.changes).name
        return replace(self, name=free_folder(name, exact=self.name is not None).name)


def _train(world: "World", request: _Request) -> bool:
    """Train in one process; return whether it was interrupted."""
    from lightlm.cli.displays.preparation import validation_note
    from lightlm.cli.displays.training import TrainingDisplay
    from lightlm.convert.huggingface.layouts import export_target
    from lightlm.runs import new_run
    from lightlm.train.observe.observers import Observers
    from lightlm.train.observe.trackers import Trackers
    from lightlm.train.setup import open_data, set_up
    from lightlm.train.trainer import Trainer

    display = TrainingDisplay()
    parsed, run, checkpoint = world.from_writer(lambda: _choose(request, display))
    if refusal := export_target(parsed.model).refusal:
        display.note(f"this recipe's model cannot be exported to Hugging Face: {refusal}")
    trackers = Trackers(parsed.tracking, display.note)
    data = open_data(parsed, required=not request.dry_run or checkpoint is not None)
    setup = set_up(parsed, data, display.note, world, checkpoint)
    if data is not None and (small := validation_note(data.manifest)):
        display.note(small)
    evaluator = None
    if data is not None and parsed.eval.tasks:
        with console.status("Reading lm-eval's list of tasks ..."):
            from lightlm.evaluate.in_training.task_scores import TaskScores

            evaluator = TaskScores(setup.recipe.eval, data, world, display.note)
    if request.dry_run:
        planned = run or Path("runs") / (request.name or parsed.name)
        _print_plan({"name": parsed.name, "run": str(planned), **setup.facts()}, request.as_json)
        return False
    # The run folder appears once recipe and data are known to fit.
    exact = request.name is not None or request.auto_resume
    run = world.from_writer(lambda: run or new_run(request.name or parsed.name, exact=exact))
    trainer = Trainer(setup, run, Observers(display, trackers), evaluator=evaluator)
    if trainer.done:
        display.note(f"{run} is complete; raise train.tokens to train it further")
    with display, trackers:
        result = trainer.train()
    if world.is_writer:
        _report(result, trainer, _draw_report(trainer, display), request.as_json)
    return result.interrupted


def _choose(request: _Request, display: "TrainingDisplay") -> "tuple[Recipe, Path | None, Path | None]":
    """Return the recipe, the run to resume and the checkpoint to start from; None for a new run."""
    from lightlm.recipe import load_recipe
    from lightlm.runs import RECIPE, run_folder
    from lightlm.train.checkpointing.resume import reopen_run

    if request.resume is not None:
        return reopen_run(None if request.resume == NEWEST else request.resume, request.changes, display.note)
    assert request.recipe is not None
    if request.auto_resume:
        run = run_folder(request.name or load_recipe(request.recipe, request.changes).name)
        if (run / RECIPE).is_file():
            display.note(f"{run} exists and is resumed with its own recipe, not {request.recipe}")
            return reopen_run(run, request.changes, display.note)
    elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UsageError("torchrun restarted this command, which would start another run; add --name and --auto-resume")
    return load_recipe(request.recipe, request.changes), None, None


def _print_plan(facts: dict[str, Any], as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if as_json:
        print_json(facts)
        return
    table = Table(title=f"Run {facts['name']}", show_header=False)
    for key, value in facts.items():
        if value is not None and (key != "active_parameters" or value != facts["parameters"]):
            table.add_row(key.replace("_", " "), Text(_in_words(value)))
    out.print(table)


def _in_words(value: Any) -> str:
    match value:
        case bool():  # an int too
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.3g}"
    return str(value)


def _draw_report(trainer: "Trainer", display: "TrainingDisplay") -> Path | None:
    """Write the run's page and plots and return the page. The run is saved already, so a failure is only a note."""
    try:
        from lightlm.machine import record_machine
        from lightlm.report.build import write_report

        record_machine(trainer.run_folder, trainer.setup.device, trainer.facts())
        return write_report([trainer.run_folder]).page
    except Exception as error:
        display.note(f"no plots were made ({error}); try `lightlm report {trainer.run_folder}`")
        return None


def _report(result: "Result", trainer: "Trainer", page: Path | None, as_json: bool) -> None:
    unigram = trainer.data.manifest.unigram
    unigram_entropy = unigram.nats_per_token if unigram else None
    if as_json:
        print_json(vars(result) | {"unigram_entropy": unigram_entropy, "report": page})
        return
    lines = [f"Run {result.run}: step {result.step:,}, {result.tokens:,} tokens, {result.seconds:.0f} s"]
    if result.val_loss is not None:
        lines.append(f"Validation loss {result.val_loss:.4f} nats per token, {result.val_bpb:.4f} bits per byte")
        if unigram_entropy is not None:
            lines.append(f"Unigram entropy of the corpus {unigram_entropy:.4f} nats per token")
    if page is not None:
        lines.append(f"Plots and page: {page}")
    if not result.interrupted:
        prompt = (trainer.recipe.eval.prompts or ["Hello"])[0]
        lines.append(f'Next: lightlm eval --tasks heldout; lightlm generate "{prompt}"; lightlm convert')
    out.print("\n".join(lines), soft_wrap=True, markup=False)
    if result.interrupted:
        how = f"Interrupted; step {result.step} is saved. Resume with: lightlm train --resume {result.run}"
        console.print(how, soft_wrap=True, markup=False)

"""`lightlm train`."""

import os
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
            metavar="[key=value ...]",
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

    if nproc > 1 or max_restarts:
        if "WORLD_SIZE" in os.environ:
            raise UsageError("--nproc and --max-restarts start processes, which torchrun did already; leave them out")
        if max_restarts:
            name, resume = _fix_run(recipe, changes, name, resume, auto_resume)
        command = ["train", *([recipe] if recipe else []), *changes]
        command += [f"{key}={value}" for key, value in (("--name", name), ("--resume", resume)) if value is not None]
        flags = {"--auto-resume": auto_resume, "--dry-run": dry_run, "--json": as_json}
        command += [flag for flag, given in flags.items() if given]
        restart = command if resume is not None or auto_resume else [*command, "--auto-resume"]
        raise typer.Exit(launch(command, restart, nproc, max_restarts))

    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is first imported

    from lightlm.train.distributed import join_world

    with join_world() as world, report_once(world), world.watched():
        interrupted = _train(world, recipe, changes, name, resume, auto_resume, dry_run, as_json)
    if interrupted:
        raise typer.Exit(130)


def _fix_run(
    recipe: str | None, changes: list[str], name: str | None, resume: str | None, auto_resume: bool
) -> tuple[str | None, str | None]:
    """Return the values of --name and --resume with which a restart finds the run of the first attempt."""
    from lightlm.recipe import load_recipe
    from lightlm.runs import find_run, free_folder

    if resume == NEWEST:
        resume = str(find_run())
    if recipe is not None and not auto_resume:
        name = free_folder(name or load_recipe(recipe, changes).name, exact=name is not None).name
    return name, resume


def _train(
    world: "World",
    reference: str | None,
    changes: list[str],
    name: str | None,
    resume: str | None,
    auto_resume: bool,
    dry_run: bool,
    as_json: bool,
) -> bool:
    """Do the work of one process; return whether it was interrupted."""
    from lightlm.cli.displays.training import TrainingDisplay
    from lightlm.convert.huggingface.export_target import export_target
    from lightlm.runs import new_run
    from lightlm.train.observe.observers import Observers
    from lightlm.train.observe.trackers import Trackers
    from lightlm.train.setup import open_data, set_up
    from lightlm.train.trainer import Trainer

    display = TrainingDisplay()
    parsed, run, checkpoint = world.from_writer(lambda: _choose(reference, changes, name, resume, auto_resume, display))
    if refusal := export_target(parsed.model).refusal:
        display.note(f"this recipe's model cannot be exported to Hugging Face: {refusal}")
    trackers = Trackers(parsed.tracking, display.note)
    data = open_data(parsed, required=not dry_run or checkpoint is not None)
    setup = set_up(parsed, data, display.note, world, checkpoint)
    evaluator = None
    if data is not None and parsed.eval.tasks:
        with console.status("Reading lm-eval's list of tasks ..."):
            from lightlm.evaluate.in_training.task_scores import TaskScores

            evaluator = TaskScores(setup.recipe.eval, data, world, display.note)
    if dry_run:
        planned = run or Path("runs") / (name or parsed.name)
        _print_plan({"name": parsed.name, "run": str(planned), **setup.facts()}, as_json)
        return False
    # The run folder appears once recipe and data are known to fit.
    exact = name is not None or auto_resume
    run = world.from_writer(lambda: run or new_run(name or parsed.name, exact=exact))
    trainer = Trainer(setup, run, Observers(display, trackers), evaluator=evaluator)
    if trainer.done:
        display.note(f"{run} is complete; raise train.tokens to train it further")
    with display, trackers:
        result = trainer.train()
    if world.is_writer:
        unigram = trainer.data.manifest.unigram
        page = _draw_report(trainer, display)
        _report(result, parsed, unigram.nats_per_token if unigram else None, page, as_json)
    return result.interrupted


def _choose(
    reference: str | None,
    changes: list[str],
    name: str | None,
    resume: str | None,
    auto_resume: bool,
    display: "TrainingDisplay",
) -> "tuple[Recipe, Path | None, Path | None]":
    """Return the recipe, the run to resume and the checkpoint to start from; None for a new run."""
    from lightlm.recipe import load_recipe
    from lightlm.runs import RECIPE, run_folder
    from lightlm.train.checkpointing.resume import reopen_run

    if resume is not None:
        return reopen_run(None if resume == NEWEST else resume, changes, display.note)
    assert reference is not None
    if auto_resume:
        run = run_folder(name or load_recipe(reference, changes).name)
        if (run / RECIPE).is_file():
            display.note(f"{run} exists and is resumed with its own recipe, not {reference}")
            return reopen_run(run, changes, display.note)
    elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UsageError("torchrun restarted this command, which would start another run; add --name and --auto-resume")
    return load_recipe(reference, changes), None, None


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


def _draw_report(trainer: "Trainer", display: "TrainingDisplay") -> "Path | None":
    """Write the run's page and plots and return the page. The run is saved already, so a failure is only a note."""
    try:
        from lightlm.machine import record_machine
        from lightlm.report.build import write_report

        record_machine(trainer.run_folder, trainer.setup.device, trainer.facts())
        return write_report([trainer.run_folder]).page
    except Exception as error:
        display.note(f"no plots were made ({error}); try `lightlm report {trainer.run_folder}`")
        return None


def _report(
    result: "Result", recipe: "Recipe", unigram_entropy: float | None, page: "Path | None", as_json: bool
) -> None:
    if as_json:
        print_json(vars(result) | {"unigram_entropy": unigram_entropy, "report": page})
        return
    line = f"Run {result.run}: step {result.step:,}, {result.tokens:,} tokens, {result.seconds:.0f} s"
    out.print(line, soft_wrap=True, markup=False)
    if result.val_loss is not None:
        out.print(f"Validation loss {result.val_loss:.4f} nats per token, {result.val_bpb:.4f} bits per byte")
        if unigram_entropy is not None:
            out.print(f"Unigram entropy of the corpus {unigram_entropy:.4f} nats per token")
    if page is not None:
        out.print(f"Plots and page: {page}", soft_wrap=True, markup=False)
    if result.interrupted:
        console.print(
            f"Interrupted; step {result.step} is saved. Resume with: lightlm train --resume {result.run}",
            soft_wrap=True,
            markup=False,
        )
    else:
        prompt = recipe.eval.prompts[0] if recipe.eval.prompts else "Hello"
        out.print(
            f'Next: lightlm eval --tasks heldout; lightlm generate "{prompt}"; lightlm convert',
            soft_wrap=True,
            markup=False,
        )

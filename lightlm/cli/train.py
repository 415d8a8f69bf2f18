"""`lightlm train`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightlm.cli.console import console, out, print_json
from lightlm.cli.launch import LAUNCHED, launch, one_voice
from lightlm.errors import UsageError

if TYPE_CHECKING:
    from threading import Event

    from lightlm.cli.displays.training import TrainingDisplay
    from lightlm.recipe import Recipe
    from lightlm.train.distributed import World
    from lightlm.train.trainer import Result, Trainer

NEWEST = "runs/latest"  # what --resume without a value stands for


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
        str | None, typer.Option("--resume", metavar="[RUN]", help="Go on with this run, or with the newest.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine: one a GPU, or shares of the CPU.")] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Times to start all again from the last checkpoint when one dies.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and data, print the plan, train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Train a model as a recipe says: shards -> checkpoints under runs/."""
    changes = list(overrides or [])
    if recipe is not None and "=" in recipe:
        changes, recipe = [recipe, *changes], None
    if resume is not None and recipe is not None:
        raise UsageError("--resume uses the run's own recipe; leave RECIPE out, and give changes as key=value")
    if resume is not None and name is not None:
        raise UsageError("--name is for new runs; leave it out with --resume")
    if resume is None and recipe is None:
        raise UsageError("name a recipe, for example `lightlm train recipes/demo.yaml`, or --resume a run")

    if (nproc > 1 or max_restarts) and LAUNCHED not in os.environ:
        if "WORLD_SIZE" in os.environ:
            raise UsageError(
                "--nproc and --max-restarts start processes, and torchrun has started these; leave them out"
            )
        raise typer.Exit(launch(sys.argv[1:], nproc, max_restarts))

    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is first imported

    from lightlm.train.distributed import join_world

    with join_world() as world, one_voice(world), world.watched():
        interrupted = _train(world, recipe, changes, name, resume, dry_run, as_json)
    if interrupted:
        raise typer.Exit(130)


def _train(
    world: "World",
    reference: str | None,
    changes: list[str],
    name: str | None,
    resume: str | None,
    dry_run: bool,
    as_json: bool,
) -> bool:
    """One process's work; whether it was interrupted."""
    from lightlm.cli.displays.training import TrainingDisplay
    from lightlm.convert.huggingface.export_target import export_target
    from lightlm.generate.engine import sample_text
    from lightlm.train.observe.observers import Observers
    from lightlm.train.observe.trackers import Trackers
    from lightlm.train.runs import new_run
    from lightlm.train.trainer import Trainer

    display = TrainingDisplay()

    parsed, run, checkpoint = world.from_writer(lambda: _choose(world, reference, changes, resume, display))
    if refusal := export_target(parsed.model).refusal:
        display.note(f"this recipe's model cannot be exported to Hugging Face: {refusal}")

    def sampler(model: Any, prompt: str) -> str:
        return sample_text(model, trainer.data.tokenizer, prompt, parsed.eval.max_new_tokens, seed=parsed.train.seed)

    planned = run or Path("runs") / (name or parsed.name)
    trackers = Trackers(parsed.tracking, display.note)
    trainer = Trainer(parsed, planned, Observers(display, trackers), sampler, checkpoint, world)
    if parsed.eval.tasks:
        world.from_writer(lambda: _add_evaluator(trainer))  # alone, since it fetches what is not there yet
        if not world.is_writer:
            _add_evaluator(trainer)
    if dry_run:
        _print_plan(trainer.facts(), as_json)
        return False
    # Only now, with recipe and data known to be good, does a folder appear.
    trainer.run_folder = world.from_writer(
        lambda: run or new_run(name or parsed.name, exact=name is not None, launch=world.launch)
    )
    if trainer.done:
        display.note(f"{trainer.run_folder} is complete; raise train.tokens to train it further")
    with display, trackers:
        result = trainer.train()
    if world.is_writer:
        unigram = trainer.data.manifest.unigram
        page = _draw_report(trainer, display)
        _report(result, parsed, unigram.nats_per_token if unigram else None, page, as_json)
    return result.interrupted


def _choose(
    world: "World", reference: str | None, changes: list[str], resume: str | None, display: "TrainingDisplay"
) -> "tuple[Recipe, Path | None, Path | None]":
    """The recipe, the run to go on with, and the checkpoint to start from."""
    from lightlm.recipe import load_recipe
    from lightlm.train.runs import reopen_run, run_before_restart

    before = run_before_restart(world.launch)
    if before is not None and not (before / "recipe.yaml").exists():
        assert reference is not None  # a run that is resumed has its recipe
        return load_recipe(reference, changes), before, None
    if before is not None or resume is not None:
        chosen = str(before) if before else None if resume == NEWEST else resume
        return reopen_run(chosen, changes, display.note)
    assert reference is not None
    return load_recipe(reference, changes), None, None


def _add_evaluator(trainer: "Trainer") -> None:
    """What scores `eval.tasks` during training; its tasks are loaded now, so that a mistake shows at once."""
    with console.status("Reading lm-eval's list of tasks ..."):
        from lightlm.evaluate.in_training.task_scores import TaskScores

        scores = TaskScores(trainer.recipe.eval, trainer.data.path, trainer.world)

    def tell() -> None:
        for note in scores.take_notes():
            trainer.observer.note(note)

    def evaluator(model: Any, path: Path, stop: "Event") -> dict[str, float] | None:
        found = scores(model, trainer.data.tokenizer, path, stop)
        tell()
        return found

    tell()
    trainer.evaluator = evaluator


def _print_plan(facts: dict[str, Any], as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if as_json:
        print_json(facts)
        return
    table = Table(title=f"Run {facts['name']}", show_header=False)
    for key, value in facts.items():
        if key != "active_parameters" or value != facts["parameters"]:
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
    """The run's page and plots. Whatever goes wrong with them, the run itself is saved: a failure is a note."""
    try:
        from lightlm.report.build import write_report
        from lightlm.report.machine import record_machine

        record_machine(trainer.run_folder, trainer.facts())
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
        out.print(f"Validation loss {result.val_loss:.4f} nats a token, {result.val_bpb:.4f} bits a byte")
        if unigram_entropy is not None:
            out.print(f"Unigram entropy of the corpus {unigram_entropy:.4f} nats a token")
    if page is not None:
        out.print(f"Plots and page: {page}", soft_wrap=True, markup=False)
    if result.interrupted:
        console.print(
            f"Interrupted; step {result.step} is saved. Go on with: lightlm train --resume {result.run}",
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

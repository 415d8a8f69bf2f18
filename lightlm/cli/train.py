"""`lightlm train`."""

import contextlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightlm.cli.console import console
from lightlm.cli.launch import launch, report_once
from lightlm.errors import LightLMError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightlm.cli.displays.training import TrainingDisplay
    from lightlm.data.training_data import TrainingData
    from lightlm.recipe import Recipe
    from lightlm.train.distributed import World

NEWEST = "runs/latest"  # the value of a bare --resume


def is_override(argument: str) -> bool:
    """Return whether an argument is `key=value`: it has a "=", and no file or folder here is called so."""
    return "=" in argument and not os.path.exists(argument)  # pathlib raises an error for a long text


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
    name: Annotated[str | None, typer.Option(help="Run folder under runs/. [dim]Default: the recipe's name[/]")] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="[RUN]", help="Resume this run, or the newest one.")
    ] = None,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Resume runs/NAME if it exists, else start it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete runs/NAME if it exists, after checking recipe and data.")
    ] = False,
    runs_dir: Annotated[
        Path, typer.Option("--runs-dir", metavar="DIR", help="Where the run's folder is made; only runs/ has `latest`.")
    ] = Path("runs"),
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine: one per GPU, or CPU processes.")] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts of all processes from the last checkpoint after one dies.")
    ] = 0,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            help="Time a few steps, and train a new run on fewer tokens if it would take more than M minutes.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and data, print the plan, train nothing.")
    ] = False,
    with_report: Annotated[
        bool, typer.Option("--report/--no-report", help="Draw the run's page and plots at the end.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Train a model from a recipe: shards -> checkpoints under runs/.

    Jobs that a cluster or torchrun may start again: give --name and --auto-resume to resume their run.
    """
    changes = list(overrides or [])
    if resume is not None and recipe is not None and is_override(recipe):
        changes, recipe = [recipe, *changes], None
    for argument, given in (("RECIPE", recipe), ("--name", name), ("--auto-resume", auto_resume)):
        if resume is not None and given:
            raise UsageError(
                f"--resume uses the name and recipe of its run; leave {argument} out, and give changes as key=value"
            )
    if overwrite and (resume is not None or auto_resume):
        raise UsageError("--overwrite deletes the run that --resume and --auto-resume continue; choose one of them")
    if resume is None and (recipe is None or is_override(recipe)):
        raise UsageError("name a recipe, for example `lightlm train recipes/demo.yaml`, or --resume a run")

    if max_minutes is not None:
        if not 0 < max_minutes < float("inf") or resume is not None:
            why = "a resumed run keeps its tokens" if resume is not None else "it must be a number above 0"
            raise UsageError(f"--max-minutes {max_minutes:g}: {why}")
        if nproc > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError("--max-minutes times the steps of one process; leave it out, and give train.tokens")

    places = _Request(recipe, changes, name, resume, auto_resume, overwrite, runs_dir)
    request = replace(places, dry_run=dry_run, as_json=as_json, max_minutes=max_minutes, with_report=with_report)
    if "WORLD_SIZE" not in os.environ:  # else each process would report the mistake
        _check(request)
    if nproc > 1 or max_restarts:
        if "WORLD_SIZE" in os.environ:
            raise UsageError("--nproc and --max-restarts start processes, which torchrun did already; leave them out")
        with request.with_fixed_run() if max_restarts else contextlib.nullcontext(request) as first:
            again = first if resume is not None else replace(first, auto_resume=True, overwrite=False)
            raise typer.Exit(launch(first.arguments(), again.arguments(), nproc, max_restarts))

    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is first imported

    from lightlm.train.distributed import join_world

    with join_world() as world, report_once(world), world.watched(), contextlib.ExitStack() as held:
        interrupted = _train(world, request, held)
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
    overwrite: bool
    runs_dir: Path
    dry_run: bool = False
    as_json: bool = False
    max_minutes: float | None = None
    with_report: bool = True
    began: float = field(default_factory=time.monotonic)  # what --max-minutes counts from

    @property
    def exact(self) -> bool:
        """Whether the user named the run; otherwise it gets the first free number."""
        return self.name is not None or self.auto_resume or self.overwrite

    def arguments(self) -> list[str]:
        """Return the command line of this request."""
        options: dict[str, object] = {"--name": self.name, "--resume": self.resume, "--runs-dir": self.runs_dir}
        options["--max-minutes"] = self.max_minutes
        flags = {"--auto-resume": self.auto_resume, "--overwrite": self.overwrite, "--dry-run": self.dry_run}
        flags |= {"--json": self.as_json, "--no-report": not self.with_report}
        return [
            *("train", *([self.recipe] if self.recipe else []), *self.changes),
            *(f"{option}={value}" for option, value in options.items() if value is not None),
            *(flag for flag, given in flags.items() if given),
        ]

    def check_run(self) -> None:
        """Refuse a run that is being trained, or a name that is taken, before anything heavy is imported."""
        from lightlm.runs import find_run, require_free, require_unlocked, run_folder

        if self.resume is not None:
            require_unlocked(find_run(None if self.resume == NEWEST else self.resume))
        elif self.name is not None and not self.auto_resume:
            require_free(run_folder(self.name, self.runs_dir), overwrite=self.overwrite)

    @contextlib.contextmanager
    def with_fixed_run(self) -> "Iterator[_Request]":
        """Context manager that gives a request that names its run, so that a restart finds that of the first attempt.

        The folder of a new run is created, and removed at the end if no run has begun in it.
        """
        from lightlm.recipe import recipe_name
        from lightlm.runs import claim_folder, discard_unstarted, find_run

        if self.resume == NEWEST:
            yield replace(self, resume=str(find_run()))
        elif self.recipe is None or self.auto_resume or self.name is not None:
            yield self
        else:
            name = recipe_name(self.recipe, self.changes)
            if self.overwrite:
                yield replace(self, name=name)
                return
            claimed = claim_folder(name, self.runs_dir)
            try:
                yield replace(self, name=claimed.name)
            finally:
                discard_unstarted(claimed)


def _check(request: _Request) -> None:
    """Find a missing recipe, run or data folder and a wrong setting before torch is imported, which takes seconds."""
    from lightlm.choices import check_device
    from lightlm.convert.load import find_start
    from lightlm.data.folder import check_data_of_run, check_prepared, prepared_beside
    from lightlm.data.training_data import folder_paths
    from lightlm.recipe import load_recipe, load_run_recipe, recipe_name
    from lightlm.runs import RECIPE, find_run, later_overrides, run_folder

    if not request.dry_run:
        request.check_run()
    run = None
    if request.resume is not None:
        run = find_run(None if request.resume == NEWEST else request.resume)
        parsed = load_run_recipe(run, request.changes, _silently)
    else:
        assert request.recipe is not None
        folder = run_folder(request.name or recipe_name(request.recipe, request.changes), request.runs_dir)
        if request.auto_resume and (folder / RECIPE).is_file():
            run, parsed = folder, load_run_recipe(folder, later_overrides(folder, request.changes), _silently)
        else:
            parsed = load_recipe(request.recipe, request.changes, _silently, find_start)
    check_device(parsed.train.device)
    if parsed.eval.tasks:
        from lightlm.evaluate.tasks import references

        references.check_names(parsed.eval.tasks)
    folders = folder_paths(parsed.data.sources).values()
    if run is not None:
        check_data_of_run(folders, run, parsed.data.key)
    elif not request.dry_run:
        prepared = prepared_beside(folders)
        tokenizer = parsed.train.init_from or (str(prepared / "tokenizer.json") if prepared else None)
        check_prepared(folders, tokenizer)


def _silently(note: str) -> None:
    """Drop a note that the process that trains prints."""


def _train(world: "World", request: _Request, held: contextlib.ExitStack) -> bool:
    """Train in one process; return whether it was interrupted. `held` keeps the lock of the run."""
    from lightlm.cli.displays.preparation import validation_note
    from lightlm.cli.displays.run import draw_report, print_plan, print_result
    from lightlm.cli.displays.training import TrainingDisplay
    from lightlm.convert.huggingface.layouts import export_target
    from lightlm.train.observe.observers import Observers
    from lightlm.train.observe.trackers import Trackers
    from lightlm.train.setup import open_data, set_up
    from lightlm.train.signals import stop_on_signals
    from lightlm.train.trainer import Trainer

    display = TrainingDisplay()
    parsed, run, checkpoint = world.from_writer(lambda: _choose(request, display, held))
    if refusal := export_target(parsed.model).refusal:
        display.note(f"this recipe's model cannot be exported to Hugging Face: {refusal}")
    trackers = Trackers(parsed.tracking, display.note)
    data = open_data(parsed, required=not request.dry_run or checkpoint is not None, resumed=run)
    if request.max_minutes is not None and run is None and data is not None:
        parsed = _shortened(parsed, data, request, request.max_minutes, display)
    setup = set_up(parsed, data, display.note, world, checkpoint)
    for name, folder in data.folders.items() if data is not None else ():
        if small := validation_note(folder.manifest):
            display.note(small if len(parsed.data.sources) == 1 else f"{name}: {small}")
    evaluator = None
    if data is not None and parsed.eval.tasks:
        with console.status("Reading lm-eval's list of tasks ..."):
            from lightlm.evaluate.in_training.task_scores import TaskScores

            assert setup.tokenizer is not None
            evaluator = TaskScores(setup.recipe.eval, data.main, setup.tokenizer, world, display.note)
    if request.dry_run:
        planned = run or request.runs_dir / (request.name or parsed.name)
        print_plan({"name": parsed.name, "run": str(planned), **setup.facts()}, request.as_json)
        return False
    # The run folder appears once recipe and data are known to fit.
    run = world.from_writer(lambda: run or _new_run(request, parsed.name, display, held))
    trainer = Trainer(setup, run, Observers(display, trackers), evaluator=evaluator)
    with display, stop_on_signals(launched=world.launched):  # a late signal does not end what follows the last save
        with trackers:
            result = trainer.train()
        if result.interrupted:
            how = f"Interrupted; step {result.step} is saved. Resume with: lightlm train --resume {result.run}"
            console.print(how, soft_wrap=True, markup=False)
        page = draw_report(trainer, display) if world.is_writer and request.with_report else None
    if world.is_writer:
        print_result(result, trainer, page, request.as_json)
    return result.interrupted


def _shortened(
    recipe: "Recipe", data: "TrainingData", request: _Request, minutes: float, display: "TrainingDisplay"
) -> "Recipe":
    """Return the recipe, with fewer tokens if this machine needs longer than the limit for them."""
    from lightlm.cli.displays.sweep import duration
    from lightlm.convert.load import find_start
    from lightlm.quantities import format_quantity
    from lightlm.recipe import load_recipe
    from lightlm.train.planning.probe import ProbeError
    from lightlm.train.planning.time_limit import fit_time

    try:
        with console.status("Timing a few steps ..."):
            fit = fit_time(recipe, data, minutes, request.began)
    except ProbeError as error:
        display.note(f"--max-minutes {minutes:g} has no effect: {error}")
        return recipe
    if recipe.eval.tasks:
        display.note(
            f"--max-minutes leaves out the time of eval.tasks ({', '.join(recipe.eval.tasks)}), which is added"
        )
    if fit.tokens >= recipe.train.tokens:
        return recipe
    single = fit.tokens <= recipe.train.batch_tokens and not recipe.schedule.warms_batch_up
    display.note(
        f"the start took {duration(fit.spent)} of --max-minutes {minutes:g}, and at {fit.tokens_per_second:,.0f} "
        f"tokens/s the {format_quantity(recipe.train.tokens)} tokens of this recipe take {duration(fit.seconds)} more; "
        f"training on {format_quantity(fit.tokens)} instead" + (", a single step; allow more minutes" if single else "")
    )
    assert request.recipe is not None
    return load_recipe(request.recipe, [*request.changes, f"train.tokens={fit.tokens}"], _silently, find_start)


def _choose(
    request: _Request, display: "TrainingDisplay", held: contextlib.ExitStack
) -> "tuple[Recipe, Path | None, Path | None]":
    """Return the recipe, the run to resume and the checkpoint to start from; None for a new run.

    A run to train is locked first, so that its checkpoints are read after another process has written its last one.
    """
    from lightlm.convert.load import find_start
    from lightlm.recipe import load_recipe, recipe_name
    from lightlm.runs import RECIPE, find_run, later_overrides, locked, record_later_overrides, run_folder
    from lightlm.train.checkpointing.resume import reopen_run

    run, changes = None, request.changes
    if request.resume is not None:
        run = find_run(None if request.resume == NEWEST else request.resume)
    elif request.auto_resume:
        assert request.recipe is not None
        name = request.name or recipe_name(request.recipe, request.changes)
        named = run_folder(name, request.runs_dir)
        if (named / RECIPE).is_file():
            run, changes = named, later_overrides(named, changes)
            display.note(f"{run} exists and is resumed with its own recipe, not {request.recipe}")
    if run is not None:
        if not request.dry_run:
            held.enter_context(locked(run))
        opened = reopen_run(run, changes, display.note)
        if request.auto_resume and changes and not request.dry_run:
            record_later_overrides(run, changes)
        return opened
    assert request.recipe is not None
    if not request.auto_resume and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UsageError("torchrun restarted this command, which would start another run; add --name and --auto-resume")
    return load_recipe(request.recipe, request.changes, display.note, find_start), None, None


def _new_run(request: _Request, default: str, display: "TrainingDisplay", held: contextlib.ExitStack) -> Path:
    """Create the folder of a new run; name the newest unfinished one of that name, which the user may have meant."""
    from lightlm.recipe import load_run_recipe
    from lightlm.runs import RUNS, new_run, record_overrides, run_folder
    from lightlm.runs.listing import STATES_TO_RESUME, summarize
    from lightlm.train.schedules import batch_plan

    name = request.name or default
    exact, overwrite, parent = request.exact, request.overwrite, request.runs_dir
    run = held.enter_context(new_run(name, exact=exact, overwrite=overwrite, parent=parent))
    record_overrides(run, request.changes)
    if run == run_folder(name, parent):
        return run
    number = int(run.name.rpartition("-")[2])  # the claimed name is name-2, name-3, ...
    earlier = [*(run.with_name(f"{name}-{n}") for n in range(number - 1, 1, -1)), run_folder(name, parent)]
    for folder in earlier:
        if (found := summarize(folder)) and found.state in STATES_TO_RESUME:
            with contextlib.suppress(LightLMError):  # the recipe of another version
                steps = found.step + batch_plan(load_run_recipe(folder)).remaining(found.tokens or 0)[0]
                display.note(
                    f"{folder} is at step {found.step:,} of {steps:,}; resume it with `lightlm train --resume "
                    f"{folder.name if parent == RUNS else folder}`. This run is {run}"
                )
            break
    return run

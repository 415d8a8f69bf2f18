"""Run a sweep: contestants times seeds, in a folder where the same call resumes it.

with Sweep.open(Path("sweeps/rates"), watch=watch) as sweep:
    sweep.add([Contestant("gpt2", "gpt2.yaml"), Contestant("ours", "demo", ("optimizer.lr=2e-3",))], seeds=(1, 2, 3))
    sweep.run()
    results = sweep.results()
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightlm import files
from lightlm.errors import LightLMError, RecipeError, UsageError
from lightlm.recipe import Recipe
from lightlm.sweep.cells import Cell, Contestant, check_needs, read_recipe, resolve
from lightlm.sweep.engine import (
    Ending,
    Engine,
    Overview,
    Row,
    Start,
    Watch,
    environments,
    start_process,
    without_threads,
)
from lightlm.sweep.folder import FINAL, Definition, SweepFolder, free_changes, require_equal
from lightlm.sweep.machine import Machine, fitting_tokens, look_at_machine
from lightlm.sweep.table import Results, find_baseline, read_results

DEFAULT_METRIC, ACROSS_TOKENIZERS = "val_loss", "val_bpb"


@dataclass(frozen=True)
class Limits:
    """How a sweep uses its machine.

    Attributes:
        jobs: runs at a time; None is one, or one per GPU.
        budget: seconds for this call; None is as long as it takes.
        minutes: train every run for this time instead of its recipe's tokens.
    """

    jobs: int | None = None
    budget: float | None = None
    minutes: float | None = None


NO_LIMITS = Limits()


class Sweep:
    """A sweep whose folder is held. See the module's example."""

    def __init__(
        self,
        folder: SweepFolder,
        definition: Definition,
        limits: Limits,
        watch: Watch,
        start: Start,
        *,
        overwrite: bool = False,
    ) -> None:
        """Take the parts of a sweep; see `open`."""
        self.folder, self.definition, self.watch = folder, definition, watch
        self._limits, self._start, self._overwrite = limits, start, overwrite
        self._ends = None if limits.budget is None else time.monotonic() + limits.budget
        self._recipes: dict[str, Recipe] = {}
        self._cells: dict[str, Cell] = {}
        self._places: list[dict[str, str]] | None = None
        self._failed: set[str] = set()  # cells that this call has tried

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        path: Path,
        limits: Limits = NO_LIMITS,
        *,
        overwrite: bool = False,
        watch: Watch | None = None,
        start: Start | None = None,
    ) -> "Iterator[Sweep]":
        """Context manager that gives the new or existing sweep of a folder, and keeps other processes out of it.

        Args:
            overwrite: delete the sweep that is there, when the first run of this one is about to start.
            watch: receives what happens.
            start: starts a run.

        Raises:
            CheckpointError: another process runs this sweep, or the folder holds something else.
            UsageError: the sweep was made with another limit of time.
        """
        folder = SweepFolder(path)
        with folder.held(overwrite=overwrite):
            yield cls.peek(path, limits, overwrite=overwrite, watch=watch, start=start)

    @classmethod
    def peek(
        cls,
        path: Path,
        limits: Limits = NO_LIMITS,
        *,
        overwrite: bool = False,
        watch: Watch | None = None,
        start: Start | None = None,
    ) -> "Sweep":
        """Return the sweep of a folder, to look at it: as `open`, but it must not run."""
        folder = SweepFolder(path)
        definition = (None if overwrite else folder.read()) or Definition(minutes=limits.minutes)
        if definition.minutes != limits.minutes:
            before, now = (
                f"{minutes:g} minutes per run" if minutes else "equal tokens"
                for minutes in (definition.minutes, limits.minutes)
            )
            raise UsageError(f"{folder} compares at {before}, not at {now}; {_elsewhere(folder)}")
        return cls(folder, definition, limits, watch or Watch(), start or start_process, overwrite=overwrite)

    def add(self, contestants: Sequence[Contestant], seeds: Sequence[int]) -> None:
        """Add contestants with seeds to what this call runs. What the sweep has run already is not repeated.

        Raises:
            RecipeError: recipes have mistakes; the message lists those of all.
            UsageError: a contestant of this name has other settings in this sweep.
            LightLMError: a recipe needs a device, a task or data that is missing.
        """
        recipes = resolve(contestants, seeds, self.watch.note)
        check_needs(recipes)
        chosen = list({entry.name: entry for entry in contestants if entry.name in recipes}.values())
        try:
            self._require_one_base(chosen[0])
            self.definition.add(chosen, recipes, seeds)
        except UsageError as error:
            raise UsageError(f"{self.folder}: {error}; {_elsewhere(self.folder)}") from None
        self._recipes |= recipes
        cells = [Cell(entry, seed) for seed in seeds for entry in chosen]
        self._cells |= {cell.name: cell for cell in cells}
        if self.definition.metric is None and _tokenizers(recipes.values()) > 1:
            self.definition.metric = ACROSS_TOKENIZERS

    def _require_one_base(self, added: Contestant) -> None:
        """Check that contestants which differ by values share all else, with those of earlier calls too.

        Raises:
            UsageError: with the values of an earlier contestant, the recipe of this one has other settings.
        """
        earlier = next((each for each in self.definition.entries.values() if each.contestant.values), None)
        if not added.values or earlier is None:
            return
        values = earlier.contestant.values
        varied = {**added.values, **values}
        shared = [change for change in added.changes if change.partition("=")[0] not in varied]
        with contextlib.suppress(RecipeError):  # a recipe whose values only fit together
            recipe = read_recipe(added.recipe, [*shared, *(f"{key}={value}" for key, value in values.items())])
            require_equal(earlier.contestant.name, earlier.settings, recipe.to_dict())

    @property
    def jobs(self) -> int:
        """How many runs there are at a time; 1 until the first call of `run` has looked at the machine."""
        return len(self._places) if self._places else self._limits.jobs or 1

    @property
    def cells(self) -> list[Cell]:
        """What this call runs, in order."""
        return list(self._cells.values())

    def overview(self) -> Overview:
        """Return the state of all cells, with a prediction if runs are done."""
        if self._overwrite:
            return Overview([Row(cell, "waiting") for cell in self.cells], None)
        return self._engine().overview()

    def run(self) -> Ending:
        """Run what is left; return why it ended. What fails is tried again by the next call of `lightlm sweep`.

        Raises:
            LightLMError: the time of a step could not be measured, or the tokens that fit into a limit are too few.
        """
        if self._overwrite:
            self._prepare()  # what can still fail, before anything is deleted
            self.folder.clear()
            self._overwrite = False
        self.folder.write(self.definition)
        for name, recipe in self._recipes.items():
            self.folder.write_recipe(self.definition.entries[name].contestant, recipe)
        left = [cell for cell in self.cells if cell.name not in self._failed]
        if all(self.folder.status(cell).state in FINAL for cell in left):
            return "complete"
        self._prepare()
        self.folder.write(self.definition)
        engine = self._engine()
        ending = engine.run()
        self._failed |= {row.cell.name for row in engine.overview().rows if row.state == "failed"}
        return ending

    def check_baseline(self, baseline: str | None) -> None:
        """Raise UsageError if no contestant has this name or value."""
        find_baseline(baseline, [entry.contestant for entry in self.definition.entries.values()])

    def results(self, metric: str | None = None, baseline: str | None = None) -> Results:
        """Return the table so far, and write results.json; see `read_results`."""
        results = table_of(self.folder, self.definition, metric, baseline)
        text = json.dumps(results.to_dict(), indent=1, ensure_ascii=False) + "\n"
        files.write_text(self.folder.path / "results.json", text)
        return results

    def _prepare(self) -> None:
        """Look at the machine, and fix what all runs share: the precision, and the tokens of a limit of time."""
        if self._places is None:
            machine = self._look_at_machine()
            self._places = environments(self._limits.jobs or max(len(machine.gpus), 1), machine.gpus)
            self.definition.fixed.setdefault("train.dtype", machine.dtype)
            if machine.slow:
                self.watch.note(f"train.dtype={machine.slow}")
        if self.definition.minutes is not None:
            for name, recipe in self._recipes.items():
                if name not in self.definition.tokens:
                    self.watch.note(f"timing a few steps of '{name}'")
                    place = self._places[0] if recipe.train.threads == "auto" else without_threads(self._places[0])
                    tokens = fitting_tokens(recipe, self.definition.minutes, place)
                    entry = self.definition.entries[name].contestant
                    read_recipe(entry.recipe, [*entry.changes, f"train.tokens={tokens}"])
                    self.definition.tokens[name] = tokens

    def _look_at_machine(self) -> Machine:
        first, fixed = next(iter(self._recipes.values())), self.definition.fixed.get("train.dtype", "auto")
        named: dict[str, Recipe] = {}  # one for each precision, what is fixed in place of `auto`
        for recipe in self._recipes.values():
            dtype = fixed if recipe.train.dtype == "auto" else recipe.train.dtype
            named.setdefault(
                dtype, recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": dtype})})
            )
        if first.train.device == "cpu" and set(named) == {"float32"}:
            return Machine("cpu", (), "float32")
        # What is not measured yet comes first, then what may be slow.
        return look_at_machine(named.get("auto") or next((named[each] for each in named if each != "float32"), first))

    def _engine(self) -> Engine:
        tokens = {name: self.definition.tokens.get(name, recipe.train.tokens) for name, recipe in self._recipes.items()}
        return Engine(
            self.folder,
            self.cells,
            tokens,
            begin=self._begin,
            resume=lambda cell: free_changes(self.folder.run(cell), self._recipes[cell.contestant.name]),
            skip=self._failed,
            own_threads=[name for name, recipe in self._recipes.items() if recipe.train.threads != "auto"],
            places=self._places,
            budget=None if self._ends is None else self._ends - time.monotonic(),
            watch=self.watch,
            start=self._start,
        )

    def _begin(self, cell: Cell) -> list[str]:
        """Return recipe, seed and what the sweep has fixed, for a new run.

        The recipe is the sweep's copy. Its references to models are those of the checkpoints that were there then.
        """
        name = cell.contestant.name
        arguments = [str(self.folder.recipe(cell.contestant)), cell.seed_override]
        if self._recipes[name].train.dtype == "auto" and (dtype := self.definition.fixed.get("train.dtype")):
            arguments.append(f"train.dtype={dtype}")
        if (tokens := self.definition.tokens.get(name)) is not None:
            arguments.append(f"train.tokens={tokens}")
        return arguments


def table_of(folder: SweepFolder, definition: Definition, metric: str | None, baseline: str | None) -> Results:
    """Return the table of a sweep's runs so far; see `read_results`."""
    chosen = metric or definition.metric or DEFAULT_METRIC
    notes = []
    settings = [entry.settings for entry in definition.entries.values()]
    if chosen in ("val_loss", "loss") and _tokenizers(settings) > 1:
        notes.append(
            f"the runs have different tokenizers, and nats per token do not compare across them; take --metric "
            f"{ACROSS_TOKENIZERS}"
        )
    return read_results(folder, definition, chosen, baseline, notes)


def _tokenizers(recipes: Iterable[Recipe | dict[str, Any]]) -> int:
    """Return how many tokenizers the data of these recipes have, as far as the folders are here."""
    from lightlm.data.folder import read_manifest, resolve_dataset
    from lightlm.recipe.sections.data import DataSection

    found = set()
    for recipe in recipes:
        values = recipe.to_dict() if isinstance(recipe, Recipe) else recipe
        with contextlib.suppress(LightLMError):  # shards from elsewhere, or data that has moved
            data = DataSection.model_validate(values["data"])
            found.add(read_manifest(resolve_dataset(data.main)).tokenizer_sha256)
    return len(found)


def _elsewhere(folder: SweepFolder) -> str:
    return f"start another sweep with --name {folder.path.name}-2, or delete this one with --overwrite"

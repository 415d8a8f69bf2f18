"""The folder of a sweep: what it runs, how each run ended, and its runs, so that the same command resumes it.

sweeps/<name>/
  sweep.json      contestants with their seeds and settings, and what this sweep has fixed for all
  recipes/        the recipe of each contestant as the sweep has read it: an edit of the file changes no later run
  runs/<cell>/    run folders, as `lightlm train` makes them
  ends/<cell>.json, logs/<cell>.log
  results.json, plots/*.png
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightlm import files
from lightlm.errors import CheckpointError, LightLMError, UsageError
from lightlm.recipe import Recipe, by_dotted_key, load_run_recipe, parse_recipe, with_new_names
from lightlm.runs import RECIPE, holder, locked, require_unlocked, run_folder
from lightlm.runs.listing import summarize
from lightlm.runs.metrics import METRICS, last_metrics
from lightlm.sweep.cells import Cell, Contestant, folder_name

SWEEPS = Path("sweeps")
_FILE = "sweep.json"  # a folder with this file is a sweep
State = Literal["waiting", "running", "done", "diverged", "failed", "interrupted"]
STATES: tuple[State, ...] = get_args(State)
# How a process may have ended. A done or diverged run is never repeated; the others are tried again.
FINAL: tuple[State, ...] = ("done", "diverged")

# Settings that change neither what a run learns nor how that is measured: a resumed sweep may change them.
_FREE = frozenset(
    {
        *("name", "checkpoint", "tracking", "train.seed", "train.device", "train.threads", "train.micro_batch_size"),
        "train.compile",
    }
)
_OF_THE_CELL = ("name", "train.seed")  # of these, what each run has for itself


@dataclass(frozen=True)
class End:
    """How the last process of a run ended.

    Attributes:
        message: why it failed or diverged.
        seconds: wall time of all its processes so far.
    """

    state: State
    seconds: float
    message: str = ""


@dataclass
class Entry:
    """A contestant of the sweep: its seeds, and its recipe's settings when it was added."""

    contestant: Contestant
    seeds: list[int]
    settings: dict[str, Any]

    def cells(self) -> list[Cell]:
        return [Cell(self.contestant, seed) for seed in self.seeds]


@dataclass
class Definition:
    """What a sweep has run or will run.

    Attributes:
        entries: by name.
        fixed: settings that the sweep chose once for all runs, such as the precision that `auto` means here.
        minutes: training time of every run, instead of its tokens.
        tokens: with `minutes`, the tokens of each contestant.
        metric: what was compared last.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    minutes: float | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    metric: str | None = None

    def add(self, contestants: Sequence[Contestant], recipes: Mapping[str, Recipe], seeds: Sequence[int]) -> None:
        """Add contestants and seeds to those that the sweep has.

        Raises:
            UsageError: a contestant of this name has other settings in this sweep.
        """
        folders = {Cell(entry.contestant, 0).name.casefold(): name for name, entry in self.entries.items()}
        for contestant in contestants:
            name, settings = contestant.name, recipes[contestant.name].to_dict()
            if (other := folders.get(Cell(contestant, 0).name.casefold(), name)) != name:
                raise UsageError(f"the runs of '{name}' would have the names of those of '{other}'; rename one of them")
            if (entry := self.entries.get(name)) is None:
                self.entries[name] = Entry(contestant, list(seeds), settings)
                continue
            require_equal(name, entry.settings, settings)
            entry.seeds += [seed for seed in seeds if seed not in entry.seeds]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Definition":
        entries = {
            name: Entry(
                Contestant(**(entry["contestant"] | {"changes": tuple(entry["contestant"]["changes"])})),
                list(entry["seeds"]),
                dict(entry["settings"]),
            )
            for name, entry in values["entries"].items()
        }
        return cls(**({key: values[key] for key in ("fixed", "minutes", "tokens", "metric")} | {"entries": entries}))


@dataclass(frozen=True)
class Status:
    """A cell at a glance.

    Attributes:
        share: of its tokens, from 0 to 1.
        end: how its last process ended; None if none has.
    """

    state: State
    share: float
    val_loss: float | None
    end: End | None


class SweepFolder:
    """A sweep on disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, path / "runs"

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def held(self, *, overwrite: bool = False) -> Iterator[None]:
        """Context manager that creates the folder and keeps other sweeps out of it.

        A folder in which no sweep has begun when the context ends is removed.

        Args:
            overwrite: the sweep that is there will be deleted; see `clear`.

        Raises:
            CheckpointError: another sweep runs in it, a process trains a run that would be deleted, or the folder is
                not a sweep's.
        """
        if self.path.exists() and not self._is_sweep():
            raise CheckpointError(f"{self} exists already and is not a sweep; choose another --name")
        if overwrite:
            self._require_unlocked_runs()
        self.runs.mkdir(parents=True, exist_ok=True)
        with locked(self.path, "run"):
            try:
                yield
            finally:
                if not self.path.is_symlink() and not (self.path / _FILE).is_file() and self._is_sweep():
                    with contextlib.suppress(OSError):  # Windows deletes no folder whose lock is open
                        files.remove_folder(self.path)

    def _require_unlocked_runs(self) -> None:
        for run in self.runs.glob("*"):
            require_unlocked(run)

    def clear(self) -> None:
        """Delete what the sweep has written, its definition last: a kill leaves a sweep, which can be deleted again.

        Symbolic links to other disks stay.

        Raises:
            RunLockedError: a process trains one of its runs.
        """
        self._require_unlocked_runs()
        for name in ("runs", "ends", "logs", "plots", "recipes"):
            files.remove_folder((self.path / name).resolve())
        for name in ("results.json", _FILE):
            (self.path / name).unlink(missing_ok=True)
        self.runs.resolve().mkdir()

    def _is_sweep(self) -> bool:
        """Return whether the folder is a sweep's, or holds at most what the start of one leaves when it is killed."""
        entries = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]
        return (self.path / _FILE).is_file() or (set(entries) <= {"runs"} and not any(self.runs.glob("*")))

    def read(self) -> Definition | None:
        """Return what the sweep runs, or None for a new one.

        Raises:
            CheckpointError: sweep.json cannot be read.
        """
        path = self.path / _FILE
        if not path.is_file():
            return None
        try:
            definition = Definition.from_dict(json.loads(path.read_text(encoding="utf-8")))
            if not definition.entries:
                raise ValueError("it lists no runs")
            return definition
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged or of another version ({error!r}); choose another --name, or start over with "
                "--overwrite"
            ) from None

    def write(self, definition: Definition) -> None:
        files.write_text(self.path / _FILE, json.dumps(definition.to_dict(), indent=1, ensure_ascii=False) + "\n")

    def run(self, cell: Cell) -> Path:
        """Return the folder of a cell's run, which need not exist."""
        return run_folder(cell.name, self.runs)

    def recipe(self, contestant: Contestant) -> Path:
        """Return the file of a contestant's recipe, which need not exist."""
        return self.path / "recipes" / f"{folder_name(contestant.name)}.yaml"

    def write_recipe(self, contestant: Contestant, recipe: Recipe) -> None:
        """Write the recipe that new runs of a contestant train."""
        path, text = self.recipe(contestant), recipe.to_yaml()
        path.parent.mkdir(exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            files.write_text(path, text)

    def log(self, cell: Cell) -> Path:
        return self.path / "logs" / f"{cell.name}.log"

    def end(self, cell: Cell) -> End | None:
        """Return how a cell's last process ended; None if none has."""
        try:
            return End(**json.loads((self.path / "ends" / f"{cell.name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def record(self, cell: Cell, end: End) -> None:
        path = self.path / "ends" / f"{cell.name}.json"
        path.parent.mkdir(exist_ok=True)
        files.write_text(path, json.dumps(asdict(end)) + "\n")

    def status(self, cell: Cell) -> Status:
        """Read a cell's state from its files. A run that is complete is done, whatever its process said."""
        run, end = self.run(cell), self.end(cell)
        if not (run / RECIPE).is_file():
            failed = end is not None and end.state in ("failed", "diverged")
            return Status(end.state if end and failed else "waiting", 0.0, None, end)
        if end is not None and end.state in FINAL and (run / METRICS).is_file():
            return Status(end.state, 1.0, self._progress(run)[1], end)
        found = summarize(run)
        if found is None:
            return Status("waiting", 0.0, None, end)
        share = min((found.tokens or 0) / (found.target_tokens or 1), 1.0)
        if found.state == "complete":
            return Status("done", 1.0, found.val_loss, end)
        if found.trainer is not None:
            return Status("running", share, found.val_loss, end)
        return Status(
            end.state if end is not None and end.state == "failed" else "interrupted", share, found.val_loss, end
        )

    def progress(self, cell: Cell, tokens: int) -> tuple[float, float | None]:
        """Return the share of its tokens that a running cell has seen, and its last validation loss."""
        seen, val_loss = self._progress(self.run(cell))
        return min(seen / tokens, 1.0), val_loss

    def _progress(self, run: Path) -> tuple[int, float | None]:
        try:
            last, val_loss = last_metrics(run)
        except (OSError, ValueError, KeyError):
            return 0, None
        return last.get("tokens", 0), val_loss

    def busy(self, cell: Cell) -> bool:
        """Return whether a process trains a cell's run: one that a killed sweep has left."""
        return holder(self.run(cell)) is not None


def find_sweep(reference: str) -> SweepFolder:
    """Return the sweep of this name in sweeps/, or in the folder at this path.

    Raises:
        UsageError: there is none.
    """
    for path in (SWEEPS / reference, Path(reference)):
        if (path / _FILE).is_file():
            return SweepFolder(path)
    there = ", ".join(sorted(path.parent.name for path in SWEEPS.glob(f"*/{_FILE}"))) or "none"
    raise UsageError(f"no sweep at {SWEEPS / reference}; sweeps here: {there}")


def require_equal(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UsageError if a contestant's settings differ from those of an earlier call, but for `_FREE` ones."""
    if changed := _differences(before, now):
        raise UsageError(f"'{name}' was added with other settings: {'; '.join(changed)}")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ, apart from those that a sweep may change."""
    with contextlib.suppress(LightLMError):  # what an earlier version wrote lacks the keys of this one
        before = parse_recipe(with_new_names(dict(before)), "sweep.json", earlier=True).to_dict()
    old, new = by_dotted_key(before), by_dotted_key(now)
    return [
        f"{key} was {json.dumps(old.get(key))} and is {json.dumps(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not _is_free(key)
    ]


def free_changes(run: Path, recipe: Recipe) -> list[str]:
    """Return the settings in which a run differs from its recipe of now and that it may change, as overrides.

    Where the recipe says `auto`, the run keeps what it has chosen.
    """
    with contextlib.suppress(LightLMError):  # `train --resume` says what is wrong with the run's recipe
        saved = load_run_recipe(run, (), lambda note: None)
        old, new = by_dotted_key(saved.to_dict()), by_dotted_key(recipe.to_dict())
        return [
            f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for key, value in new.items()
            if _is_free(key) and key not in _OF_THE_CELL and value not in ("auto", old.get(key))
        ]
    return []


def _is_free(key: str) -> bool:
    return key in _FREE or key.partition(".")[0] in _FREE

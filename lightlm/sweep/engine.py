"""Run the cells of a sweep as processes of `lightlm train`: several at a time, resumable, within a budget of time."""

import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from lightlm.errors import TrainingDivergedError
from lightlm.limits import cores
from lightlm.processes import THREADS_VARIABLE, python_command, python_environment
from lightlm.runs import RECIPE
from lightlm.sweep.cells import Cell
from lightlm.sweep.folder import FINAL, End, State, SweepFolder
from lightlm.train.signals import describe_signal, handling

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0  # between readings of a running run's metrics
_INTERRUPTED = 130
_TRUSTED = 0.05  # share of a run after which its own speed predicts its end
Ending = Literal["complete", "interrupted", "budget"]

# Ctrl-C reaches all processes of a terminal. These are told once, by the sweep, so that each can save undisturbed.
_APART: dict[str, int | bool]
if os.name == "nt":
    _APART = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    _STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
else:
    _APART, _STOP = {"start_new_session": True}, signal.SIGTERM


class Process(Protocol):
    """What the engine needs of a `subprocess.Popen`."""

    def poll(self) -> int | None: ...
    def send_signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[list[str], Mapping[str, str], Path], Process]


@dataclass
class Row:
    """A cell in the overview.

    Attributes:
        share: of its tokens, from 0 to 1.
        left: seconds until it ends, as far as that is known.
    """

    cell: Cell
    state: State
    share: float = 0.0
    val_loss: float | None = None
    seconds: float = 0.0
    left: float | None = None


@dataclass(frozen=True)
class Overview:
    """All cells, and the seconds until the last one ends, as far as that is known."""

    rows: list[Row]
    left: float | None

    def count(self, *states: State) -> int:
        return sum(row.state in states for row in self.rows)


class Watch:
    """Receives what happens in a sweep; a display overrides what it shows."""

    def started(self, row: Row, overview: Overview) -> None:
        """A run starts or resumes."""

    def ended(self, row: Row, end: End, overview: Overview) -> None:
        """A run has ended."""

    def progress(self, overview: Overview) -> None:
        """Time has passed."""

    def note(self, text: str) -> None:
        """Something else that the user should know."""


def start_process(arguments: list[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start `lightlm ARGUMENTS`; what it prints is appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = python_command("-m", "lightlm", *arguments)
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=python_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            **_APART,  # type: ignore[call-overload]
        )


def environments(jobs: int, gpus: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return the environment of each of `jobs` runs at a time: its share of the cores, and one of the GPUs in turn.

    A number of threads that the user has set stays.
    """
    base = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    if jobs > 1:
        base.setdefault(THREADS_VARIABLE, str(max(1, cores() // jobs)))
    if len(gpus) < 2:
        return [base] * jobs
    return [base | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(jobs)]


def without_threads(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Return an environment of `environments` for a recipe that says how many threads it takes."""
    if THREADS_VARIABLE in os.environ:
        return environment
    return {key: value for key, value in environment.items() if key != THREADS_VARIABLE}


@dataclass
class _Running:
    row: Row
    slot: int
    process: Process | None  # None: a process that another sweep has left
    began: float
    share_before: float
    seconds_before: float
    log_from: int
    looked: float = 0.0


class Engine:
    """Runs cells until all are done, the budget is used up, or a signal asks to stop."""

    def __init__(
        self,
        folder: SweepFolder,
        cells: Sequence[Cell],
        tokens: Mapping[str, int],
        *,
        begin: Callable[[Cell], list[str]] = lambda cell: [cell.contestant.recipe, *cell.changes],
        resume: Callable[[Cell], list[str]] = lambda cell: [],
        skip: Container[str] = (),
        own_threads: Container[str] = (),
        places: Sequence[Mapping[str, str]] | None = None,
        budget: float | None = None,
        watch: Watch | None = None,
        start: Start = start_process,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Read the state of every cell.

        Args:
            cells: in the order in which they are to run.
            tokens: of a run, by contestant; the predictions need them.
            begin: the recipe and overrides of a new run.
            resume: the overrides of a run that is resumed.
            skip: names of cells that do not run.
            own_threads: names of contestants whose recipes say how many threads they take.
            places: the environment of each run at a time; one run unless given.
            budget: seconds. A run that is expected to end later is not started. One that takes longer than expected is
                saved and stopped at the end.
        """
        self.folder, self._tokens, self._begin, self._resume = folder, tokens, begin, resume
        self._own_threads = own_threads
        self._places, self._budget, self._watch = places or environments(1), budget, watch or Watch()
        self._start, self._clock, self._sleep = start, clock, sleep
        self._rows = {cell.name: self._read(cell) for cell in cells}
        self._waiting = [row for row in self._rows.values() if row.state not in FINAL and row.cell.name not in skip]
        self._running: list[_Running] = []
        self._began = clock()
        self._signals: list[int] = []
        self._stopping, self._killed, self._over = False, False, False

    def _read(self, cell: Cell) -> Row:
        status = self.folder.status(cell)
        seconds = status.end.seconds if status.end else 0.0
        return Row(cell, status.state, status.share, status.val_loss, seconds)

    def run(self) -> Ending:
        """Run what is left; return why it ended. After an error, such as a full disk, the runs save and stop."""
        with handling(self._receive):
            try:
                while self._work():
                    self._sleep(_POLL_SECONDS)
            except BaseException:
                self._tell_to_stop()
                raise
        if self._over and not self._signals:
            return "budget"
        stopped = any(row.state == "interrupted" for row in self._rows.values())
        return "interrupted" if self._signals or stopped else "complete"

    def _work(self) -> bool:
        """Do what is due; return whether runs are left to wait for."""
        self._reap()
        self._obey()
        while not self._stopping and (slot := self._free_slot()) is not None and (row := self._next()):
            self._launch(row, slot)
        if not self._running:
            return False
        self._look()
        self._watch.progress(self.overview())
        return True

    def _tell_to_stop(self) -> None:
        for entry in self._running:
            if entry.process is not None:
                entry.process.send_signal(_STOP)

    def overview(self) -> Overview:
        rows = list(self._rows.values())
        running = [self._left(entry) for entry in self._running]
        for entry, left in zip(self._running, running, strict=True):
            entry.row.left = left
        known = [*running, *(self._expected(row) for row in self._waiting)]
        if any(seconds is None for seconds in known):
            return Overview(rows, None)
        total = sum(seconds for seconds in known if seconds is not None) / len(self._places)
        return Overview(rows, max([total, *(left for left in running if left is not None)]))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _obey(self) -> None:
        """Ask the runs to save and stop after a signal or at the end of the budget; a second Ctrl-C kills them."""
        spent = self._budget is not None and self._clock() - self._began >= self._budget
        if spent and self._running and not self._stopping:
            self._over = True
            self._watch.note("the budget is used up: what still runs is saved and stopped")
        if (self._signals or (spent and self._running)) and not self._stopping:
            self._stopping = True
            self._running = [entry for entry in self._running if entry.process is not None]
            self._tell_to_stop()
        if self._signals[1:].count(signal.SIGINT) and not self._killed:
            self._killed = True
            for entry in self._running:
                entry.process.kill()  # type: ignore[union-attr]

    def _free_slot(self) -> int | None:
        used = {entry.slot for entry in self._running}
        return next((slot for slot in range(len(self._places)) if slot not in used), None)

    def _next(self) -> Row | None:
        """Take the first waiting cell that is expected to end within the budget."""
        left = math.inf if self._budget is None else self._budget - (self._clock() - self._began)
        row = next((row for row in self._waiting if (self._expected(row) or 0.0) < left), None)
        self._over = row is None and bool(self._waiting)
        if row is not None:
            self._waiting.remove(row)
        return row

    def _launch(self, row: Row, slot: int) -> None:
        folder, cell, now = self.folder, row.cell, self._clock()
        if folder.busy(cell):
            self._watch.note(f"{folder.run(cell)} is still being trained by an earlier sweep's process; waiting for it")
            process, log_from = None, 0
        else:
            log, run = folder.log(cell), folder.run(cell)
            log_from = log.stat().st_size if log.is_file() else 0
            if (run / RECIPE).is_file():
                arguments = ["train", f"--resume={run}", *self._resume(cell)]
            else:
                options = [f"--name={cell.name}", f"--runs-dir={folder.runs}"]
                arguments = ["train", *self._begin(cell), *options]
            place = self._places[slot]
            if cell.contestant.name in self._own_threads:
                place = without_threads(place)
            process = self._start([*arguments, "--no-report"], place, log)
        row.state = "running"
        self._running.append(_Running(row, slot, process, now, row.share, row.seconds, log_from))
        if process is not None:
            self._watch.started(row, self.overview())

    def _reap(self) -> None:
        """Record the runs that have ended."""
        for entry in list(self._running):
            row, cell = entry.row, entry.row.cell
            if entry.process is None:
                if self.folder.busy(cell):
                    continue
                self._running.remove(entry)
                self._rows[cell.name] = fresh = self._read(cell)
                if fresh.state in FINAL:
                    fresh.seconds += self._clock() - entry.began
                    self._finish(fresh, End(fresh.state, fresh.seconds))
                else:
                    self._waiting.insert(0, fresh)
                continue
            if (code := entry.process.poll()) is None:
                continue
            self._running.remove(entry)
            seconds = entry.seconds_before + self._clock() - entry.began
            end = self._judge(code, cell, entry.log_from, seconds)
            self.folder.record(cell, end)
            status = self.folder.status(cell)
            row.state, row.share, row.val_loss, row.seconds = end.state, status.share, status.val_loss, seconds
            self._finish(row, end)

    def _finish(self, row: Row, end: End) -> None:
        row.left = None
        self._watch.ended(row, end, self.overview())

    def _judge(self, code: int, cell: Cell, log_from: int, seconds: float) -> End:
        """Return how a process ended by its exit code (negative: a signal) and its log."""
        if code == 0:
            return End("done", seconds)
        if code == _INTERRUPTED or (self._stopping and code != TrainingDivergedError.exit_code):
            return End("interrupted", seconds)
        if code < 0:
            return End("failed", seconds, f"the process was ended by {describe_signal(-code)}")
        state: State = "diverged" if code == TrainingDivergedError.exit_code else "failed"
        return End(state, seconds, _error(self.folder.log(cell), log_from) or f"exit code {code}")

    def _look(self) -> None:
        """Read how far the running cells are."""
        now = self._clock()
        for entry in self._running:
            if now - entry.looked >= _LOOK_SECONDS:
                entry.looked, row = now, entry.row
                row.share, row.val_loss = self.folder.progress(row.cell, self._tokens[row.cell.contestant.name])
                row.seconds = entry.seconds_before + now - entry.began

    def _left(self, entry: _Running) -> float | None:
        """Return the seconds until a running cell ends: by its own speed, once that is known."""
        gained, elapsed = entry.row.share - entry.share_before, self._clock() - entry.began
        if gained >= _TRUSTED and entry.looked > entry.began:
            return (1 - entry.row.share) * (entry.looked - entry.began) / gained
        if (expected := self._expected(replace(entry.row, share=entry.share_before))) is None:
            return None
        return max(expected - elapsed, 0.0)

    def _expected(self, row: Row) -> float | None:
        """Return the seconds that a cell still takes, by the runs of its contestant that are done, else by all."""
        done = [other for other in self._rows.values() if other.state == "done" and other.seconds]
        done = [other for other in done if other.cell.contestant.name == row.cell.contestant.name] or done
        rates = [other.seconds / self._tokens[other.cell.contestant.name] for other in done] or [
            (entry.looked - entry.began) / (gained * self._tokens[entry.row.cell.contestant.name])
            for entry in self._running
            if (gained := entry.row.share - entry.share_before) >= _TRUSTED and entry.looked > entry.began
        ]
        if not rates:
            return None
        return (1 - row.share) * self._tokens[row.cell.contestant.name] * sum(rates) / len(rates)


def _error(log: Path, begin: int) -> str:
    """Return the message of the last error in a log from position `begin` on, else its last line."""
    try:
        with log.open("rb") as file:
            file.seek(begin)
            text = file.read().decode("utf-8", errors="replace").strip()
    except OSError:
        return ""
    *_, last = re.split(r"^Error: ", text, flags=re.MULTILINE)
    return last.strip() if last != text else (text.splitlines() or [""])[-1]

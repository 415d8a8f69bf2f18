"""Saving a run's checkpoints while it trains.

Between two steps the state is copied to the CPU. A thread then writes the copy, points `latest` to it and prunes old
checkpoints; safetensors, torch and xxhash release Python's lock meanwhile.
"""

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lightlm import checkpoint, files
from lightlm.data.tokenizer import Tokenizer
from lightlm.errors import CheckpointError
from lightlm.model.config import ModelConfig
from lightlm.recipe import CheckpointSection
from lightlm.runs import RECIPE
from lightlm.runs.metrics import METRICS
from lightlm.train.observe.observers import Observer

_LONG_WAIT = 2.0  # seconds that training waits for the previous save before the user gets a note


class Saver(contextlib.AbstractContextManager["Saver"]):
    """Writes a run's checkpoints one at a time and prunes old ones; leaving its context waits for the last write."""

    def __init__(
        self, run: Path, settings: CheckpointSection, tokenizer: Tokenizer, config: ModelConfig, observer: Observer
    ) -> None:
        self._run, self._settings, self._observer = run, settings, observer
        self._tokenizer, self._config = tokenizer, config
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[list[str]]] | None = None

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self._wait()
        except CheckpointError as failure:
            if kind is None:
                raise
            self._observer.note(str(failure))  # the block's own error is raised
        finally:
            self._writer.shutdown()

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        training_state: dict[str, Any],
        raw: dict[str, Tensor] | None = None,
        *,
        milestone: bool = False,
        best: bool = False,
        wait: bool = False,
    ) -> None:
        """Save the state after `step`, unless it is saved already. The tensors may change once this returns.

        Args:
            weights: by parameter name, on any device.
            raw: the last weights, where `weights` is an average.
            training_state: nested dictionaries and lists of tensors and plain values, on any device.
            milestone: never prune this checkpoint.
            best: point the run's `best` to this checkpoint.
            wait: return once it is complete; a state on the CPU is not copied.

        Raises:
            CheckpointError: this save or the previous one could not be written.
        """
        self._wait(report_long=not wait)
        path = self._run / "checkpoints" / checkpoint.step_name(step)
        if (path / checkpoint.MARKER).is_file():
            if best:
                checkpoint.mark_best(path)
                for problem in prune(self._run, self._settings.keep_last):
                    self._observer.note(problem)
            return
        at_once = wait or not self._settings.asynchronous
        weights, training_state, raw = _on_cpu((weights, training_state, raw), copy=not at_once)
        self._pending = step, self._writer.submit(self._write, step, weights, training_state, raw, milestone, best)
        if at_once:
            self._wait()

    def report(self) -> None:
        """Report a save that has completed since the last call to the observer.

        Raises:
            CheckpointError: the save could not be written.
        """
        if self._pending is not None and self._pending[1].done():
            self._wait()

    def _wait(self, *, report_long: bool = False) -> None:
        if self._pending is None:
            return
        (step, write), started = self._pending, time.perf_counter()
        try:
            problems = write.result()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap system errors
            complete = checkpoint.checkpoints(self._run)
            kept = f"the last complete one is {complete[-1].name}" if complete else "there is none yet"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._run / 'checkpoints'}: "
                f"{files.no_room(error) or error}; {kept}. "
                f"Free space or repair the disk, then run `lightlm train --resume {self._run}`"
            ) from error
        finally:
            self._pending = None
        self._observer.checkpoint(self._run / "checkpoints" / checkpoint.step_name(step))
        for problem in problems:
            self._observer.note(problem)
        if report_long and (seconds := time.perf_counter() - started) > _LONG_WAIT:
            self._observer.note(
                f"training waited {seconds:.0f} s for the checkpoint of step {step} to be written; "
                "a higher checkpoint.every would avoid that"
            )

    def _write(
        self,
        step: int,
        weights: dict[str, Tensor],
        training: dict[str, Any],
        raw: dict[str, Tensor] | None,
        milestone: bool,
        best: bool,
    ) -> list[str]:
        """Write and prune, in the writer's thread; return problems that leave the checkpoint complete.

        Raises:
            CheckpointError: the run's folder was moved or deleted meanwhile. The checkpoint is written all the same.
        """
        # Metrics first: after a power failure they reach as far as the checkpoint, which holds its own step's row.
        if (metrics := self._run / METRICS).exists():
            files.sync_file(metrics)
        path = checkpoint.write_checkpoint(
            self._run, step, weights, self._config, self._tokenizer, training, raw, milestone=milestone
        )
        if not (self._run / RECIPE).is_file():
            raise CheckpointError(
                f"{self._run} was moved or deleted while it trained: its {RECIPE} is gone. The model of step {step} is "
                f"in {path}. To resume a run that was moved, name its new folder: `lightlm train --resume NEW_FOLDER`"
            )
        if best:
            checkpoint.mark_best(path)
        return prune(self._run, self._settings.keep_last)


def _on_cpu(value: Any, *, copy: bool) -> Any:
    """Return nested dictionaries, lists and tuples with tensors on the CPU; `copy` those that are there already."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, dict):
        return {key: _on_cpu(item, copy=copy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item, copy=copy) for item in value)
    return value


def prune(run: Path, keep_last: int) -> list[str]:
    """Delete all complete checkpoints except milestones, the best one and the newest `keep_last`.

    Returns:
        A message for each that could not be deleted.
    """
    best, problems = checkpoint.best_checkpoint(run), []
    for path in checkpoint.checkpoints(run)[:-keep_last]:
        if not checkpoint.is_milestone(path) and (best is None or path.name != best.name):
            try:
                files.remove_folder(path)
            except OSError as error:
                problems.append(f"an old checkpoint could not be deleted: {error}")
    return problems


def tidy(run: Path, resumed: Path | None, observer: Observer) -> None:
    """Restore a run's folder to its state after the save of `resumed`; called once, before training.

    Temporary files that a kill left are removed. Checkpoints after `resumed` are damaged: they are renamed to
    `step_....damaged`, so that the run can save these steps again.
    """
    for folder in (run / "checkpoints", run / "samples"):
        files.clear_leftovers(folder)
    damaged = checkpoint.checkpoints(run)
    if resumed is not None:
        damaged = damaged[[path.name for path in damaged].index(resumed.name) + 1 :]
    for path in damaged:
        renamed = path.with_name(f"{path.name}.damaged")
        files.replace_folder(path, renamed)
        observer.note(f"{path} is renamed to {renamed.name}")
    if resumed is not None:
        files.point_to(run / "checkpoints" / "latest", resumed.name)
    best = run / "checkpoints" / checkpoint.BEST
    if best.is_dir() and not best.is_symlink():
        _replace_copy(best, run)
    if checkpoint.best_checkpoint(run) is None:  # it was damaged: the run finds its best step again
        best.unlink(missing_ok=True)


def _replace_copy(best: Path, run: Path) -> None:
    """Point `best` to its step again where a tool has copied what the link led to; the copy is renamed."""
    marker = best / checkpoint.MARKER
    content = marker.read_bytes() if marker.is_file() else None
    same = (path for path in checkpoint.checkpoints(run) if (path / checkpoint.MARKER).read_bytes() == content)
    if (step := next(same, None)) is not None:
        checkpoint.mark_best(step)
    else:
        files.replace_folder(best, best.with_name(f"{best.name}.copied"))

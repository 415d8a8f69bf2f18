"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

They are watchers: a tracker that fails is noted once and left out, and training goes on. Each gets the numbers of
metrics.jsonl, the samples, and the resolved recipe as its configuration. Their packages are imported only when a
recipe names them.
"""

import contextlib
import functools
import importlib
import io
import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import yaml

from lightlm import files
from lightlm.errors import RecipeError
from lightlm.recipe import TrackingSection

STATE = "tracking.json"  # in the run folder: each backend that knows the run, its id for it, and `_LOGGED`
_LOGGED = "logged_step"
_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


@dataclass(frozen=True)
class Session:
    """What a backend is told when a run begins or goes on."""

    run: Path
    recipe: dict[str, Any]  # resolved
    project: str
    known: str | None  # the backend's id of this run if it began earlier
    first_step: int  # the checkpoint's; 0 for a new run
    logged_step: int  # the last one that ever stood in metrics.jsonl, which a killed run leaves past its checkpoint


class Tracker(Protocol):
    """One backend's end of a run. Any call may raise."""

    id: str
    where: str  # how to look at the run, for a note
    sent: int  # steps up to this one the backend has already, and is not told again

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of one step, the step's number among them."""

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def flush(self) -> None:
        """A checkpoint is complete: what was logged up to here will not be logged again."""

    def finish(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Told so by the writer's first event, TensorBoard forgets the steps after the checkpoint.
        purge = session.first_step + 1 if session.known else None
        self._writer: Any = SummaryWriter(str(session.run / "tensorboard"), purge_step=purge)
        self.id, self.where, self.sent = "tensorboard", f"tensorboard --logdir {session.run.parent}", 0
        if not session.known:
            self._writer.add_text("recipe", _fenced(yaml.safe_dump(session.recipe, sort_keys=False)), 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._writer.add_text("sample", _fenced(prompt + text), step)

    def flush(self) -> None:
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run, kept in `<run>/wandb`. WANDB_MODE, WANDB_ENTITY and its other variables are obeyed."""

    def __init__(self, session: Session) -> None:
        import wandb

        self.id = session.known or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=session.project,
            name=session.run.name,
            id=self.id,
            resume="allow",
            dir=str(session.run),
            config=session.recipe,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # The server knows what it has; an offline run can only go by our own file.
        self.sent = self._run.starting_step - 1 if self._run.resumed else session.logged_step if session.known else 0
        offline = f"offline; wandb sync --append {session.run / 'wandb'}/offline-run-*"
        self.where = offline if self._run.offline else str(self._run.url)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        import html

        import wandb

        self._run.log({"sample": wandb.Html(f"<pre>{html.escape(prompt + text)}</pre>")}, step=step)

    def flush(self) -> None:
        pass  # a process of its own writes and sends

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class Trackio:
    """A trackio run, kept where trackio keeps its projects, so that its dashboard compares runs.

    TRACKIO_DIR, TRACKIO_SPACE_ID and its other variables are obeyed.
    """

    def __init__(self, session: Session) -> None:
        import trackio

        # "never" for a new run: another of the same name, from another folder, is not continued.
        resume = "allow" if session.known else "never"
        with _no_output():
            self._run: Any = trackio.init(
                session.project, session.run.name, config=session.recipe, resume=resume, embed=False
            )
        self.id, self.where = self._run.id, f"trackio show --project {session.project}"
        self.sent = session.logged_step if session.known else 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        import trackio

        self._run.log({"sample": trackio.Markdown(_fenced(prompt + text))}, step=step)

    def flush(self) -> None:
        pass  # a thread of its own writes

    def finish(self, failed: bool) -> None:
        import trackio

        with _no_output():
            trackio.finish()


_BACKENDS: dict[str, Callable[[Session], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


class Trackers:
    """An `Observer` that hands a run's numbers to the backends of its recipe; a context that finishes them.

    Args:
        section: the recipe's.
        note: told where the tracked run can be seen, and of a backend that fails.

    Raises:
        RecipeError: a backend's package is not installed.
    """

    def __init__(self, section: TrackingSection, note: Callable[[str], None]) -> None:
        self._section, self._note = section, note
        self._active: dict[str, Tracker] = {}
        if missing := [name for name in section.backends if not _installed(_PACKAGES[name])]:
            raise RecipeError(
                f"tracking.backends: {', '.join(missing)} cannot be imported here; install with "
                "pip install 'lightlm[tracking]', or leave the name out (metrics.jsonl is always written)"
            )

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._each(lambda tracker: tracker.finish(failed=kind is not None))
        self._active = {}

    def start(self, facts: dict[str, Any]) -> None:
        if not self._section.backends:
            return
        run = Path(facts["run"])
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        known = _read_state(run / STATE)
        # A run may be killed again before it is as far as it has been: by then metrics.jsonl has been cut.
        known[_LOGGED] = logged = max(known.get(_LOGGED, 0), facts["logged_step"])
        for name in self._section.backends:
            session = Session(run, recipe, self._section.project, known.get(name), facts["first_step"], logged)
            tracker = self._guarded(name, functools.partial(_BACKENDS[name], session))
            if tracker is not None:
                self._active[name] = tracker
                known[name] = tracker.id
                self._note(f"{name}: {tracker.where}")
        files.write_text(run / STATE, json.dumps(known) + "\n")

    def step(self, metrics: dict[str, Any]) -> None:
        numbers = {key: float(value) for key, value in metrics.items() if _is_number(value) and key != "step"}
        self._each(lambda tracker: tracker.log(metrics["step"], numbers), metrics["step"])

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._each(lambda tracker: tracker.sample(step, prompt, text), step)

    def checkpoint(self, path: Path) -> None:
        self._each(lambda tracker: tracker.flush())

    def note(self, message: str) -> None:
        pass

    def _each(self, call: Callable[[Tracker], None], step: int | None = None) -> None:
        for name, tracker in list(self._active.items()):
            if step is None or step > tracker.sent:
                self._guarded(name, functools.partial(call, tracker))

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        """The call's result, or None and a note where the backend fails, whatever it raises."""
        try:
            return call()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            self._active.pop(name, None)
            self._note(f"{name} failed and is left out from here on ({type(error).__name__}: {reason})")
            return None


def _installed(module: str) -> bool:
    """Whether a module can be imported. A folder without code does not count, such as ./wandb with old runs in it."""
    try:
        return importlib.import_module(module).__file__ is not None
    except ImportError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_state(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def _fenced(text: str) -> str:
    """Text as a Markdown block that shows it as it is."""
    return "\n".join("    " + line for line in text.splitlines())


def _no_output() -> contextlib.AbstractContextManager[Any]:
    """trackio prints, and standard output belongs to results."""
    return contextlib.redirect_stdout(io.StringIO())

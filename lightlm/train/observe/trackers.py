"""Backends of experiment tracking beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

A backend receives the numbers of metrics.jsonl, the samples, and the resolved recipe as its configuration. One that
fails is noted once and dropped; training continues. Its package is imported only if a recipe names it.

To add a backend, write a `Tracker` and enter it in `BACKENDS`; `TrackingSection.backends` lists the names.
"""

import contextlib
import html
import importlib
import io
import json
import math
import secrets
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lightlm import files
from lightlm.errors import RecipeError, how_to_install
from lightlm.recipe import TrackingSection
from lightlm.runs import RECIPE
from lightlm.train.observe.observers import Observer

STATE = "tracking.json"  # in the run folder: each backend's id of the run, and `_LOGGED`
_LOGGED = "logged_step"


@dataclass(frozen=True)
class Session:
    """What a backend needs to start or resume a run."""

    run: Path
    recipe: dict[str, Any]  # resolved
    project: str
    known: str | None  # the backend's id of a resumed run
    first_step: int  # the checkpoint's step; 0 for a new run
    logged_step: int  # the last step ever logged; after a kill it is later than `first_step`


class Tracker:
    """One backend's connection to a run. Any method may raise."""

    package: ClassVar[str]  # the module to import
    id: str  # the backend's name of the run
    where: str  # how to view the run, for a note
    sent: int  # the backend already has the steps up to this one

    def __init__(self, session: Session) -> None: ...
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def sample(self, step: int, prompt: str, text: str) -> None: ...
    def finish(self, failed: bool) -> None: ...

    def flush(self) -> None:
        """Store what was logged: a checkpoint is complete, so these steps are not logged again."""


class TensorBoard(Tracker):
    """Event files in `<run>/tensorboard`."""

    package = "torch.utils.tensorboard"

    def __init__(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # The writer's first event lets TensorBoard drop the steps after the checkpoint.
        purge = session.first_step + 1 if session.known else None
        self._writer: Any = SummaryWriter(str(session.run / "tensorboard"), purge_step=purge)
        self.id, self.where, self.sent = "tensorboard", f"tensorboard --logdir {session.run.parent}", -1
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


class WandB(Tracker):
    """A Weights & Biases run in `<run>/wandb`, which obeys WANDB_MODE, WANDB_ENTITY and its other variables."""

    package = "wandb"

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
        # The server knows which steps it has; for an offline run only our own file does.
        self.sent = self._run.starting_step - 1 if self._run.resumed else session.logged_step if session.known else -1
        offline = f"offline; wandb sync --append {session.run / 'wandb'}/offline-run-*"
        self.where = offline if self._run.offline else str(self._run.url)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        import wandb

        self._run.log({"sample": wandb.Html(f"<pre>{html.escape(prompt + text)}</pre>")}, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class Trackio(Tracker):
    """A trackio run in trackio's own folder, where its dashboard compares runs.

    It obeys TRACKIO_DIR, TRACKIO_SPACE_ID and its other variables.
    """

    package = "trackio"

    def __init__(self, session: Session) -> None:
        import trackio

        # trackio resumes the latest run of a name, and a project holds those of all folders.
        self.id = session.known or f"{session.run.name}-{secrets.token_hex(2)}"
        resume = "allow" if session.known else "never"
        with _no_output():
            self._run: Any = trackio.init(session.project, self.id, config=session.recipe, resume=resume, embed=False)
        self.where = f"{self.id}, trackio show --project {session.project}"
        self.sent = session.logged_step if session.known else -1

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        import trackio

        self._run.log({"sample": trackio.Markdown(_fenced(prompt + text))}, step=step)

    def finish(self, failed: bool) -> None:
        import trackio

        with _no_output():
            trackio.finish()


BACKENDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


class Trackers(Observer, contextlib.AbstractContextManager["Trackers"]):
    """An `Observer` that sends a run's numbers to the backends of its recipe, and a context manager that closes them.

    `note` receives where to view the run, and each backend's failure.

    Raises:
        RecipeError: a backend's package is not installed.
    """

    def __init__(self, section: TrackingSection, note: Callable[[str], None]) -> None:
        self._section, self._note = section, note
        self._active: dict[str, Tracker] = {}
        self._flush_step = False
        if missing := [name for name in section.backends if not _installed(BACKENDS[name].package)]:
            raise RecipeError(
                f"tracking.backends: {', '.join(missing)} cannot be imported here; leave the name out "
                f"(metrics.jsonl is always written), or {how_to_install('tracking')}"
            )

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._each(lambda tracker: tracker.finish(failed=kind is not None))
        self._active = {}

    def start(self, facts: dict[str, Any]) -> None:
        if not self._section.backends:
            return
        run = Path(facts["run"])
        recipe = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads((run / STATE).read_text(encoding="utf-8"))
        # The maximum, since metrics.jsonl is cut: a resumed run may be killed again before it reaches that step.
        known[_LOGGED] = logged = max(known.get(_LOGGED, 0), facts["logged_step"])
        for name in self._section.backends:
            session = Session(run, recipe, self._section.project, known.get(name), facts["first_step"], logged)
            with self._guarded(name):
                self._active[name] = tracker = BACKENDS[name](session)
                known[name] = tracker.id
                self._note(f"{name}: {tracker.where}")
        files.write_text(run / STATE, json.dumps(known) + "\n")

    def initial(self, metrics: dict[str, Any]) -> None:
        self.step(metrics)

    def step(self, metrics: dict[str, Any]) -> None:
        scalars = {key: value for key, value in metrics.items() if isinstance(value, int | float) and key != "step"}
        numbers = {key: float(value) for key, value in scalars.items() if math.isfinite(value)}
        self._each(lambda tracker: tracker.log(metrics["step"], numbers), metrics["step"])
        if self._flush_step:
            self._flush_step = False
            self._each(lambda tracker: tracker.flush())

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._each(lambda tracker: tracker.sample(step, prompt, text), step)

    def checkpoint(self, path: Path) -> None:
        self._each(lambda tracker: tracker.flush())
        self._flush_step = True  # a step is saved before its evaluation and its metrics

    def _each(self, call: Callable[[Tracker], None], step: int | None = None) -> None:
        for name, tracker in list(self._active.items()):
            if step is None or step > tracker.sent:
                with self._guarded(name):
                    call(tracker)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Note whatever the block raises, and drop the backend."""
        try:
            yield
        except Exception as error:
            self._active.pop(name, None)
            reason = str(error).strip().partition("\n")[0]
            self._note(f"{name} failed and is dropped ({type(error).__name__}: {reason})")


def _installed(module: str) -> bool:
    """Return whether a module with code can be imported; a folder of old runs such as ./wandb does not count."""
    try:
        return importlib.import_module(module).__file__ is not None
    except ImportError:
        return False


def _fenced(text: str) -> str:
    """Return the text as a Markdown code block."""
    return textwrap.indent(text, "    ", lambda line: True)


def _no_output() -> contextlib.AbstractContextManager[Any]:
    """Suppress what trackio prints: standard output is for results."""
    return contextlib.redirect_stdout(io.StringIO())

"""An observer that remembers, and a run started the way `lightlm train` starts it."""

import os
import signal
from pathlib import Path

from lightlm.recipe import load_recipe
from lightlm.runs import require_free, run_folder
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.observe.metrics import MEASURED
from lightlm.train.observe.observers import Observer
from lightlm.train.setup import open_data, set_up
from lightlm.train.trainer import Result, Trainer


def comparable(metrics):
    """What must not depend on interruptions and machines: all but times and memory."""
    return [{key: value for key, value in m.items() if key not in MEASURED} for m in metrics]


class Recorder(Observer):
    """Keeps every event; sends this process SIGTERM at a chosen step."""

    def __init__(self, terminate_at: int | None = None) -> None:
        self.terminate_at = terminate_at
        self.facts, self.metrics, self.samples, self.saved, self.notes = {}, [], [], [], []
        self.phases = []  # names, in order

    def start(self, facts):
        self.facts = facts

    def initial(self, metrics):
        self.step(metrics)

    def step(self, metrics):
        self.metrics.append(metrics)
        if metrics["step"] == self.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def sample(self, step, prompt, text):
        self.samples.append((step, prompt, text))

    def checkpoint(self, path: Path):
        self.saved.append(path.name)

    def phase(self, name, share=None):
        if name and share is None:
            self.phases.append(name)

    def note(self, message):
        self.notes.append(message)


def empty_run(name) -> Path:
    """The folder of a new run, without the lock that `lightlm train` holds."""
    path = run_folder(name)
    require_free(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def make_trainer(recipe, run, watch, sampler=lambda *_: "", checkpoint=None, world=None, evaluator=None) -> Trainer:
    """A trainer as `lightlm train` makes it. `run`: its folder, or the name of a new one."""
    setup = set_up(recipe, open_data(recipe), watch.note, world, checkpoint)
    folder = setup.world.from_writer(lambda: empty_run(run)) if isinstance(run, str) else run
    return Trainer(setup, folder, watch, sampler, evaluator)


def start(
    recipe: str = "tiny.yaml", *overrides: str, name: str, watch: Recorder | None = None
) -> tuple[Result, Recorder]:
    watch = watch or Recorder()
    parsed = load_recipe(recipe, overrides)
    return make_trainer(parsed, name, watch, lambda *_: "...").train(), watch


def resume(reference: str, *overrides: str, watch: Recorder | None = None) -> tuple[Result, Recorder]:
    watch = watch or Recorder()
    recipe, run, checkpoint = reopen_run(reference, overrides, watch.note)
    return make_trainer(recipe, run, watch, lambda *_: "...", checkpoint).train(), watch

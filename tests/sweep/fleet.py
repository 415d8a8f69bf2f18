"""Runs of a sweep that take no time: they write what `lightlm train` would, on a clock of their own."""

import json
import signal
from pathlib import Path

import yaml

from lightlm.convert.load import find_start
from lightlm.errors import TrainingDivergedError
from lightlm.recipe import Recipe, load_recipe
from lightlm.sweep.folder import SweepFolder

TOKENS = 1000


class Fleet:
    """Starts fake processes. `seconds`, `codes` and `losses` say how the run of a cell goes; the rest is recorded."""

    def __init__(self, seconds=None, codes=None, losses=None):
        self.seconds, self.codes, self.losses = seconds or {}, codes or {}, losses or {}
        self.now = 0.0
        self.started: list[str] = []  # "new NAME" or "resume NAME"
        self.running: list[Process] = []
        self.most_at_a_time = 0
        self.environments: list[dict[str, str]] = []
        self.arguments: list[list[str]] = []
        self.at = {}  # what to do once at a time of the clock

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for time in [time for time in self.at if time <= self.now]:
            self.at.pop(time)()

    def start(self, arguments, environment, log: Path):
        assert arguments[0] == "train"
        log.parent.mkdir(parents=True, exist_ok=True)
        options = dict(
            argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument
        )
        run = Path(options["resume"]) if "resume" in options else Path(options["runs-dir"]) / options["name"]
        assert run.is_dir() == ("resume" in options)
        self.started.append(f"{'resume' if 'resume' in options else 'new'} {run.name}")
        self.arguments.append(arguments)
        self.environments.append(dict(environment))
        process = Process(self, run, log)
        self.running.append(process)
        self.most_at_a_time = max(self.most_at_a_time, len(self.running))
        return process


class Process:
    def __init__(self, fleet: Fleet, run: Path, log: Path):
        self.fleet, self.run, self.log = fleet, run, log
        self.began, self.signals = fleet.now, []
        before = self._seen()
        self.share = before / TOKENS
        self.takes = fleet.seconds.get(run.name, 10.0) * (1 - self.share)
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(yaml.safe_dump({"train": {"tokens": TOKENS}}))
        (run / "metrics.jsonl").touch()

    def _seen(self):
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["tokens"] if lines else 0

    def _write(self, tokens, **more):
        row = {"step": tokens, "tokens": tokens, "seconds": tokens / 100.0, "loss": 3.0, **more}
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def poll(self):
        if self not in self.fleet.running:
            return self.code
        done = min(self.share + (self.fleet.now - self.began) / self.takes * (1 - self.share), 1.0)
        tokens = int(done * TOKENS)
        if self.signals:
            self._write(tokens)
            return self._end(130)
        if done < 1:
            if tokens > self._seen():
                self._write(tokens)
            return None
        code = self.fleet.codes.get(self.run.name, 0)
        if code:
            problem = "training diverged" if code == TrainingDivergedError.exit_code else "no room"
            self.log.write_text(f"Note: before\nError: {problem} at step 8;\ntry something else\n")
        else:
            self._write(TOKENS, val_loss=self.fleet.losses.get(self.run.name, 2.0))
        return self._end(code)

    def _end(self, code):
        self.code = code
        self.fleet.running.remove(self)
        return code

    def send_signal(self, number):
        self.signals.append(number)

    def kill(self):
        self.signals.append(getattr(signal, "SIGKILL", "kill"))


def recipe_of(arguments: list[str]) -> Recipe:
    """The recipe that a new run was started with, as `lightlm train` reads it."""
    overrides = [argument for argument in arguments[2:] if not argument.startswith("--")]
    return load_recipe(arguments[1], overrides, find_start=find_start)


def folder(path: Path) -> SweepFolder:
    made = SweepFolder(path)
    made.runs.mkdir(parents=True)
    return made

"""Training processes that die by SIGKILL until their run is complete.

Two kinds of process, both `lightlm train` with real files: one of its own (`python -m lightlm`, seconds until torch is
imported), and a fork of a server that has imported torch. Three kinds of death: at a random moment; while a checkpoint
is being written; and just before a random operation on a file or folder (making, opening to write, renaming, deleting,
linking), in whichever thread it happens.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.cli.app import main
from tests.train.watch import comparable

REMOVALS = ("os.rename", "os.remove", "os.rmdir")  # about ten a save: the folder, the pointer, the pruned checkpoint
OPERATIONS = (*REMOVALS, "os.mkdir", "os.symlink", "open")  # about thirty
# 24 steps, a checkpoint every 2, a milestone every 8, validation every 3. The optimizer has all kinds of state.
RECIPE = (
    "tiny.yaml",
    "optimizer={name: normuon, lr: 1e-2, momentum_start: 0.85, momentum_end: 0.9, beta2_half_life: 2K}",
    "schedule.weight_decay=cosine",
    "data.stages=[{until: 55%, mix: {tiny: 0.7, twin: 0.3}}, {mix: {twin: 2, tiny: 1}}]",
    "data.shift_windows=true",
    "train.tokens=6144",
    "checkpoint.every=512",
    "checkpoint.keep_every=2048",
    "eval.every=768",
    "checkpoint.keep_best=true",
    "train.ema=25%",
    "train.dropout=0.1",
    "train.mtp={depth: 1}",
)


def _die_at(number: int, operations: tuple[str, ...], report: Path) -> None:
    """SIGKILL this process just before its `number`-th of these operations, and say in `report` which that was."""
    count, lock = 0, threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in operations or (event == "open" and not _writes(*arguments)):
            return
        with lock:
            count += 1
            if count == number:
                number_of_file = os.open(report, os.O_WRONLY | os.O_APPEND)
                os.write(number_of_file, f"{event} {arguments[0]} in {threading.current_thread().name}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _writes(path: Any, mode: Any, flags: int) -> bool:
    return "runs/" in str(path) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _forked(arguments: list[str], folder: Path, log: Path, death: str, number: int, report: Path) -> None:
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["lightlm", *arguments]
    if death in ("operation", "removal"):
        _die_at(number, OPERATIONS if death == "operation" else REMOVALS, report)
    main()


@dataclass
class Harness:
    """Starts and kills the processes of runs in `folder`, which holds tiny.yaml and its data."""

    folder: Path
    seed: int
    landed: list[str] = field(default_factory=list)  # what each kill hit

    def __post_init__(self) -> None:
        shutil.copytree(self.folder / "data/tiny", self.folder / "data/twin", dirs_exist_ok=True)
        self._random = random.Random(self.seed)
        self._deck: list[str] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lightlm.train.trainer", "lightlm.cli.app", "lightlm.generate.engine"])

    def complete(self, name: str, kills: int, *, forked: bool = True) -> None:
        """Repeat one command, killing up to `kills` of its processes, until the run is complete."""
        newest = -1
        for life in range(kills + 1):
            if self._live(
                ["train", *RECIPE, "--name", name, "--auto-resume"], name, doomed=life < kills, forked=forked
            ):
                return
            newest = self._check(name, newest)
        raise AssertionError(f"{name} did not complete")

    def _live(self, arguments: list[str], name: str, *, doomed: bool, forked: bool) -> bool:
        """One process; whether it came to its end."""
        death = self._death(forked=forked) if doomed else "none"
        number = self._random.randrange(1, 120 if death == "operation" else 40)
        report = self.folder / "report"
        report.write_text("")
        with self._process(arguments, death, number, report, forked=forked) as (process, alive):
            if death == "moment":
                self._wait(self._random.uniform(0, 1.2 if forked else 5.0), alive)
            elif death == "saving":
                self._await_save(name, self._random.randrange(1, 5), alive)
                self._wait(self._random.uniform(0, 0.1), alive)
            if death in ("moment", "saving") and alive():
                os.kill(process, signal.SIGKILL)
            while alive():
                time.sleep(0.002)
            code = alive.code()
        if code == -signal.SIGKILL:
            hit = report.read_text() or f"{death} {'forked' if forked else 'own process'}"
            self.landed.append(f"{name}: {hit}; step {self._step(name)}, {self._left(name)}")
            return False
        assert code == 0, (self.folder / "log").read_text()
        return True

    @contextlib.contextmanager
    def _process(self, arguments: list[str], death: str, number: int, report: Path, *, forked: bool) -> Iterator[Any]:
        log = self.folder / "log"
        if forked:
            child = self._context.Process(target=_forked, args=(arguments, self.folder, log, death, number, report))
            child.start()
            yield child.pid, _Alive(lambda: child.exitcode)
            child.join()
            return
        with log.open("a") as file:
            command = [sys.executable, "-m", "lightlm", *arguments]
            own = subprocess.Popen(command, cwd=self.folder, stdout=file, stderr=file, start_new_session=True)
            yield own.pid, _Alive(own.poll)
            own.wait()

    def _death(self, *, forked: bool) -> str:
        """Kinds in random order, but each equally often; operations can be counted in forks only."""
        if not self._deck:
            self._deck = ["moment", "saving", "operation", "removal"]
            self._random.shuffle(self._deck)
        death = self._deck.pop()
        return death if forked or death in ("moment", "saving") else "saving"

    def _await_save(self, name: str, number: int, alive: "_Alive") -> None:
        """Until the process writes its `number`-th checkpoint; one that a process before left does not count."""
        folder = self.folder / "runs" / name / "checkpoints"
        seen = {path.stat().st_ino for path in folder.glob(".step_*.partial")}
        while alive() and number:
            for path in folder.glob(".step_*.partial"):
                with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
                    if (inode := path.stat().st_ino) not in seen:
                        seen.add(inode)
                        number -= 1
            time.sleep(0.0005)

    @staticmethod
    def _wait(seconds: float, alive: "_Alive") -> None:
        until = time.perf_counter() + seconds
        while alive() and time.perf_counter() < until:
            time.sleep(0.0005)

    def _step(self, name: str) -> int:
        path = self.folder / "runs" / name / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _left(self, name: str) -> str:
        left = sorted(path.name for path in (self.folder / "runs" / name).glob("**/.*"))
        return f"left {', '.join(left)}" if left else "nothing half done"

    def _check(self, name: str, newest: int) -> int:
        """After a kill every complete checkpoint is whole, and the newest is not older than before."""
        complete = checkpoint.checkpoints(self.folder / "runs" / name)
        for path in complete:
            checkpoint.check(path)
        best = self.folder / "runs" / name / "checkpoints" / checkpoint.BEST
        assert not best.is_symlink() or (best / "complete.json").is_file(), f"{best} leads to no checkpoint"
        step = int(complete[-1].name.removeprefix("step_")) if complete else -1
        assert step >= newest, f"{name} lost its checkpoint of step {newest}: {complete}"
        return step


class _Alive:
    """Whether a process runs still, and then its exit code."""

    def __init__(self, poll: Any) -> None:
        self._poll = poll

    def __call__(self) -> bool:
        return self._poll() is None

    def code(self) -> int:
        return self._poll()


def differences(run: Path, whole: Path) -> list[str]:
    """What distinguishes a run from an uninterrupted one, times apart."""
    found = []
    for where in ("checkpoints", "samples"):
        first, second = (sorted(path.name for path in (folder / where).iterdir()) for folder in (run, whole))
        if first != second:
            found.append(f"{where}: {first} instead of {second}")
    for path in checkpoint.checkpoints(whole):
        ours = run / "checkpoints" / path.name
        pairs = [
            (
                {file.name: load_file(file) for file in folder.glob("*.safetensors")},
                torch.load(folder / "training_state.pt", weights_only=True),
            )
            for folder in (ours, path)
        ]
        for _, state in pairs:
            del state["progress"]["seconds"], state["recipe"]
            [state["progress"]["row"]] = comparable([state["progress"]["row"]])
        found += [f"{path.name}{place}" for place in _unequal(*pairs, "")]
    for sample in (whole / "samples").iterdir():
        if sample.read_text() != (run / "samples" / sample.name).read_text():
            found.append(sample.name)
    first, second = ((folder / "checkpoints" / checkpoint.BEST).resolve().name for folder in (run, whole))
    if first != second:
        found.append(f"best is {first} instead of {second}")
    lines, expected = (_metrics(folder) for folder in (run, whole))
    if [m["step"] for m in lines] != [m["step"] for m in expected]:
        found.append(f"metrics of steps {[m['step'] for m in lines]}")
    found += [f"metrics {a} instead of {b}" for a, b in zip(lines, expected, strict=False) if a != b]
    return found


def _metrics(run: Path) -> list[dict[str, Any]]:
    """Every line, which must be whole, without times."""
    return comparable(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())


def _unequal(first: Any, second: Any, place: str) -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [problem for key in first for problem in _unequal(first[key], second[key], f"{place}/{key}")]
    if isinstance(first, tuple):
        return [
            p for index, pair in enumerate(zip(first, second, strict=True)) for p in _unequal(*pair, f"{place}/{index}")
        ]
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [place]

"""Processes for tests: training functions in forked gloo groups, and the real command in processes of its own."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from lightlm.recipe import load_recipe
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.distributed import RENDEZVOUS, join_world
from tests.train.watch import Recorder, make_trainer

# A server that has imported torch forks each process in milliseconds; the test's own process may not fork, since
# autograd's threads do not survive it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightlm.train.trainer", "lightlm.train.step.parallel", "torch.distributed.fsdp"])


def together(size, action, *arguments):
    """What `action(world, *arguments)` returns in each of `size` processes, in the order of ranks."""
    folder = tempfile.TemporaryDirectory()
    meeting = Path(folder.name) / "meet"
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        environment = {"RANK": str(rank), "WORLD_SIZE": str(size), RENDEZVOUS: meeting.as_uri()}
        process = _context.Process(target=_member, args=(sender, os.getcwd(), environment, action, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        outcomes = [pipe.recv() if pipe.poll(120) else (None, "no answer") for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
        folder.cleanup()
    assert not any(error for _, error in outcomes), "\n".join(str(error) for _, error in outcomes)
    return [value for value, _ in outcomes]


def _member(sender, folder, environment, action, arguments):
    os.chdir(folder)
    os.environ.update(environment)
    try:
        with join_world() as world:
            sender.send((action(world, *arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def train_together(world, name, overrides=(), stop_at=None, stop_rank=0, resumed=False):
    """A run like `lightlm train`'s, in one of its processes: (its metrics, notes, whether it was interrupted)."""
    watch = Recorder()
    run = checkpoint = None
    if resumed:
        recipe, run, checkpoint = world.from_writer(lambda: reopen_run(name, overrides))
    else:
        recipe = load_recipe("tiny.yaml", overrides)
    trainer = make_trainer(recipe, run or name, watch, lambda *_: "...", checkpoint, world)
    plain = trainer.setup.loader.batch

    def batch(start, count):
        if trainer.progress.step == stop_at and world.rank == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(start, count)

    trainer.setup.loader.batch = batch
    result = trainer.train()
    return watch.metrics, watch.notes, result.interrupted


def run_together(world, make_recipe, name, *overrides):
    """A new run of `make_recipe(*overrides)` in one of its processes: its metrics."""
    watch = Recorder()
    make_trainer(world.from_writer(lambda: make_recipe(*overrides)), name, watch, world=world).train()
    return watch.metrics


class Command:
    """`lightlm train` (or torchrun's) in a session of its own."""

    def __init__(self, *arguments, torchrun=None):
        start = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
        command = [sys.executable, *start, "-m", "lightlm", "train", *arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def await_steps(self, metrics, count):
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < count:
            assert self._process.poll() is None, self._process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def signal_rank(self, rank, number):
        os.kill(_worker(self._process.pid, rank), number)

    def signal_launcher(self, number):
        self._process.send_signal(number)

    def signal_all(self, number):
        os.killpg(self._process.pid, number)

    def finish(self):
        """(exit code, standard output, standard error)"""
        try:
            out, err = self._process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        return self._process.returncode, out, err


def _worker(parent, rank):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # it ended in this moment
            continue
    raise AssertionError(f"no process of rank {rank}")

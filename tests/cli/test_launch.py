"""How the launcher passes signals on; `tests/train/test_distributed.py` launches real processes."""

import os
import signal
import subprocess
import sys

import pytest

from lightlm.cli import launch


class Worker:
    """A process that ends with `code` after a few looks at it, unless it is ended before."""

    def __init__(self, code=0, looks=3):
        self.code, self.looks, self.received = code, looks, []

    def poll(self):
        self.looks -= 1
        return self.code if self.looks < 0 else None

    def terminate(self):
        self.received.append("terminate")

    def kill(self):
        self.received.append("kill")


@pytest.fixture
def group(monkeypatch):
    workers = [Worker(130), Worker(130)]
    remaining = list(workers)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: remaining.pop(0))
    started = launch._Group(["train"], 2, {})
    return started, workers


SIGNALS = [signal.SIGINT, signal.SIGTERM, *([] if os.name == "nt" else [signal.SIGHUP])]


@pytest.mark.parametrize("number", SIGNALS)
def test_any_signal_to_end_asks_the_workers_to_save(group, monkeypatch, number):
    monkeypatch.setattr(launch, "_WORKERS_ARE_TOLD", False)
    started, workers = group
    monkeypatch.setattr(launch.time, "sleep", lambda _: started.interrupts or signal.raise_signal(number))
    assert started.wait() == (0, 130)
    assert [worker.received for worker in workers] == [["terminate"], ["terminate"]]


def test_processes_share_the_cores_and_a_single_one_follows_its_recipe(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "cores", lambda: 8)
    threads = [launch._environment(count, 0, tmp_path).get("OMP_NUM_THREADS") for count in (1, 2, 16)]
    assert threads == [None, "4", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch._environment(2, 0, tmp_path)["OMP_NUM_THREADS"] == "3"


@pytest.mark.skipif(os.name == "nt", reason="torch decodes the address on Windows only")
def test_processes_meet_in_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "pbs.123[4] für"
    address = launch._environment(2, 0, folder)[launch._RENDEZVOUS]
    assert address.removeprefix("file://") == str(folder / "rendezvous")


def test_windows_workers_that_save_are_not_killed(group, monkeypatch):
    """There Ctrl-C reaches them too, and `terminate` would end them at once."""
    monkeypatch.setattr(launch, "_WORKERS_ARE_TOLD", True)
    started, workers = group
    monkeypatch.setattr(launch.time, "sleep", lambda _: started.interrupts or signal.raise_signal(signal.SIGINT))
    assert started.wait() == (0, 130)
    assert [worker.received for worker in workers] == [[], []]
    started._interrupt(signal.SIGINT, None)  # a second Ctrl-C
    assert [worker.received for worker in workers] == [["kill"], ["kill"]]


def test_a_connection_that_no_ended_process_explains_is_explained(monkeypatch, capfd):
    """Such as NCCL's in a container whose /dev/shm is too small: all processes lose each other, and none is killed."""
    code = """
from types import SimpleNamespace
from lightlm.cli.launch import report_once
from lightlm.errors import LightLMError

class LostError(LightLMError):
    exit_code = 75

with report_once(SimpleNamespace(size=2, first=lambda event: True)):
    raise LostError("lost") from RuntimeError("NCCL error: no room for /dev/shm/nccl-abc")
"""
    monkeypatch.setattr(launch, "python_command", lambda *_: [sys.executable, "-c", code])
    assert launch.launch(["train"], ["train"], 2, 0) == 1
    shown = capfd.readouterr().err
    assert "lost its connection to the others: NCCL error: no room for /dev/shm/nccl-abc; " in shown
    assert shown.count("NCCL") == 1

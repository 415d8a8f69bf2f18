"""The precision and the threads that a CPU is best at."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from lightlm import cpu, device, processes


@pytest.fixture(autouse=True)
def _forget():
    yield
    cpu.gain.cache_clear()


def pretend(monkeypatch, seconds, busy=lambda index: 0.0):
    """Let products take these seconds by precision; `busy` adds what another process takes at the nth product."""
    now, calls = [0.0], itertools.count()

    def products(dtype, *shapes):
        def run():
            now[0] += seconds[dtype] + busy(next(calls))

        return run

    monkeypatch.setattr(cpu, "_products", products)
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now[0])
    cpu.gain.cache_clear()
    return calls


@pytest.mark.parametrize(
    ("float32", "bfloat16", "faster"),
    [
        (4.0, 1.0, torch.bfloat16),  # AMX, or AVX512-BF16 on AMD
        (0.55, 1.0, torch.float32),  # AVX512-BF16 without AMX on a Xeon
        (1.0, 1.0, torch.float32),  # a draw
    ],
)
def test_auto_takes_the_faster_precision(monkeypatch, float32, bfloat16, faster):
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    pretend(monkeypatch, seconds)
    assert device.pick_dtype("auto", torch.device("cpu"), 64) == faster
    pretend(monkeypatch, seconds, busy=lambda index: 10.0 if index in (0, 3, 4, 5, 8) else 0.0)
    assert device.pick_dtype("auto", torch.device("cpu"), 64) == faster, "a busy core decided"
    pretend(monkeypatch, seconds, busy=lambda index: 1000.0 if index in (3, 5) else 0.0)  # bf16's first two timed calls
    assert device.pick_dtype("auto", torch.device("cpu"), 64) == faster, "two interrupted calls decided"


def test_a_cpu_without_bf16_is_asked_once(monkeypatch):
    calls = pretend(monkeypatch, {torch.float32: 1.0, torch.bfloat16: 100.0})
    assert device.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert next(calls) <= 8, "the slow products were repeated"
    assert device.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert next(calls) <= 9, "the answer was not kept"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_named_precision_that_is_slow_is_noted(monkeypatch, name):
    where, notes = torch.device("cpu"), []
    pretend(monkeypatch, {torch.float32: 1.0, getattr(torch, name): 8.0})
    assert device.pick_dtype(name, where, 64, notes.append) == getattr(torch, name)
    assert notes == [f"{name}: products take 8.0 times as long as in float32 on this CPU; float32 or auto is faster"]
    pretend(monkeypatch, {torch.float32: 1.0, getattr(torch, name): 1.2})
    device.training_dtype(name, where, 64, notes.append)
    assert len(notes) == 1, "near a draw there is nothing to gain"
    calls = pretend(monkeypatch, {})
    device.pick_dtype("float32", where, 64, notes.append)
    device.pick_dtype(name, where, 64)
    assert next(calls) == 0, "products were measured that nobody asks for"


def test_this_cpu_answers():
    assert cpu.gain(torch.bfloat16, 64) > 0


class FakeThreads:
    """A CPU on which a layer takes `seconds(threads)`; its clock only moves while it computes."""

    def __init__(self, monkeypatch, seconds, cores):
        self.now, self.threads, self.used = 0.0, cores, []
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(cpu, "_layer", lambda width: self._compute)
        monkeypatch.setattr(cpu, "cores", lambda: cores)
        monkeypatch.setattr(cpu.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", self._set)
        self._seconds = seconds

    def _set(self, threads):
        self.threads = threads

    def _compute(self):
        self.used.append(self.threads)
        self.now += self._seconds(self.threads)


def idle(count):
    return 0.02 / count


def one_core_taken(count):
    """Threads of two cores wait for the one that shares its core."""
    return 0.02 if count == 1 else 0.06 / count


@pytest.mark.parametrize(
    ("cores", "seconds", "chosen"),
    [
        (1, idle, 1),
        (2, idle, 2),
        (8, idle, 8),
        (2, one_core_taken, 1),
        (2, lambda count: 0.02 / (1 + 0.05 * count), 2),  # a draw
        (16, lambda count: 0.02 / count if count < 16 else 0.1, 15),
    ],
)
def test_threads_are_as_many_as_are_fastest(monkeypatch, cores, seconds, chosen):
    machine, notes = FakeThreads(monkeypatch, seconds, cores), []
    assert cpu.use_threads("auto", notes.append) == machine.threads == chosen
    assert bool(notes) == (chosen < cores), notes
    assert all(f"{chosen} of {cores} threads" in note for note in notes)


def test_threads_are_no_more_than_a_limit_on_the_time_allows(monkeypatch):
    machine = FakeThreads(monkeypatch, idle, 8)  # of which a container gives the time of two
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    assert cpu.use_threads("auto", lambda note: None) == machine.threads == 2
    assert cpu.use_threads(2, lambda note: None) == 2, "what was chosen holds when the run resumes"


def test_a_recorded_number_of_threads_is_used_without_measuring(monkeypatch):
    machine, notes = FakeThreads(monkeypatch, one_core_taken, 4), []
    assert cpu.use_threads(3, notes.append) == machine.threads == 3
    assert not notes
    assert not machine.used


def test_more_threads_than_cores_are_chosen_anew(monkeypatch):
    machine, notes = FakeThreads(monkeypatch, idle, 2), []
    assert cpu.use_threads(8, notes.append) == machine.threads == 2
    assert "train.threads=8 exceeds the 2 cores" in notes[0]


def test_the_users_number_of_threads_wins(monkeypatch):
    machine, notes = FakeThreads(monkeypatch, one_core_taken, 2), []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cpu.use_threads("auto", notes.append) == 2
    assert not notes
    assert cpu.use_threads(1, notes.append) == 2
    assert "OMP_NUM_THREADS sets 2 threads, not train.threads=1" in notes[0]
    assert not machine.used


def test_measuring_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    with cpu.restored_threads():
        assert cpu.fastest_threads(2, 16, slices=1) in (1, 2)
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_waiting_threads_sleep_early_unless_told_otherwise(given, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    processes.bound_spinning()
    assert int(os.environ.get("GOMP_SPINCOUNT", 0)) == (7 if "GOMP_SPINCOUNT" in given else 0 if given else 3000)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


def test_the_command_line_bounds_spinning_before_torch_starts():
    code = "import sys; sys.argv = ['lightlm', '--version']\nfrom lightlm.cli.app import main\n" + (
        "try: main()\nexcept SystemExit: pass\nimport os; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "3000 False"

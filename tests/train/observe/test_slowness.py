"""When steps count as slow, and the cause that is named; the machine's counters are made up."""

import dataclasses

import pytest
import torch

from lightlm.train.observe.slowness import Counters, SlowSteps, read_counters

CPU = torch.device("cpu")


class Machine:
    """Counters that grow at chosen rates per second; time passes by steps."""

    def __init__(self, **rates):
        self.now = Counters(0.0, 2, 0.0, busy=0.0, stolen=0.0, page_ins=0, load=2.0)
        self.rates = {"own": 2.0, "busy": 2.0}

    def pass_time(self, seconds):
        grown = {name: getattr(self.now, name) + rate * seconds for name, rate in self.rates.items()}
        self.now = dataclasses.replace(self.now, seconds=self.now.seconds + seconds, **grown)


def notes(watch, machine, *stretches, batch_tokens=1024, data=0.01):
    """The notes during stretches of (steps, seconds each)."""
    found = []
    for count, seconds in stretches:
        for _ in range(count):
            machine.pass_time(seconds)
            row = {"step_seconds": seconds, "data_seconds": data * seconds, "batch_tokens": batch_tokens}
            found += filter(None, [watch.judge(row)])
    return found


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def watch(machine):
    return SlowSteps(CPU, read=lambda: machine.now)


def test_an_episode_is_noted_once_and_the_next_one_again(watch, machine):
    assert notes(watch, machine, (60, 0.6)) == []
    machine.rates |= {"own": 1.0, "busy": 2.0}
    machine.now = dataclasses.replace(machine.now, load=3.8)
    [note] = notes(watch, machine, (60, 1.9))
    assert note == (
        "steps take 3.2 times as long as before (1.9 s, were 0.6 s): other processes use 1.0 of 2 cores (load 3.8); "
        "stop them; or press Ctrl-C, and resume with OMP_NUM_THREADS=1 lightlm train --resume"
    )
    assert notes(watch, machine, (60, 0.6)) == []
    assert len(notes(watch, machine, (60, 1.9))) == 1


def test_what_is_no_slowdown_is_not_noted(watch, machine):
    """Compiling steps, a few slow steps beside a checkpoint, slower but not much, and larger batches."""
    assert notes(watch, machine, (1, 90), (2, 5), (100, 0.5), (4, 3.0), (100, 0.5), (100, 0.9)) == []
    assert notes(watch, machine, (100, 2.0), batch_tokens=4096) == []
    assert notes(watch, machine, (100, 8.0), batch_tokens=16384) == []


def test_short_steps_are_judged_over_seconds(watch, machine):
    assert notes(watch, machine, (3000, 0.01), (500, 0.015), (3000, 0.01), (100, 0.03), (3000, 0.01)) == []
    assert len(notes(watch, machine, (3000, 0.03))) == 1


@pytest.mark.parametrize(
    ("rates", "data", "device", "cause"),
    [
        ({}, 0.8, "cpu", "they wait for data 80% of the time"),
        ({"page_ins": 5000}, 0.01, "cpu", "the system swaps"),
        ({"own": 1.0, "stolen": 0.9, "busy": 1.0}, 0.01, "cpu", "host of this virtual machine"),
        ({"own": 2.0, "busy": 2.0}, 0.01, "cpu", "hot, saves power or runs on battery"),
        ({"own": 1.0, "busy": 1.1}, 0.01, "cuda", "nvidia-smi"),
    ],
)
def test_the_cause_is_named(machine, rates, data, device, cause):
    watch = SlowSteps(torch.device(device), read=lambda: machine.now)
    notes(watch, machine, (60, 0.6))
    machine.rates |= rates
    [note] = notes(watch, machine, (60, 2.0), data=data)
    assert cause in note
    assert "OMP_NUM_THREADS" not in note


def test_other_processes_of_the_run_are_not_blamed(machine):
    watch = SlowSteps(CPU, 2, lambda: machine.now)
    machine.rates |= {"own": 1.0, "busy": 2.0}
    [note] = notes(watch, machine, (60, 0.6), (60, 2.0))
    assert "other processes" not in note


def test_without_counts_of_cpu_time_the_load_decides(machine):
    machine.rates.pop("busy")
    machine.now = dataclasses.replace(machine.now, busy=None, load=4.1)
    watch = SlowSteps(CPU, read=lambda: machine.now)
    [note] = notes(watch, machine, (60, 0.6), (60, 2.0))
    assert "other processes use the CPU (load 4.1 on 2 cores)" in note


def test_this_machines_counters_can_be_read():
    before, after = read_counters(), read_counters()
    assert after.seconds >= before.seconds
    assert after.cores >= 1
    assert all(getattr(after, name) >= getattr(before, name) for name in ("busy", "own") if getattr(after, name))

"""The precision and the threads that a CPU is best at."""

import itertools

import pytest
import torch

from lightlm import cpu, device


@pytest.fixture(autouse=True)
def _forget():
    yield
    cpu.bf16_gain.cache_clear()


def pretend(monkeypatch, seconds, busy=lambda index: 0.0):
    """Let products take these seconds by precision; `busy` adds what another process takes at the nth product."""
    now, calls = [0.0], itertools.count()

    def products(dtype, *shapes):
        def run():
            now[0] += seconds[dtype] + busy(next(calls))

        return run

    monkeypatch.setattr(cpu, "_products", products)
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now[0])
    cpu.bf16_gain.cache_clear()
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


def test_a_cpu_without_bf16_is_asked_once(monkeypatch):
    calls = pretend(monkeypatch, {torch.float32: 1.0, torch.bfloat16: 100.0})
    assert device.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert next(calls) <= 4, "the slow products were repeated"
    assert device.pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert next(calls) <= 5, "the answer was not kept"


def test_this_cpu_answers():
    assert cpu.bf16_gain(64) > 0

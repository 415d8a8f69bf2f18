"""Signals as a request to stop; `test_distributed.py` and `test_saving.py` send them to real runs."""

import os
import signal
import threading

import pytest

from lightlm.train.signals import interrupted_by_signals, stop_on_signals

needs_hangup = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")


def test_a_second_signal_does_not_wait_for_the_first():
    """A launcher repeats Ctrl-C as SIGTERM, which may interrupt the handler of the Ctrl-C itself."""
    with stop_on_signals(launched=True) as stop:
        handler = signal.getsignal(signal.SIGTERM)
        handler(signal.SIGINT, None)
        assert stop.is_set()
        with stop._cond:  # as if the first handler were still inside `stop.set()`
            second = threading.Thread(target=handler, args=(signal.SIGTERM, None), daemon=True)
            second.start()
            second.join(10)
            assert not second.is_alive()


def test_only_a_second_ctrl_c_interrupts_at_once():
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@needs_hangup
def test_a_closed_terminal_stops_like_sigterm():
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.is_set()


@needs_hangup
def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop, interrupted_by_signals():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


@needs_hangup
def test_a_second_signal_does_not_interrupt_the_cleanup_of_the_first():
    with interrupted_by_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)


def test_windows_ctrl_break_is_one_of_the_signals(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGTERM, raising=False)  # any number that exists here
    handled = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.append(number))
    with stop_on_signals():
        assert handled.count(signal.SIGTERM) == 2

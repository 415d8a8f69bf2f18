"""Signals as a request to stop; `test_distributed.py` and `test_saving.py` send them to real runs."""

import signal
import threading

import pytest

from lightlm.train.signals import stop_on_signals


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

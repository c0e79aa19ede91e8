"""Signals that ask a run to stop are noted; a second Ctrl-C interrupts at once."""

import signal
import threading

import pytest

from lift_fast.train import signals
from lift_fast.train.signals import StopRequests


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_a_request(name):
    before = signal.getsignal(getattr(signal, name))
    with StopRequests() as stop:
        assert stop.requested is None
        signal.raise_signal(getattr(signal, name))
        assert stop.requested == name
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == name  # the first one counts
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_ctrl_c_interrupts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.5  # a launcher passes on what the terminal has sent
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGINT"
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with StopRequests() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, None)]

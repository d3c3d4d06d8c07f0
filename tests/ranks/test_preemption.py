"""Which signals ask a run to stop, and when it ends if there is no time to save."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mythos.errors import PREEMPTED
from mythos.ranks import preemption
from mythos.ranks.preemption import SIGNALS, START_GRACE_S, StopRequest
from tests.cluster import clean_environment

ASK = """
import os, signal, sys
from mythos.ranks.preemption import StopRequest

number = signal.Signals[sys.argv[1]]
signal.signal(number, signal.SIG_IGN if sys.argv[2] == "ignored" else signal.SIG_DFL)
stop = StopRequest()
os.kill(os.getpid(), number)
print(stop.signal_name)
"""


@pytest.mark.parametrize(
    ("name", "on_entry", "heard"),
    [(number.name, "default", number.name) for number in SIGNALS]
    + [
        ("SIGHUP", "ignored", "None"),  # by nohup
        ("SIGINT", "ignored", "None"),  # by a shell that starts a program in the background
        ("SIGUSR1", "ignored", "SIGUSR1"),
    ],
)
def test_the_signals_that_ask_to_stop(name: str, on_entry: str, heard: str) -> None:
    command = [sys.executable, "-c", ASK, name, on_entry]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=clean_environment(), timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, heard), done.stderr


class Clock:
    """A time that passes only in ``sleep``."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.begins_at = float("inf")
        self.stop: StopRequest | None = None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.stop is not None and self.now >= self.begins_at:
            self.stop.has_begun = True


@pytest.mark.parametrize(
    ("name", "begins_after", "grace_s", "ends_after"),
    [
        ("SIGTERM", 8.0, 30.0, 30.0),  # the run begins while the rank waits for the launcher's reason
        ("SIGTERM", 8.0, 5.0, 5.0),
        ("SIGTERM", 0.0, 30.0, 30.0),
        ("SIGTERM", float("inf"), 30.0, START_GRACE_S),
        ("SIGUSR1", 0.0, 30.0, 30.0),
        ("SIGUSR1", 8.0, 30.0, 0.0),
    ],
)
def test_the_grace_time_counts_from_the_signal(
    name: str, begins_after: float, grace_s: float, ends_after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ended, codes = Clock(), threading.Event(), []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def exit_now(exit_code: int) -> None:
        codes.append((exit_code, clock.now))
        ended.set()

    monkeypatch.setattr(preemption, "time", clock)
    monkeypatch.setattr(preemption, "exit_now", exit_now)
    monkeypatch.setattr(preemption, "exit_within", lambda exit_code: None)
    try:
        stop = clock.stop = StopRequest()
        clock.begins_at, stop.has_begun = clock.now + begins_after, begins_after == 0
        asked_at = clock.now
        stop.exit_after(grace_s)
        os.kill(os.getpid(), signal.Signals[name])
        assert ended.wait(60)
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
    ((exit_code, at),) = codes
    assert exit_code == PREEMPTED
    assert at - asked_at == pytest.approx(ends_after, abs=0.2)

"""The watchdog and the log where the disk or the network, too, is in trouble."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.cluster import REPO, clean_environment
from tests.require import lacking

STUCK_DISK = """
    import logging, time
    from mythos.metrics.console import log
    from mythos.train import preemption

    class Stuck(logging.Handler):
        def emit(self, record):
            time.sleep(3600)

    log.addHandler(Stuck())
    log.setLevel(logging.INFO)
    preemption.leave_in_any_case(85, after_s=1.0)
    log.error("this line is never written")
"""
FULL_CONSOLE = """
    from mythos.metrics.console import log, start_logging

    start_logging(None, 0)
    log.error("nobody reads this")
    print("still here")
"""


def python(program: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        env=clean_environment(),
        cwd=REPO,
        **options,  # type: ignore[call-overload]
    )


def test_a_process_whose_log_is_stuck_ends_all_the_same() -> None:
    assert python(STUCK_DISK).returncode == 85


def test_a_console_on_a_full_disk_ends_nothing() -> None:
    if not Path("/dev/full").is_char_device():
        lacking("no /dev/full on this machine")
    with open("/dev/full", "w") as full:
        done = python(FULL_CONSOLE, stderr=full)
    assert (done.returncode, done.stdout) == (0, "still here\n")


def test_a_closed_console_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python(FULL_CONSOLE, stderr=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stdout) == (0, "still here\n")

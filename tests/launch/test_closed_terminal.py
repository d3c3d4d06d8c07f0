"""A terminal that is closed sends SIGHUP to the programs on it, and can no longer be written."""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from mythos.config.load import to_dict
from mythos.run.metrics import read_metrics
from mythos.run.status import read_status
from tests.cluster import clean_environment
from tests.require import require
from tests.tiny import tiny_config

LIMIT_S = 120
MYTHOS = Path(sys.executable).parent / "mythos"


def show_until(closed: threading.Event, controller: int) -> None:
    """Read what the program prints, as a terminal does, until the terminal is closed."""
    with suppress(OSError):
        while not closed.is_set():
            if select.select([controller], [], [], 0.1)[0]:
                os.read(controller, 1 << 16)
    os.close(controller)


def heed_hangup() -> None:
    """As a program in a terminal does, even if these tests were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("prefix", [[], ["nohup"]])
def test_a_run_saves_when_its_terminal_is_closed_unless_started_with_nohup(
    prefix: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    steps = 40 if prefix else 100_000
    config = tiny_config("looped", tiny_data, tmp_path / "run", train__steps=steps, checkpoint__every=100_000)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [require("setsid"), "--ctty", *prefix, MYTHOS, "train", "c.yaml"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=clean_environment() | {"TERM": "xterm"},
        cwd=tmp_path,
        preexec_fn=heed_hangup,
    )
    os.close(terminal)
    closed = threading.Event()
    threading.Thread(target=show_until, args=(closed, controller)).start()
    try:
        until = time.monotonic() + LIMIT_S
        while not any("train/loss" in line for line in read_metrics(tmp_path / "run")):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        closed.set()
        exit_code = process.wait(LIMIT_S)
    finally:
        closed.set()
        process.kill()
    assert exit_code == (0 if prefix else 85)
    status = read_status(tmp_path / "run")
    assert status.state == ("finished" if prefix else "preempted")
    assert status.checkpoint_step == status.step

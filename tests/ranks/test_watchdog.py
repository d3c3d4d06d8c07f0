"""The watchdog and the log when the disk or the network fails, too."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from mythos.ranks.watchdog import Watchdog
from tests.cluster import REPO, clean_environment
from tests.require import missing
from tests.spawn import RankPool

STUCK_DISK = """
    import logging, time
    from mythos.run.console import log
    from mythos.ranks.exits import exit_within

    class Stuck(logging.Handler):
        def emit(self, record):
            time.sleep(3600)

    log.addHandler(Stuck())
    log.setLevel(logging.INFO)
    exit_within(85, after_s=1.0)
    log.error("this line is never written")
"""
FULL_CONSOLE = """
    from mythos.run.console import log, start_logging

    start_logging(None, 0)
    log.error("this line is lost")
    print("still running")
"""


def python(program: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        timeout=100,
        env=clean_environment(),
        cwd=REPO,
        **options,  # type: ignore[call-overload]
    )


def test_a_process_whose_log_blocks_exits_all_the_same() -> None:
    assert python(STUCK_DISK).returncode == 85


def test_a_console_on_a_full_disk_does_not_end_the_process() -> None:
    if not Path("/dev/full").is_char_device():
        missing("no /dev/full on this machine")
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = python(FULL_CONSOLE, stderr=full)
    assert (done.returncode, done.stdout) == (0, "still running\n")


def test_a_closed_console_does_not_end_the_process() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python(FULL_CONSOLE, stderr=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stdout) == (0, "still running\n")


FROZEN = """
    import ctypes, os, time
    from mythos.run.console import start_logging
    from mythos.ranks import group
    from mythos.ranks.watchdog import Watchdog

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    group.start("cpu")
    start_logging(None, 0)

    def library_that_holds_the_lock():
        mutex = (ctypes.c_char * 64)()
        for _ in range(2):  # the second call waits for ever, without releasing the interpreter's lock
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)

    with Watchdog(1.0) as watchdog:
        watchdog.started()
        time.sleep(1)  # so that the watchdog has polled with the new limit
        library_that_holds_the_lock()
"""


def test_a_process_with_a_blocked_interpreter_writes_its_stacks_and_exits(tmp_path: Path) -> None:
    with open(tmp_path / "errors", "w", encoding="utf-8") as errors:
        done = python(FROZEN, stderr=errors)
    assert done.returncode == -signal.SIGKILL
    assert "in library_that_holds_the_lock" in (tmp_path / "errors").read_text(encoding="utf-8")


def work_while_the_others_wait(busy_rank: int) -> bool:
    """One rank makes progress for twice the limit, the others wait for it."""
    with Watchdog(2.0) as watchdog:
        watchdog.started()
        for _ in range(20 if dist.get_rank() == busy_rank else 0):
            time.sleep(0.2)
            watchdog.progress("reading a large file")
        dist.barrier()
    return True


@pytest.mark.parametrize("busy_rank", [0, 3])
def test_ranks_that_wait_for_one_that_makes_progress_do_not_hang(busy_rank: int, four_ranks: RankPool) -> None:
    assert four_ranks.run(work_while_the_others_wait, busy_rank) == [True] * 4


START = """
    import os, sys
    from mythos.errors import UserError
    from mythos.ranks import group

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
    try:
        group.start("cpu")
    except UserError as error:
        print(error)
"""


def test_a_port_in_use_is_reported_in_one_line() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        done = python(START.replace("sys.argv[1]", f"'{port}'"))
    assert done.stdout == (
        f"MASTER_PORT = {port}: in use on this host: set MASTER_PORT to a free port, the same for all ranks\n"
    )


SUSPENDED = """
    import os, sys, time
    from mythos.run.console import start_logging
    from mythos.ranks import group
    from mythos.ranks.watchdog import Watchdog

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    group.start("cpu")
    start_logging(None, 0)
    with Watchdog(4.0) as watchdog:
        watchdog.started()
        watchdog.progress("a step")
        time.sleep(1)  # so that the watchdog has polled with the new limit
        print("ready", flush=True)
        sys.stdin.readline()
        time.sleep(2)
    print("done")
"""


@pytest.mark.parametrize("children", ["with its child", "alone"])
def test_a_process_that_was_suspended_for_longer_than_the_limit_continues(children: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SUSPENDED)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=clean_environment(),
        cwd=REPO,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        send = os.killpg if children == "with its child" else os.kill
        send(process.pid, signal.SIGSTOP)
        time.sleep(9)
        send(process.pid, signal.SIGCONT)
        output, errors = process.communicate("\n", timeout=60)
    assert (process.returncode, output) == (0, "done\n"), errors
    assert "this process did not run for" in errors


EXIT_WITHOUT_THREADS = """
    import threading, time
    from mythos.ranks.exits import exit_within, prepare_exit

    prepare_exit()
    threading.Thread.start = None  # as if none could be started any more
    exit_within(85, after_s=1.0)
    time.sleep(600)
"""
EXIT_WITH_A_BLOCKED_INTERPRETER = """
    import ctypes
    from mythos.ranks import exits

    exits.KERNEL_GRACE_S = 1.0
    exits.exit_within(85, after_s=0.5)
    ctypes.PyDLL(None).sleep(600)
"""


def test_an_exit_needs_no_new_thread_and_no_interpreter() -> None:
    assert python(EXIT_WITHOUT_THREADS).returncode == 85
    assert python(EXIT_WITH_A_BLOCKED_INTERPRETER).returncode == -signal.SIGALRM

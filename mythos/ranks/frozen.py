"""Ends this process if its interpreter is blocked: when a library holds the interpreter's lock and never returns.

Then no thread of this process can act, so a small child process waits for a beat that a thread sends regularly. Without
one for the time that the last beat allowed, the child has the stacks written (by a C function on SIGRTMAX, which does
not need the interpreter) and kills its parent. It counts the seconds in which it is running itself, and none in which
its parent is stopped, so that a job that is suspended and resumed is not ended. It ends with its parent.
"""

import faulthandler
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

from mythos.ranks.exits import thread_limit_error

STACKS_SIGNAL = signal.SIGRTMAX
"""Used by no launcher and no library that we know of."""
CHILD = """
import os, select, signal, sys, time
parent, left_s = os.getppid(), float("inf")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
def stopped():
    with open(f"/proc/{parent}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
buffer = b""
while True:
    if select.select([0], [], [], 0.5)[0]:
        received = os.read(0, 4096)
        if not received:
            break
        buffer = (buffer + received)[-100:]
        lines = buffer.split(b"\\n")
        if len(lines) > 1:
            left_s, buffer = float(lines[-2]), lines[-1]
    elif not stopped():
        left_s -= 0.5
    if left_s <= 0:
        os.kill(parent, signal.SIGRTMAX)
        time.sleep(1)
        os.kill(parent, signal.SIGKILL)
        break
"""


class FrozenWatch:
    """Kills this process when ``beat`` is not called for too long; ``close`` ends that.

    Raises:
        UserError: no process can be started.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", CHILD]
        try:
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, stdout=subprocess.DEVNULL)
        except OSError as error:
            raise thread_limit_error(error) from error
        self._stream: Any = None

    def beat(self, limit_s: float, stream: Any) -> None:
        """The process may be blocked for ``limit_s`` from now on; then its stacks are written to ``stream``."""
        assert self._child.stdin is not None
        if stream is not None and stream is not self._stream:
            faulthandler.register(STACKS_SIGNAL, stream, all_threads=True, chain=False)
            self._stream = stream
        with suppress(OSError):  # somebody has killed the child: the run continues without it
            self._child.stdin.write(f"{limit_s}\n".encode())

    def close(self) -> None:
        """End the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        if self._stream is not None:
            faulthandler.unregister(STACKS_SIGNAL)

"""Ranks for tests: processes on this machine's CPU that need not import torch and DeepSpeed.

The imports take four CPU seconds per process. A fork server does them once for each test session, and every rank is a
fork of it that starts in a tenth of a second.

``RankPool`` keeps the ranks of one process group alive between tests:

    def losses(steps):                      # at module level, so that it can be pickled
        return [dist.get_rank()] * steps

    def test_losses(two_ranks):
        assert two_ranks.run(losses, 3) == [[0, 0, 0], [1, 1, 1]]

``Job`` runs a program on fresh ranks that may be killed or end by themselves:

    job = Job(2, main, ["train", "config.yaml"], output=tmp_path / "output")
    assert job.wait(60) == 0
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 240
GRACE_S = 20
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


class RankPool:
    """``ranks`` worker processes in one process group."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call ``function(*arguments)`` on every rank; returns the results by rank.

        If a rank fails or does not answer, the pool ends, because other ranks may wait for that rank for ever. The
        next call starts a fresh pool.
        """
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < self.ranks:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, timeout=timeout_s)
            if not ready:
                self.close()
                missing = sorted(set(range(self.ranks)) - set(answers))
                raise TimeoutError(f"ranks {missing} have not answered within {timeout_s} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    ok, answers[rank] = pipe.recv()
                except EOFError:
                    ok, answers[rank] = False, "the process died"
                if not ok:
                    self.close()
                    raise AssertionError(f"rank {rank}: {answers[rank]}")
        return [answers[rank] for rank in range(self.ranks)]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []

    def _start(self) -> None:
        start_fork_server()
        for environ in environments(self.ranks):
            own, theirs = CONTEXT.Pipe()
            worker = CONTEXT.Process(target=_work, args=(theirs, environ), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(own)


def _work(pipe: Connection, environ: dict[str, str]) -> None:
    os.environ |= environ
    import torch

    from mythos.ranks import group

    torch.set_num_threads(1)
    group.start("cpu")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Job:
    """A program on fresh ranks, in the environment that torchrun gives them.

    The function returns the exit code of its process. All ranks write to one file.
    """

    def __init__(self, ranks: int, program: Callable[..., int], *arguments: Any, output: Path) -> None:
        start_fork_server()
        self._output = output
        self._processes = [
            CONTEXT.Process(target=_run_program, args=(output, environ, program, arguments), daemon=True)
            for environ in environments(ranks)
        ]
        for process in self._processes:
            process.start()

    def wait(self, limit_s: float) -> int:
        """Wait for all processes; returns 0, or the exit code of the first that failed (negative: a signal's number).

        After a failure the others have GRACE_S to end by themselves; then they are killed, as by a launcher.
        """
        until, exit_code = time.monotonic() + limit_s, 0
        running = {process.sentinel: process for process in self._processes}
        while running:
            for sentinel in wait(list(running), timeout=max(0.0, until - time.monotonic())):
                process = running.pop(sentinel)  # type: ignore[call-overload]
                process.join()
                if process.exitcode and not exit_code:
                    exit_code = process.exitcode
                    until = min(until, time.monotonic() + GRACE_S)
            if running and time.monotonic() >= until:
                self.kill()
                if not exit_code:
                    raise AssertionError(f"not done after {limit_s} s: {self.text()}")
        return exit_code

    def kill(self) -> None:
        """Kill all processes that have not ended."""
        for process in self._processes:
            process.kill()

    def text(self) -> str:
        """What the processes have written so far."""
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""


def _run_program(output: Path, environ: dict[str, str], program: Callable[..., int], arguments: Any) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ |= environ
    sys.exit(program(*arguments))


def start_fork_server() -> None:
    """Start the process from which all ranks are forked, if it does not run yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
        # bf16 matrix products end in SIGILL on virtual CPUs that announce AMX without offering it
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()


def environments(ranks: int) -> list[dict[str, str]]:
    """The variables of each rank, as torchrun sets them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]

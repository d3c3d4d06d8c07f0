"""Ranks for tests: n processes joined by gloo on this machine's CPU, kept alive between tests.

Importing DeepSpeed takes seconds a process, so the tests of a session share one pool for each number of ranks:

    def losses(steps):                      # at module level, so that it can be pickled
        return [dist.get_rank()] * steps

    def test_losses(two_ranks):
        assert two_ranks.run(losses, 3) == [[0, 0, 0], [1, 1, 1]]
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 240


class RankPool:
    """``ranks`` worker processes in one process group."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call ``function(*arguments)`` on every rank; returns the results by rank.

        A failing or missing answer ends the pool (its other ranks may wait for the failed one for ever); the next
        call starts a fresh one.
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
                raise TimeoutError(
                    f"ranks {sorted(set(range(self.ranks)) - set(answers))} gave no answer in {timeout_s} s"
                )
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
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.ranks):
            own, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, rank, self.ranks, port), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(own)


def _work(pipe: Connection, rank: int, ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # bf16 matrix products die of SIGILL on virtual CPUs that announce AMX without offering it
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    }
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

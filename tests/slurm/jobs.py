"""Jobs on the tests' Slurm: submit them, query them, wait for them with a limit."""

import time
from collections.abc import Callable
from pathlib import Path

from mythos.run.metrics import read_metrics
from tests.cluster import REPO, run

DONE_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
LIMIT_S = 240
TWO_BY_TWO = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1")
TWO_BY_ONE = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-gpu=1")


class Job:
    """A submitted job."""

    def __init__(self, number: str, environ: dict[str, str], output: Path) -> None:
        self.number = number
        self.environ = environ
        self.output = output

    def show(self, field: str) -> str:
        """A field of `scontrol show job`."""
        done = run(["scontrol", "show", "job", "-o", self.number], 20, self.environ)
        assert done.returncode == 0, done.stderr
        words = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
        return words.get(field, "")

    def log(self) -> str:
        """The job's output so far."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def wait_until(self, what: str, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Poll until the condition holds; the test fails if the job ends first, or after the limit."""
        until = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < until, f"{what}: not within {limit_s} s\n{self.log()}"
            ended = self.show("JobState") in DONE_STATES
            assert not ended or condition(), f"the job ended before: {what}\n{self.log()}"
            time.sleep(0.1)

    def wait_for_step(self, run_directory: Path, step: int) -> None:
        """Wait until the step is in the run's metrics."""
        self.wait_until(f"step {step}", lambda: newest_step(run_directory) >= step)

    def end(self, limit_s: float = LIMIT_S) -> str:
        """Wait for the end of the job; returns its state."""
        until = time.monotonic() + limit_s
        while (state := self.show("JobState")) not in DONE_STATES:
            assert time.monotonic() < until, f"still {state} after {limit_s} s\n{self.log()}"
            time.sleep(0.1)
        return state

    def scancel(self, *options: str) -> None:
        """Signal or cancel the job."""
        done = run(["scancel", *options, self.number], 20, self.environ)
        assert done.returncode == 0, done.stderr


def submit(environ: dict[str, str], output: Path, *words: str | Path) -> Job:
    """sbatch from the repository's root."""
    done = run(["sbatch", "--parsable", f"--output={output}", *words], 20, environ, REPO)
    assert done.returncode == 0, done.stderr
    return Job(done.stdout.strip(), environ, output)


def submit_pretrain(environ: dict[str, str], output: Path, *words: str) -> Job:
    """slurm/pretrain.sh on two nodes, one task each."""
    return submit(environ, output, *TWO_BY_ONE, "slurm/pretrain.sh", *words)


def newest_step(run_directory: Path) -> int:
    return max((line["step"] for line in read_metrics(run_directory) if "train/loss" in line), default=0)


def losses(run_directory: Path) -> list[tuple[int, float]]:
    """Step and loss of every line, in the order of the file."""
    return [(line["step"], line["train/loss"]) for line in read_metrics(run_directory) if "train/loss" in line]

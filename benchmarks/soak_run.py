"""The run of ``benchmarks.soak``: Slurm jobs, one after another until it is done."""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from benchmarks.soak_plan import RANKS, SAVE_EVERY
from benchmarks.soak_report import Outcome, read_outcome, read_records
from mythos.config.load import to_dict
from mythos.run.directory import RunDirectory
from mythos.run.journal import FAILED, STARTED, read_events
from tests.cluster import REPO, SCRIPT, run
from tests.faults.supervise import configuration, process_of
from tests.slurm.jobs import DONE_STATES, TWO_BY_ONE, Job, submit

BATCH_SEQUENCES = 16
LIMIT_S = 300.0
POLL_S = 0.05
STATE_POLL_S = 0.5
OPTIONS: dict[str, Any] = {
    "checkpoint__every": SAVE_EVERY,
    "checkpoint__keep_last": 3,
    "checkpoint__max_failures": 100,
    "data__shuffle_shards": 2,
    "preemption__grace_s": 4.0,  # the local cluster kills 5 s after SIGTERM
    "train__global_batch_sequences": BATCH_SEQUENCES,
    "train__micro_batch_sequences": 4,
    "train__watchdog_s": 10.0,
}
MYTHOS = """#!/bin/sh
# `mythos`, with faults in `mythos train`
case $1 in
  train) exec {python} -m tests.faults.victim {faults} "$@" ;;
  *) exec {python} -c 'import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))' "$@" ;;
esac
"""


class SoakError(Exception):
    """The run cannot continue."""


class SoakRun:
    """A run of the tiny model by slurm/pretrain.sh on two nodes.

    Slurm or the script requeues the job after a preemption and the loss of a node. After anything else the job ends,
    and ``attend`` submits it again, as a user would.

    Args:
        directory: for the faults, what the ranks record, and the jobs' output.
        disk: where the run directory is created.
        slurm: the environment of the cluster.
        rank_faults: file name -> content, for ``tests.faults.victim``.
    """

    def __init__(
        self,
        directory: Path,
        disk: Path,
        data: Path,
        slurm: dict[str, str],
        steps: int,
        rank_faults: dict[str, dict[str, Any]],
    ) -> None:
        config = configuration(data, disk, RANKS, train__steps=steps, **OPTIONS)
        self.directory, self.data, self.run = directory, data, Path(config.run.directory)
        self.faults, self._config = directory / "faults", directory / "config.yaml"
        self.faults.mkdir(parents=True)
        for name, content in rank_faults.items():
            (self.faults / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        self._config.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
        mythos = directory / "bin" / "mythos"
        mythos.parent.mkdir()
        words = {"python": shlex.quote(sys.executable), "faults": shlex.quote(str(self.faults))}
        mythos.write_text(MYTHOS.format(**words), encoding="utf-8")
        mythos.chmod(0o755)
        self.slurm = slurm | {"PATH": f"{mythos.parent}{os.pathsep}{slurm['PATH']}", "SLURM_WAIT": "10"}
        self.jobs: list[Job] = []
        self.done = False
        self.unexpected: list[str] = []
        """Why attempts ended without a fault."""
        self.in_fault = False
        self._asked_at = 0.0

    @property
    def job(self) -> Job:
        """The newest job."""
        return self.jobs[-1]

    def submit(self) -> None:
        """Submit the job, for the first time or after its end."""
        output = self.directory / f"job_{len(self.jobs) + 1}.out"
        self.jobs.append(submit(self.slurm, output, *TWO_BY_ONE, "slurm/pretrain.sh", str(self._config)))

    def attend(self) -> None:
        """Submit the job again if it has ended before the run was done."""
        if time.monotonic() < self._asked_at + STATE_POLL_S:
            return
        self._asked_at = time.monotonic()
        if not self.ended():
            return
        if self.job.show("JobState") == "COMPLETED":
            self.done = True
            return
        if not self.in_fault:
            self.unexpected.append(self.cause())
        self.submit()

    def ended(self) -> bool:
        """Whether the newest job has ended and is not about to be requeued."""
        if self.job.show("JobState") not in DONE_STATES:
            return False
        time.sleep(1)  # a job that Slurm requeues has such a state for a moment
        return self.job.show("JobState") in DONE_STATES

    def cause(self) -> str:
        """Why the newest attempt ended, as far as is known."""
        failures = [event["message"] for event in read_events(self.run) if event["event"] == FAILED]
        return f"{failures[-1] if failures else 'no cause recorded'} ({self.job.output})"

    def wait_for(self, what: str, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Attend to the job until the condition holds. Raises SoakError."""
        until = time.monotonic() + limit_s
        while not condition():
            if self.done:
                raise SoakError(f"the run was finished before: {what}")
            if time.monotonic() > until:
                raise SoakError(f"{what}: not within {limit_s:g} s: see {self.job.output}")
            self.attend()
            time.sleep(POLL_S)

    def wait_for_step(self, step: int) -> None:
        """Wait until the step is finished."""
        self.wait_for(f"step {step}", lambda: self.newest_step() >= step)

    def wait_until_ended(self) -> None:
        """Wait for the end of the newest job, without submitting it again."""
        until = time.monotonic() + LIMIT_S
        while not self.ended():
            if time.monotonic() > until:
                raise SoakError(f"the end of the job: not within {LIMIT_S:g} s: see {self.job.output}")
            time.sleep(POLL_S)

    def finish(self, limit_s: float) -> Outcome:
        """Wait until the run is done; returns what it has left."""
        self.wait_for("the end of the run", lambda: self.done, limit_s)
        return read_outcome(self.directory, self.run)

    def newest_step(self) -> int:
        """The step that was finished last; not the highest one after a resume."""
        records = read_records(self.directory, last_bytes=1000)
        return records[-1].step if records else 0

    def starts(self) -> int:
        """The number of attempts that began to train."""
        return sum(event["event"] == STARTED for event in read_events(self.run))

    def printed(self, text: str) -> int:
        """How often the newest job has printed a text."""
        return self.job.log().count(text)

    def newest_checkpoint(self) -> Path:
        """The checkpoint that ``latest`` names."""
        directory = RunDirectory(self.run).checkpoints
        return directory / (directory / "latest").read_text(encoding="utf-8").strip()

    def kill_all(self) -> None:
        """kill -9 of all ranks."""
        for rank in range(RANKS):
            with suppress(ProcessLookupError):
                os.kill(process_of(self.run, rank), signal.SIGKILL)

    def preempt(self) -> None:
        """Signal the batch script, as Slurm does before a time limit."""
        self.job.scancel("--batch", "--signal=USR1")

    def scontrol(self, *words: str) -> str:
        """Run scontrol. Raises SoakError."""
        done = run(["scontrol", *words], 30, self.slurm)
        if done.returncode:
            raise SoakError(f"scontrol {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def cluster(self, *words: str) -> None:
        """Run slurm/local_cluster.sh. Raises SoakError."""
        done = run([SCRIPT, *words], 30, self.slurm, REPO)
        if done.returncode:
            raise SoakError(f"local_cluster.sh {' '.join(words)}: {done.stderr.strip()}")

    def node_of(self, rank: int) -> str:
        """The node on which a rank runs."""
        return self.scontrol("show", "hostnames", self.job.show("NodeList")).split()[rank]

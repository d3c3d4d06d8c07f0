"""The runs of an experiment: what each still needs, and its training and evaluation on this machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from mythos.errors import DONE, FAILED, PREEMPTED, UserError, os_errors_as_user_errors
from mythos.files import open_to_append, write_atomically
from mythos.parity.experiment import Experiment, PlannedRun, design_hash
from mythos.parity.results import read_evaluation
from mythos.readers import read_json
from mythos.run.directory import RunDirectory, checkpoint_name
from mythos.run.find import is_run
from mythos.run.status import Status, read_status

POLL_S = 1.0
Need = Literal["training", "evaluation", "nothing"]


@dataclass(frozen=True)
class Progress:
    """How far a run is; ``status`` is None before its first start, ``evaluation`` before there is one."""

    run: PlannedRun
    status: Status | None
    evaluation: Path | None

    @property
    def need(self) -> Need:
        """What comes next."""
        if self.status is None or self.status.state != "finished" or self.status.step < self.run.config.train.steps:
            return "training"
        return "evaluation" if self.evaluation is None else "nothing"

    @property
    def state(self) -> str:
        """For people: the state of the run, or whether it is evaluated."""
        if self.need == "nothing":
            return "evaluated"
        return self.status.state if self.status else "not started"


def progress(experiment: Experiment, run: PlannedRun) -> Progress:
    """How far a run is, read from its directory. Raises UserError if that is damaged."""
    if not is_run(run.directory):
        return Progress(run, None, None)
    return Progress(run, read_status(run.directory), find_evaluation(experiment, run))


def find_evaluation(experiment: Experiment, run: PlannedRun) -> Path | None:
    """The file of `mythos eval` for the last step of the run, with what the experiment wants; None without one."""
    wanted = experiment.evaluation
    last = checkpoint_name(run.config.train.steps)
    for path in sorted(RunDirectory(run.directory).evaluations.glob(f"{last}_*.json")):
        found = read_evaluation(path)
        options, asked = found.get("eval", {}), found.get("wanted", {})
        if (
            (run.config.loop is None or list(options.get("depths") or ()) == list(wanted.depths))
            and options.get("sequences") == wanted.sequences
            and asked.get("documents") == wanted.documents
            and list(asked.get("tasks") or ()) == list(wanted.tasks)
        ):
            return path
    return None


def evaluation_arguments(experiment: Experiment, run: PlannedRun) -> list[str]:
    """Of `mythos eval`, after the run directory."""
    wanted = experiment.evaluation
    arguments = [f"eval.sequences={'null' if wanted.sequences is None else wanted.sequences}"]
    arguments += ["--documents", "all" if wanted.documents is None else str(wanted.documents)]
    if run.config.loop is not None and wanted.depths:
        arguments += ["--depths", ",".join(map(str, wanted.depths))]
    if wanted.tasks:
        arguments += ["--tasks", ",".join(wanted.tasks)]
    if wanted.task_data is not None:
        arguments += ["--task-data", wanted.task_data]
    return arguments


def report_directory(experiment: Experiment) -> Path:
    """Where the report is written by default."""
    return Path(experiment.directory) / "report"


def log_file(experiment: Experiment, run: PlannedRun) -> Path:
    """What the commands of a run print on this machine."""
    return Path(experiment.directory) / "log" / f"{run.arm}-seed-{run.seed}.log"


class LocalRunner:
    """Carries out an experiment on this machine, several runs at a time; what is finished is not done again.

    A run that another process is training is waited for. Every run is a process of its own, so that one which fails
    does not end the others.

    Args:
        say: prints a line.
    """

    def __init__(self, experiment: Experiment, jobs: int, say: Callable[[str], None]) -> None:
        self._experiment, self._jobs, self._say = experiment, jobs, say
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def carry_out(self, runs: Sequence[PlannedRun]) -> int:
        """Train and evaluate the runs; returns 0, 1 if one has failed, or 85 after a signal, once they have saved."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                codes = [future.result() for future in [pool.submit(self._complete, run) for run in runs]]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopping:
            return PREEMPTED
        return DONE if all(code == DONE for code in codes) else FAILED

    def _stop(self, number: int, _: object) -> None:
        """Ask the runs that are training to save and to end."""
        self._stopping = True
        for child in list(self._children):
            child.send_signal(signal.SIGTERM)

    def _complete(self, run: PlannedRun) -> int:
        """Train and evaluate one run, as far as it needs it; returns an exit code."""
        name = f"{run.arm}, seed {run.seed}"
        try:
            for need, arguments in (
                ("training", ["train", *run.arguments]),
                ("evaluation", ["eval", str(run.directory), *evaluation_arguments(self._experiment, run)]),
            ):
                self._wait_for_others(run, name)
                if self._stopping or progress(self._experiment, run).need != need:
                    continue
                self._say(f"{name}: {need}")
                code = self._command(run, arguments)
                if code != DONE and not self._stopping:
                    self._say(f"{name}: {need} failed with exit code {code}: see {log_file(self._experiment, run)}")
                    return code
        except UserError as error:
            self._say(f"{name}: {error}")
            return FAILED
        return DONE

    def _wait_for_others(self, run: PlannedRun, name: str) -> None:
        waiting = False
        while not self._stopping:
            status = progress(self._experiment, run).status
            if status is None or status.state != "running":
                return
            if not waiting:
                self._say(f"{name}: another process is training it: waiting")
            waiting = True
            time.sleep(POLL_S)

    def _command(self, run: PlannedRun, arguments: Sequence[str]) -> int:
        """Run a command of `mythos` in as many processes as the experiment says."""
        processes = self._experiment.processes
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
        path = log_file(self._experiment, run)
        with os_errors_as_user_errors(path, "free space, or make the directory writable"):
            path.parent.mkdir(parents=True, exist_ok=True)
            output = open_to_append(path)
        with output, self._lock:
            if self._stopping:
                return PREEMPTED
            # Signals of the terminal reach this process alone, which passes them on once.
            child = subprocess.Popen(
                [sys.executable, *launcher, "-m", "launch.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
            self._children.add(child)
        if self._stopping:  # since the check: the handler may not have seen this child
            child.send_signal(signal.SIGTERM)
        try:
            return child.wait()
        finally:
            self._children.discard(child)


@dataclass(frozen=True)
class Design:
    """The design of an experiment when one of its runs was begun."""

    hash: str
    time: str


_DESIGNS = TypeAdapter(list[Design])


def record_design(experiment: Experiment) -> None:
    """Add the present design to DIRECTORY/designs.json unless it is the newest there.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    path, design = designs_file(experiment), design_hash(experiment)
    designs = read_designs(experiment)
    if not designs or designs[-1].hash != design:
        designs.append(Design(design, time.strftime("%Y-%m-%dT%H:%M:%S%z")))
        with os_errors_as_user_errors(path, "free space, or make the directory writable"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(_DESIGNS.dump_python(designs), indent=1))


def read_designs(experiment: Experiment) -> list[Design]:
    """The designs under which runs were begun, oldest first. Raises UserError if the file is damaged."""
    path = designs_file(experiment)
    return read_json(path, _DESIGNS, "restore it, or begin in another directory") if path.exists() else []


def designs_file(experiment: Experiment) -> Path:
    """Where they are recorded."""
    return Path(experiment.directory) / "designs.json"

"""A run with many random faults: `python -m benchmarks.soak --faults 40 --seed 1 --directory DIR`.

The tiny model is trained by slurm/pretrain.sh on a local Slurm of four nodes, first undisturbed and then with faults
of the kinds of tests/faults: killed, stopped and hanging ranks, preemptions, lost nodes, damaged checkpoints and
shards, full and read-only disks. The seed alone determines their kinds and their moments. At the end the losses must
equal those of the undisturbed run bit for bit, and every sequence must have been consumed once.

For each fault a line is printed with the time to the next finished step and the steps that were lost. A run with 40
faults takes about half an hour on two cores. It needs Slurm (see slurm/local_cluster.sh). Without the right to mount
file systems the faults of disks are left out. When it is interrupted, the cluster is taken down; the same command
starts anew and removes what is left of the soak before.
"""

import argparse
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.soak_faults import disturb
from benchmarks.soak_plan import KINDS, NEED_MOUNT, STEPS_A_FAULT, PlannedFault, plan, rank_faults, run_steps
from benchmarks.soak_report import Cost, Outcome, judge, read_records, summary, table
from benchmarks.soak_run import BATCH_SEQUENCES, SoakError, SoakRun
from tests.cluster import SCRIPT, local_slurm
from tests.data.conftest import write_data_set
from tests.faults.damage import small_disk, unmount
from tests.tiny import VOCABULARY

DISK_MB = 64
SECONDS_A_STEP = 10
"""More than a step takes on a busy machine."""
MARK_FILE = "soak"
"""In the directory of a soak: locked while it runs; it holds the directory of its Slurm."""
DISK = "disk"


def soak(seed: int, faults: int, only: str, directory: Path, slurm_directory: Path) -> bool:
    """Returns whether the disturbed run equals the undisturbed one."""
    with ExitStack() as stack:
        kinds = tuple(kind for kind in KINDS if re.search(only, kind))
        try:
            stack.enter_context(small_disk(directory / DISK, DISK_MB))
        except OSError as error:
            print(f"without {' and '.join(NEED_MOUNT)}: {error}")
            kinds = tuple(kind for kind in kinds if kind not in NEED_MOUNT)
        slurm = stack.enter_context(local_slurm(slurm_directory))
        steps = run_steps(faults)
        data = write_data_set(directory / "data", VOCABULARY, rows=(steps + STEPS_A_FAULT) * BATCH_SEQUENCES)
        planned = plan(seed, faults, kinds)
        in_ranks = {name: content for fault in planned for name, content in rank_faults(fault).items()}
        # A skipped update changes the losses after it, so the undisturbed run skips the same ones.
        skipped = {name: content for name, content in in_ranks.items() if "step" in content}
        reference = SoakRun(directory / "undisturbed", directory / "undisturbed", data, slurm, steps, skipped)
        reference.submit()
        undisturbed = reference.finish(steps * SECONDS_A_STEP)
        print(f"undisturbed: {steps} steps in {undisturbed.counted_s:.0f} s", flush=True)
        disturbed = SoakRun(directory / "disturbed", directory / DISK, data, slurm, steps, in_ranks)
        return disturb_and_judge(disturbed, planned, undisturbed)


def disturb_and_judge(run: SoakRun, planned: list[PlannedFault], undisturbed: Outcome) -> bool:
    """Run with all faults and print the report; returns whether the run equals the undisturbed one."""
    begun = time.monotonic()
    run.submit()
    costs: list[Cost] = []
    for fault in planned:
        costs.append(disturb(run, fault))
        print(
            f"fault {fault.number:>3} of {len(planned)}, step {fault.step}, {fault.kind}: next step after "
            f"{costs[-1].next_step_s:.1f} s, {costs[-1].lost_steps} steps lost",
            flush=True,
        )
    found = run.finish(2 * STEPS_A_FAULT * SECONDS_A_STEP)
    wall_s = time.monotonic() - begun
    print(*table(costs), sep="\n")
    print(*summary(undisturbed, found, len(read_records(run.directory)), wall_s), sep="\n")
    print(f"attempts: {run.starts()}; jobs that had to be submitted: {len(run.jobs)}")
    for cause in run.unexpected:
        print(f"ended without a fault: {cause}")
    differences = judge(undisturbed, found)
    print(*differences, sep="\n", end="\n" if differences else "")
    consumed = sum(len(each) for each in found.sequences.values())
    equal = "NOT EQUAL to" if differences else "equal bit for bit to"
    print(f"{equal} the undisturbed run: {len(found.losses)} losses, {consumed} sequences")
    return not differences and not run.unexpected


def prepare(directory: Path) -> int:
    """Create the directory, or empty it after a soak that was cut; returns the descriptor of its lock."""
    mark = directory / MARK_FILE
    if directory.exists() and any(directory.iterdir()) and not mark.exists():
        raise SoakError(f"{directory}: not empty, and not of a soak: give another --directory")
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise SoakError(f"{directory}: a soak is running there") from error
    if slurm_directory := mark.read_text(encoding="utf-8"):
        subprocess.run([SCRIPT, "down"], env=os.environ | {"SLURM_LOCAL_DIR": slurm_directory}, check=True)
        shutil.rmtree(slurm_directory, ignore_errors=True)
    if os.path.ismount(directory / DISK):
        unmount(directory / DISK)
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    return lock


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="REGEX", help="only kinds of faults in whose name this is found")
    parser.add_argument("--directory", type=Path, required=True, help="for all files of the soak")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as after Ctrl-C
    directory = arguments.directory.resolve()
    try:
        prepare(directory)
        slurm_directory = tempfile.mkdtemp(prefix="mythos-soak-", dir="/tmp")
        (directory / MARK_FILE).write_text(slurm_directory, encoding="utf-8")
        equal = soak(arguments.seed, arguments.faults, arguments.only, directory, Path(slurm_directory))
        return 0 if equal else 1
    except SoakError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("soak: interrupted; the same command starts anew", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

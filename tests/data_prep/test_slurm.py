"""slurm/data_prep.sh on a real Slurm cluster of two nodes."""

import re
import subprocess
import time
from pathlib import Path

from tests.cluster import REPO
from tests.cluster import run as run_command
from tests.data_prep.conftest import VALIDATION_PERCENT, content_of, run
from tests.data_prep.test_documents import damage_row_group

LIMIT_S = 150


def submit(cluster: dict[str, str], log: Path, *words: object) -> str:
    options = ["--nodes=2", "--ntasks-per-node=2", "--parsable", f"--output={log}", f"--chdir={REPO}"]
    done = run_command(["sbatch", *options, REPO / "slurm/data_prep.sh", *words], limit_s=20, env=cluster)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def end_of(cluster: dict[str, str], job: str) -> tuple[str, str]:
    """State and exit code of a job that has ended."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        shown = run_command(["scontrol", "show", "job", "-o", job], limit_s=20, env=cluster).stdout
        state, code = (re.search(rf"\b{name}=(\S+)", shown)[1] for name in ("JobState", "ExitCode"))  # type: ignore[index]
        if state not in ("PENDING", "RUNNING", "COMPLETING"):
            return state, code
        time.sleep(0.2)
    raise AssertionError(f"job {job} has not ended after {LIMIT_S} s")


def test_four_tasks_on_two_nodes_write_the_same_bytes_as_one_process(
    slurm_cluster: dict[str, str], several_sources: list[Path], tokenizer: Path, tmp_path: Path
):
    options = ["--tokenizer", tokenizer, "--sequence-length", 64, "--packing", "straight"]
    options += ["--output", tmp_path / "data"]
    job = submit(slurm_cluster, tmp_path / "log", "prepare", *several_sources, *options)
    assert end_of(slurm_cluster, job) == ("COMPLETED", "0:0"), (tmp_path / "log").read_text(encoding="utf-8")
    run(several_sources, tokenizer, tmp_path / "one", validation_percent=VALIDATION_PERCENT)
    assert content_of(tmp_path / "data") == content_of(tmp_path / "one")

    damaged = damage_row_group(several_sources[0], tmp_path / "damaged.parquet", row_group=1)
    options[-1] = tmp_path / "other"
    job = submit(slurm_cluster, tmp_path / "other_log", "prepare", *several_sources[1:], damaged, *options)
    assert end_of(slurm_cluster, job) == ("FAILED", "2:0")
    lines = [
        line for line in (tmp_path / "other_log").read_text(encoding="utf-8").splitlines() if line.startswith("mythos:")
    ]
    assert len(lines) == 1
    assert f"{damaged}: row group 1 is damaged" in lines[0]


def test_without_a_command_the_usage_is_printed():
    done = subprocess.run([REPO / "slurm/data_prep.sh"], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")

"""The console of a run: a bar on a terminal that log lines do not tear, plain lines elsewhere."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.cluster import REPO, clean_environment
from tests.screen import run_on_terminal, screen_lines

PROGRAM = """
    import sys, time
    from pathlib import Path
    from mythos.run import bar
    from mythos.run.console import Progress, log, start_logging

    bar.REFRESH_S = 0
    start_logging(Path({log!r}), 0)
    log.info("before the bar")
    progress = Progress(10, 20, 0)
    for step in range(11, 16):
        time.sleep(0.05)
        metrics = {{"train/loss": 2.5, "train/gradient_norm": 1.0, "train/learning_rate": 1e-3}}
        progress.report(step, metrics | {{"perf/tokens_per_second": 1234.0}})
        if step == 12:
            log.info("a line with [red]brackets[/red], /a/path/{long} and :smile:")
    {end}
"""
LONG = "long/" * 30
LINE = f"a line with [red]brackets[/red], /a/path/{LONG} and :smile:"


def program(log: Path, end: str) -> str:
    return PROGRAM.format(log=str(log), long=LONG, end=end)


@pytest.mark.parametrize("end", ["progress.close()", "import logging, os; logging.shutdown(); os._exit(1)"])
def test_log_lines_do_not_tear_the_bar(end: str, tmp_path: Path) -> None:
    code, written = run_on_terminal(program(tmp_path / "log", end))
    assert code == ("_exit" in end), written
    lines = [line.rstrip() for line in screen_lines(written)]
    assert lines[0] == "before the bar"
    assert lines[1] == LINE
    assert re.fullmatch(r"training \S+.* 15/20 steps loss 2\.500, 1,234 tokens/s 0:00:00 left 0:00:0\d", lines[2])
    assert not any(lines[3:]), "one bar, and the cursor below it"
    assert written.endswith("\n") or written.endswith("\x1b[?25h")
    assert written.rfind("\x1b[?25l") < written.rfind("\x1b[?25h"), "the cursor is visible"


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program(tmp_path / "log", "progress.close()"))],
        capture_output=True,
        encoding="utf-8",
        env=clean_environment() | {"FORCE_COLOR": "1"},
        cwd=REPO,
        timeout=100,
        check=True,
    )
    step = "step {}/20 loss 2.5000 gradient norm 1.000 learning rate 1.00e-03 1,234 tokens/s"
    expected = ["before the bar", step.format(11), step.format(12), LINE, *map(step.format, (13, 14, 15))]
    assert done.stderr.splitlines() == expected
    logged = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" INFO ")[1] for line in logged] == expected
    assert done.stdout == ""


def test_the_log_file_gets_the_steps_that_the_bar_shows(tmp_path: Path) -> None:
    run_on_terminal(program(tmp_path / "log", "progress.close()"))
    assert len(re.findall(r" INFO step \d+/20 loss", (tmp_path / "log").read_text(encoding="utf-8"))) == 5


def test_a_terminal_that_cannot_redraw_gets_lines(tmp_path: Path) -> None:
    _, written = run_on_terminal(program(tmp_path / "log", "progress.close()"), TERM="dumb")
    assert written.count("loss 2.5000") == 5
    assert "\x1b" not in written

import os
import re

import pytest

from data_prep import progress
from tests.screen import run_on_terminal, screen_lines


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with progress.Progress("tokenising", 4_000_000, done_bytes=1_000_000) as shown:
        shown(500_000)
        assert capsys.readouterr().err == ""  # a line every LINE_EVERY_S seconds
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
        shown(500_000)
        line = capsys.readouterr().err
        assert re.fullmatch(r"tokenising: 2 of 4 MB, [\d.,]+ MB/s, [\d.]+ min left\n", line)
        shown(9_000_000)  # the total was an estimate
        assert "4 of 4 MB" in capsys.readouterr().err


def test_lines_that_cannot_be_printed_do_not_end_the_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        with progress.Progress("tokenising", 4_000_000) as shown:
            shown(500_000)
            shown(500_000)
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


BAR = """
    from data_prep.progress import Progress

    with Progress("tokenising", 4_000_000, 1_000_000) as shown:
        shown(1_000_000)
        shown(500_000)
"""


def test_a_bar_on_a_terminal():
    code, written = run_on_terminal(BAR)
    assert code == 0
    lines = [line.rstrip() for line in screen_lines(written)]
    assert re.fullmatch(r"tokenising \S+ +4\.0/4\.0 MB [\d.]+ .B/s 0:00:00 left 0:00:00", lines[0])
    assert not any(lines[1:])

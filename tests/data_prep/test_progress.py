import re

import pytest

from data_prep import progress


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with progress.Progress("tokenising", 4_000_000, done_bytes=1_000_000) as shown:
        shown(500_000)
        assert capsys.readouterr().err == ""  # only now and then
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
        shown(500_000)
        line = capsys.readouterr().err
        assert re.fullmatch(r"tokenising: 2 of 4 MB, [\d.,]+ MB/s, [\d.]+ min left\n", line)
        shown(9_000_000)  # the total was an estimate
        assert "4 of 4 MB" in capsys.readouterr().err


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.Progress("tokenising", 4_000_000) as shown:
        shown(1_000_000)
    written = capsys.readouterr().err
    assert "tokenising: 100%" in written
    assert "4.00M/4.00M" in written
    assert "B/s" in written

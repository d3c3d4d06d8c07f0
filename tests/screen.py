"""A program on a terminal of its own, and what it leaves on the screen."""

import os
import pty
import re
import subprocess
import sys
import textwrap

from tests.cluster import REPO, clean_environment

COLUMNS, ROWS = 100, 50


def run_on_terminal(program: str, **environment: str) -> tuple[int, str]:
    """The exit code of a Python program, and everything that it wrote to its terminal."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=clean_environment() | {"TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)} | environment,
        cwd=REPO,
    )
    os.close(terminal)
    written = b""
    try:
        while chunk := os.read(controller, 1 << 16):
            written += chunk
    except OSError:  # Linux reports the end of a terminal as an error
        assert process.wait(60) is not None
    finally:
        os.close(controller)
    return process.wait(60), written.decode()


def screen_lines(written: str) -> list[str]:
    """The lines on the screen after all that was written."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = (lines[row].ljust(column) + part)[: column + len(part)] + lines[row][column + len(part) :]
            column += len(part)
    return lines

"""How each life of a run began and ended, a JSON object a line in ``events.jsonl``. No torch: `mythos status` reads it.

    {"event": "started", "time": ..., "host": ..., "process": ...}      rank 0, once the run directory is its own
    {"event": "ended", "exit_code": 0, ...}                             finished (0) or preempted and saved (85)
    {"event": "failed", "exit_code": 1, "rank": ..., "message": ...}    whichever rank knows why, the first one first

A life without an end was killed, or still goes on.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
STARTED, ENDED, FAILED = "started", "ended", "failed"


def append_event(directory: Path, event: str, **details: Any) -> None:
    """Add a line. Several ranks may do so at once: a short line appended by one write is never torn.

    Raises:
        OSError: the file cannot be written.
    """
    line = {
        "event": event,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        **details,
    }
    with open(directory / EVENTS_FILE, "ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def read_events(directory: Path) -> list[dict[str, Any]]:
    """All lines that can be read, in order; one that a kill or a full disk cut is left out."""
    path = directory / EVENTS_FILE
    events = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("event") in (STARTED, ENDED, FAILED):
            events.append(line)
    return events

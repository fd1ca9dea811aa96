"""Processes as tests see them: alive, whose child, and waited for."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAIT_SECONDS = 120.0


def eventually(
    holds: Callable[[], Any],
    what: str = "",
    *,
    seconds: float = WAIT_SECONDS,
    tail: Callable[[], str] = str,
) -> Any:
    """Waits until it holds; returns what it gave. A failure ends with what `tail` then gives."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = holds()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"never: {what or holds}{tail()}")


def find_children(pid: int) -> list[int]:
    """Children of any of a process's threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def find_trainers(job_hex: str) -> list[int]:
    """Process ids of a job's live trainers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if b"--plan" in words and any(job_hex.encode() in word for word in words):
            found.append(int(entry.name))
    return [pid for pid in found if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except OSError:
        return False
    return not status.startswith("Z")

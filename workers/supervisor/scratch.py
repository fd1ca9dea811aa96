"""The local disk of workers: an attempt's directory is locked while it is in use, and removed afterwards."""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
INPUT_SECONDS = 30 * 24 * 3600.0  # inputs that no attempt began with for so long are removed


@contextlib.contextmanager
def using(directory: Path) -> Iterator[None]:
    """Holds an attempt's directory; made before, removed after."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.parent.rmdir()  # of the job, unless another attempt is here


def clear_scratch(root: Path) -> list[Path]:
    """Removes what killed workers left, and inputs out of use; what was removed."""
    removed = [path for path in root.glob("jobs/*/a*") if _is_free(path)]
    oldest = time.time() - INPUT_SECONDS
    removed += [path for path in root.glob("inputs/*") if path.stat().st_mtime < oldest]
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return removed


def _is_free(directory: Path) -> bool:
    try:
        with (directory / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False  # it is being made, or removed
    except BlockingIOError:
        return False
    return True

"""A process that has imported the server once and forks workers and control loops: a fleet starts in a second."""

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.processes import is_alive

ROOT = Path(__file__).resolve().parents[3]
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Forked:
    """A process of the nursery's; its parent collects it."""

    pid: int

    def poll(self) -> int | None:
        """Whether it has ended; with which status nobody knows."""
        return None if is_alive(self.pid) else 0

    def wait(self, seconds: float = 30) -> None:
        """Until it has ended."""
        deadline = time.monotonic() + seconds
        while is_alive(self.pid):
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} does not end")
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        """As a Popen's."""
        if is_alive(self.pid):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The runner's end; forks on demand until it is closed.

    Args:
        redis_url: The broker of all workers, which Celery's application is made with.
    """

    def __init__(self, redis_url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nemesis.nursery"],
            env=os.environ | {"RETAIN_REDIS_URL": redis_url, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def fork(
        self, kind: str, arguments: list[str], environment: dict[str, str], log: Path
    ) -> Forked:
        """A `worker` or the `control` loops."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        wish = {"kind": kind, "arguments": arguments, "environment": environment, "log": str(log)}
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the nursery, and with it whatever it forked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def main() -> None:
    """Forks for each line of the input; writes the process ids."""
    # Here and not above: the runner's side needs none of it, and the first import settles the broker's address.
    import app.control.__main__ as control
    from tests.faults.nemesis import worker

    mains = {"worker": worker.main, "control": control.main}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children collect themselves
    for line in sys.stdin:
        wish = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(wish)
            status = mains[wish["kind"]]()
            sys.stderr.flush()
            os._exit(status or 0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def _become(wish: dict[str, object]) -> None:
    """Makes a fork what a started process would be."""
    from app.settings import load_settings

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    with Path(str(wish["log"])).open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    environment = wish["environment"]
    arguments = wish["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    os.environ.update(environment)
    sys.argv = [str(wish["kind"]), *arguments]
    load_settings.cache_clear()
    random.seed()


if __name__ == "__main__":
    main()

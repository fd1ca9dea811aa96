"""The processes the demo needs: the base model's builder, `retain up`, and operator commands."""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.embedded.processes import Identity, launch_line, stop

READY_SECONDS = 150.0
STOP_SECONDS = 45.0
RETAIN = (sys.executable, "-m", "app.cli")

Say = Callable[[str], None]


class DemoFailed(Exception):
    """The demo cannot go on, or what it claims does not hold."""


def build_base(directory: Path, seed: int, say: Say) -> None:
    """Trains the base model and makes its data in a process of its own; quick where they are there.

    Raises:
        DemoFailed: The builder failed.
    """
    command = [sys.executable, "-m", "workers.demo_model", str(directory), "--seed", str(seed)]
    _run(command, say, os.environ.copy())


def run_retain(arguments: list[str], data_dir: Path, say: Say) -> str:
    """The last line of an operator command's output; all of it is said as it comes.

    Raises:
        DemoFailed: The command failed.
    """
    return _run([*RETAIN, *arguments], say, _environment(data_dir))


def create_key(data_dir: Path) -> str:
    """A new API key; the only command whose output is not shown.

    Raises:
        DemoFailed: The command failed.
    """
    lines: list[str] = []
    try:
        return _run([*RETAIN, "keys", "create", "demo"], lines.append, _environment(data_dir))
    except DemoFailed as error:
        raise DemoFailed(f"{error}\n" + "\n".join(lines)) from None


@contextmanager
def running_stack(data_dir: Path, port: int, say: Say) -> Iterator[str]:
    """Runs `retain up` for as long as the context lasts; gives its address.

    The stack has its own session, so that an interrupt at the terminal reaches the demo alone, which
    then stops it in order. Should the demo be killed, the kernel tells the stack to stop.

    Raises:
        DemoFailed: It ended, or never said that it is ready.
    """
    arguments = ["up", "--data-dir", str(data_dir), "--port", str(port)]
    process = subprocess.Popen(  # noqa: S603 - our own command line, without a shell
        launch_line(
            [*RETAIN, *arguments],
            identity=Identity("plain", os.getuid()),
            directory=Path.cwd(),
            death_signal=signal.SIGTERM,
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=_environment(data_dir),
    )
    ready = threading.Event()
    address: list[str] = []
    last: collections.deque[str] = collections.deque(maxlen=12)

    def listen() -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode(errors="replace")
            last.append(line.rstrip())
            if line.startswith("ready "):
                address.append(line.split()[1])
                ready.set()
        ready.set()

    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    try:
        if not ready.wait(READY_SECONDS) or not address:
            raise DemoFailed("`retain up` did not become ready:\n" + "\n".join(last))
        yield address[0]
    finally:
        say("Stopping the stack ...")
        stop(process, [(signal.SIGTERM, STOP_SECONDS)])
        reader.join(5)


def _run(command: list[str], say: Say, environment: dict[str, str]) -> str:
    """Runs a command, says its output line by line, and returns the last line."""
    started = time.monotonic()
    last = ""
    with subprocess.Popen(  # noqa: S603 - our own command lines, without a shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if text := line.strip():
                    last = text
                    say(text)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        name = " ".join(command[2:4])
        raise DemoFailed(
            f"`{name}` failed with status {process.returncode} after {time.monotonic() - started:.0f} s."
        )
    return last


def _environment(data_dir: Path) -> dict[str, str]:
    """The caller's variables, with the demo's data directory, and webhooks allowed to reach loopback."""
    own = {
        "RETAIN_DATA_DIR": str(data_dir),
        "RETAIN_WEBHOOK_ALLOW_PRIVATE": "true",
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | own

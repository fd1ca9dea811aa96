"""Child processes of the embedded services: how they start, die with us, and are stopped."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import Unavailable

LAUNCHER = Path(__file__).with_name("launch.py")


@dataclass(frozen=True)
class Identity:
    """Under which user id a server runs; see `launch.py` for the modes.

    Attributes:
        mode: `plain`, `userns` or `setuid`.
        user: The id inside the namespace (`userns`) or for real (`setuid`).
        owner: Who has to own the server's files.
    """

    mode: str = "plain"
    user: int = 0
    owner: int = 0


class ServerFailed(Unavailable):
    """An embedded server did not start; the message ends with the last lines of its log."""

    code = "embedded_server_failed"


def spawn(
    command: Sequence[str],
    *,
    identity: Identity,
    directory: Path,
    log: Path,
    death_signal: signal.Signals,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """Starts a command in its own session, its output appended to `log`.

    The kernel sends `death_signal` to it when the calling thread ends, so call this from a thread that stays.
    """
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - our own command lines, without a shell
            launch_line(command, identity=identity, directory=directory, death_signal=death_signal),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def launch_line(
    command: Sequence[str], *, identity: Identity, directory: Path, death_signal: signal.Signals
) -> list[str]:
    """The command line that runs `command` through the launcher."""
    return [
        *(sys.executable, "-I", "-S", str(LAUNCHER), identity.mode, str(identity.user)),
        *(str(int(death_signal)), str(os.getpid()), str(directory), "--", *command),
    ]


def stop(process: "subprocess.Popen[bytes]", steps: Sequence[tuple[signal.Signals, float]]) -> None:
    """Sends each signal in turn, waiting so many seconds after each, then kills."""
    for number, seconds in steps:
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.poll() is None:
        process.kill()
        process.wait()


def find_free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def log_tail(log: Path, num_lines: int = 8) -> str:
    """The last lines of a log, for an error message."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def choose_identity(binary: Path, directory: Path) -> Identity:
    """How Postgres, which refuses root and users without a name, can run here.

    Returns:
        The first mode in which `binary` really executes.

    Raises:
        ServerFailed: Root may neither make a user namespace nor change its user id.
    """
    uid = os.geteuid()
    accounts = {entry.pw_uid: entry.pw_name for entry in pwd.getpwall() if entry.pw_uid != 0}
    plain = Identity(owner=uid)
    if uid in accounts or not accounts:
        return plain
    user = next((number for number, name in accounts.items() if name == "nobody"), min(accounts))
    failures = []
    for mode, owner in (("userns", uid), ("setuid", user)):
        identity = Identity(mode, user, owner)
        error = _probe(binary, directory, identity)
        if error is None:
            return identity
        failures.append(f"{mode}: {error}")
    if uid != 0:
        return plain  # only a first start needs the name; initdb says so
    raise ServerFailed(
        "Postgres will not run as root, and no other user id can be taken here ("
        + "; ".join(failures)
        + "). Run as another user, or set RETAIN_DATABASE_URL."
    )


def give_to(identity: Identity, directory: Path) -> None:
    """Makes `identity` the owner of everything under `directory`, where that is not so yet."""
    if os.geteuid() != 0 or not directory.exists():
        return
    if directory.stat().st_uid == identity.owner:
        return
    for path in directory.rglob("*"):
        os.chown(path, identity.owner, identity.owner, follow_symlinks=False)
    os.chown(directory, identity.owner, identity.owner)  # last: an interrupted change starts over


def process_lines() -> list[tuple[int, str]]:
    """Process id and command line of every process that can be seen."""
    proc = Path("/proc")
    if not (proc / "self" / "cmdline").exists():
        ps = shutil.which("ps") or "/bin/ps"
        text = subprocess.run(  # noqa: S603
            [ps, "-axo", "pid=,command="], capture_output=True, text=True, check=True
        ).stdout
        pairs = (line.strip().partition(" ") for line in text.splitlines())
        return [(int(pid), line) for pid, _, line in pairs]
    found = []
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append((int(entry.name), line.decode(errors="replace")))
    return found


def end_leftovers(mark: str, number: signal.Signals, *, seconds: float) -> None:
    """Ends what a killed run left behind: every process whose command line holds `mark`.

    Args:
        mark: Text that only this data directory's servers carry.
        number: First asked with this signal, and killed after `seconds`.
        seconds: How long to wait before killing.

    Raises:
        ServerFailed: They cannot be ended, as when another user started them.
    """
    deadline = time.monotonic() + seconds
    asked: set[int] = set()
    while pids := [pid for pid, line in process_lines() if mark in line and pid != os.getpid()]:
        is_late = time.monotonic() > deadline
        if time.monotonic() > deadline + 10:
            raise ServerFailed(f"Processes {pids} of an earlier run cannot be stopped.")
        for pid in pids:
            if is_late or pid not in asked:
                asked.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGKILL if is_late else number)
        time.sleep(0.05)


def _probe(binary: Path, directory: Path, identity: Identity) -> str | None:
    line = launch_line(
        [str(binary), "--version"],
        identity=identity,
        directory=directory,
        death_signal=signal.SIGKILL,
    )
    done = subprocess.run(  # noqa: S603
        line, capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]

"""The data directory: who holds it, and where its running servers can be reached."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Literal, NamedTuple

from app.errors import Conflict

Role = Literal["up", "command"]


class Endpoints(NamedTuple):
    """Where the database and the broker are."""

    database_url: str
    redis_url: str


class DataDirectoryInUse(Conflict):
    """Another process of Retain holds the data directory."""

    code = "data_directory_in_use"


class DataDirectory:
    """The lock on a data directory; the kernel frees it when the holder dies, however it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._lock_path = self.path / "retain.lock"
        self._endpoints_path = self.path / "endpoints.json"
        self._file: IO[str] | None = None

    def acquire(self, role: Role) -> None:
        """Takes the directory for this process.

        Raises:
            DataDirectoryInUse: Another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "logs").mkdir(exist_ok=True)
        file = self._lock_path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            holder = self.find_holder()
            who = "another process" if holder is None else f"process {holder[0]}"
            raise DataDirectoryInUse(
                f"Retain is already running on {self.path} ({who}). Stop it first, or choose another"
                " --data-dir."
            ) from None
        self._file = file
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "role": role}))
        file.flush()
        self._endpoints_path.unlink(missing_ok=True)  # of a run that was killed

    def release(self) -> None:
        """Gives the directory back; does nothing when it is not held."""
        if self._file is not None:
            self._endpoints_path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def publish(self, endpoints: Endpoints) -> None:
        """Tells operator commands where the running servers are."""
        fresh = self._endpoints_path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(endpoints._asdict()))
        fresh.rename(self._endpoints_path)

    def find_endpoints(self) -> Endpoints | None:
        """Where the holder's servers are, or None while it has not said so."""
        try:
            return Endpoints(**json.loads(self._endpoints_path.read_text()))
        except FileNotFoundError:
            return None

    def find_holder(self) -> tuple[int, Role] | None:
        """Process id and role of who took the directory last."""
        try:
            holder = json.loads(self._lock_path.read_text())
            return int(holder["pid"]), holder["role"]
        except (FileNotFoundError, json.JSONDecodeError):
            return None  # it is just being written

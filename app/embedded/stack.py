"""The processes of `retain up`: API, control loops and workers, started, watched, restarted and stopped."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

import app
from app.embedded import processes
from app.embedded.directory import Endpoints
from app.embedded.processes import Identity, ServerFailed
from app.embedded.services import EmbeddedServices
from app.settings import Settings

READY_SECONDS = 120.0
POLL_SECONDS = 0.2
FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a child that ran this long starts again at once
MAX_CRASHES_BEFORE_READY = 3
MAX_LOG_BYTES = 20 * 2**20
ROOT = Path(app.__file__).resolve().parent.parent

log = structlog.get_logger()


@dataclass
class Child:
    """One process of the stack, and how often it has died lately."""

    name: str
    command: Sequence[str]
    stop_seconds: float
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    num_crashes: int = 0
    retry_at: float = field(default=0.0)


class Stack:
    """API, control loops and workers over running services.

    Start it from the main thread: the children are killed when that thread ends, however it ends.

    Args:
        services: Started; what dies of it is started again.
        endpoints: Where the services are.
        settings: Passed on to the children through the environment.
        port: Where the API listens.
        num_workers: Worker processes.
    """

    def __init__(
        self,
        services: EmbeddedServices,
        endpoints: Endpoints,
        settings: Settings,
        *,
        port: int,
        num_workers: int,
    ) -> None:
        self._services = services
        self._logs = services.directory.path / "logs"
        self._environment = _environment(settings, endpoints, port)
        self._health_url = f"http://{_reachable(settings.host)}:{port}/healthz"
        self.url = f"http://{_bracketed(settings.host)}:{port}"
        python = sys.executable
        api = [
            *(python, "-m", "uvicorn", "app.main:create_app_from_environment", "--factory"),
            *("--host", settings.host, "--port", str(port)),
            *("--workers", str(settings.api_processes), "--timeout-graceful-shutdown", "5"),
            *("--no-access-log", "--no-server-header"),
        ]
        drain_seconds = settings.stop_grace_seconds + 5
        self._children = [
            Child("api", api, 8),
            Child("control", [python, "-m", "app.control"], 8),
            *(
                Child(f"worker-{n}", [python, "-m", "workers.celery_app"], drain_seconds)
                for n in range(num_workers)
            ),
        ]

    def run(self, stop: threading.Event, *, announce: Callable[[str], None]) -> None:
        """Runs until `stop` is set; `announce` gets the address once the API answers.

        Raises:
            ServerFailed: A process keeps dying before the API answered, or the API never does.
        """
        deadline = time.monotonic() + READY_SECONDS
        is_ready = False
        try:
            while not stop.is_set():
                self._keep_alive(is_ready=is_ready)
                if not is_ready and self._answers():
                    is_ready = True
                    announce(self.url)
                if not is_ready and time.monotonic() > deadline:
                    raise ServerFailed(
                        f"The API did not answer within {READY_SECONDS:.0f} s; see {self._logs}."
                    )
                stop.wait(POLL_SECONDS if is_ready else POLL_SECONDS / 4)
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends every child: asks all at once, waits for each as long as it may take, then kills."""
        running = [child for child in self._children if child.process is not None]
        began = time.monotonic()
        for child in running:
            assert child.process is not None
            child.process.terminate()
        for child in running:
            assert child.process is not None
            left = max(child.stop_seconds - (time.monotonic() - began), 0.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(left)
        self.kill()
        for child in running:
            assert child.process is not None
            child.process.wait()
            child.process = None

    def kill(self) -> None:
        """Ends every child at once, with the processes it started in its session."""
        for child in self._children:
            if child.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)

    def _keep_alive(self, *, is_ready: bool) -> None:
        if self._services.revive():
            log.warning("stack.service_restarted")
        for child in self._children:
            if child.process is not None and child.process.poll() is not None:
                self._note_crash(child, is_ready=is_ready)
            if child.process is None and time.monotonic() >= child.retry_at:
                self._start(child)

    def _note_crash(self, child: Child, *, is_ready: bool) -> None:
        assert child.process is not None
        lived = time.monotonic() - child.started_at
        child.num_crashes = 1 if lived >= STEADY_SECONDS else child.num_crashes + 1
        wait = min(FIRST_BACKOFF_SECONDS * 2 ** (child.num_crashes - 1), MAX_BACKOFF_SECONDS)
        child.retry_at = time.monotonic() + (0 if lived >= STEADY_SECONDS else wait)
        status = child.process.returncode
        child.process = None
        log.warning("stack.child_died", child=child.name, status=status, retry_in_seconds=wait)
        if not is_ready and child.num_crashes >= MAX_CRASHES_BEFORE_READY:
            tail = processes.log_tail(self._log_of(child), 20)
            raise ServerFailed(f"{child.name} does not start (exit status {status}):\n{tail}")

    def _start(self, child: Child) -> None:
        path = self._log_of(child)
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        child.process = processes.spawn(
            child.command,
            identity=Identity(),
            directory=ROOT,
            log=path,
            death_signal=signal.SIGKILL,
            environment=self._environment | {"RETAIN_PROCESS": child.name},
        )
        child.started_at = time.monotonic()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self._health_url, timeout=2) as response:  # noqa: S310
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _log_of(self, child: Child) -> Path:
        return self._logs / f"{child.name}.log"


def _environment(settings: Settings, endpoints: Endpoints, port: int) -> dict[str, str]:
    """What the children read their settings from; every path absolute, as they run elsewhere."""
    return dict(os.environ) | {
        "RETAIN_DATABASE_URL": endpoints.database_url,
        "RETAIN_REDIS_URL": endpoints.redis_url,
        "RETAIN_DATA_DIR": str(settings.data_dir.resolve()),
        "RETAIN_STORAGE_URL": settings.storage_root,
        "RETAIN_SCRATCH_DIR": str(settings.scratch_root),
        "RETAIN_HOST": settings.host,
        "RETAIN_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reachable(host: str) -> str:
    return _bracketed({"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host))  # noqa: S104

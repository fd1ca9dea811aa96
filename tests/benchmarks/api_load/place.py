"""Where the load is put: an embedded Postgres with fsync on, a project with jobs, and servers as processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
from sqlalchemy import text

from app.db.session import SessionFactory, build_engine, build_session_factory, transaction
from app.domain.identifiers import public_id
from app.domain.states import JobState
from app.embedded import EmbeddedServices
from app.embedded.schema import upgrade
from app.services.keys import create_key
from tests.factories import make_base_model, make_file, make_job, make_project

ROOT = Path(__file__).resolve().parents[3]
READY_SECONDS = 60.0
TICKS = os.sysconf("SC_CLK_TCK")
#: Other columns of a copied job are those of the first one.
COPY = (
    "INSERT INTO jobs (id, project_id, kind, state, spec, base_model_id, training_file_id, seed,"
    " metadata, attempt, worker_id, lease_expires_at, total_steps, progress)"
    " SELECT gen_random_uuid(), project_id, kind, CAST(:state AS text), spec, base_model_id,"
    " training_file_id, n, jsonb_build_object('n', CAST(n % 1000 AS text)), attempt,"
    " CASE WHEN :state = 'running' THEN 'w' END,"
    " CASE WHEN :state = 'running' THEN now() + interval '1 day' END, total_steps, progress"
    " FROM jobs, generate_series(1, :count) AS n WHERE id = :first"
)


@dataclass
class Place:
    """A database with a project, and what a server of it needs to know."""

    factory: SessionFactory
    environment: dict[str, str]
    project_id: UUID
    base: str
    file_id: str
    key: str
    first: UUID
    logs: Path

    def add_jobs(self, count: int, state: JobState = JobState.PAUSED) -> list[UUID]:
        """Copies the first job so many times; the copies, newest first."""
        with transaction(self.factory) as session:
            values = {"count": count, "first": self.first, "state": state.value}
            session.execute(text(COPY), values)
            newest = text("SELECT id FROM jobs ORDER BY seq DESC LIMIT :count")
            found = list(session.scalars(newest, {"count": count}))
        with transaction(self.factory) as session:
            session.execute(text("ANALYZE jobs"))
        return found

    def path_of(self, job_id: UUID) -> str:
        """A job's path in Retain."""
        return f"/v1/fine_tuning/jobs/{public_id('job', job_id)}"


@dataclass
class Server:
    """A server process."""

    port: int
    process: "subprocess.Popen[bytes]"

    def cpu_seconds(self) -> float:
        """That it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def megabytes(self, field: str = "VmRSS") -> float:
        """Resident, now or (`VmHWM`) at most so far."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        found = next(line for line in lines if line.startswith(field))
        return int(found.split()[1]) / 1024


@contextmanager
def open_place(directory: Path) -> Iterator[Place]:
    """Starts the database and fills in what jobs point at."""
    services = EmbeddedServices(directory)
    endpoints = services.start()
    engine = build_engine(endpoints.database_url)
    try:
        upgrade(endpoints.database_url)
        factory = build_session_factory(engine)
        with transaction(factory) as session:
            project = make_project(session)
            general = make_file(session)
            base = make_base_model(session, name="base", general_file_id=general.id)
            file = make_file(session, project)
            job = make_job(
                session,
                project,
                base_model_id=base.id,
                training_file_id=file.id,
                state=JobState.PAUSED,
                total_steps=200,
            )
            key = create_key(session, project_id=project.id, name="load").text
        environment = {
            "RETAIN_DATABASE_URL": endpoints.database_url,
            "RETAIN_REDIS_URL": endpoints.redis_url,
            "RETAIN_DATA_DIR": str(directory),
            "RETAIN_REQUESTS_PER_MINUTE_PER_KEY": "0",
            "RETAIN_REQUESTS_PER_MINUTE_PER_PROJECT": "0",
            "RETAIN_MAX_QUEUED_JOBS": "1000000",
        }
        yield Place(
            factory=factory,
            environment=environment,
            project_id=project.id,
            base=base.name,
            file_id=public_id("file", file.id),
            key=key,
            first=job.id,
            logs=directory,
        )
    finally:
        engine.dispose()
        services.stop()


@contextmanager
def serve(place: Place, factory: str) -> Iterator[Server]:
    """One uvicorn process with the same switches as in `retain up`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = place.logs / f"{factory.replace(':', '-')}.log"
    switches = ("--no-access-log", "--no-server-header", "--log-level", "warning")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", factory, "--factory", "--port", str(port), *switches],
            cwd=ROOT,
            env=os.environ | place.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/openapi.json"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(errors="replace")[-2000:])
            time.sleep(0.1)
        yield Server(port, process)
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10.0).is_success
    except httpx.TransportError:
        return False

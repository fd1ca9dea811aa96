"""A fleet of real processes over a real database: workers, control loops, an API; and what a test asks of them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from sqlalchemy import func, select

from app.db.models import BaseModel, Checkpoint, Job, JobEvent, Project, Worker
from app.db.repositories.jobs import JobRepository
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.domain.policy import Policy
from app.domain.scopes import DEFAULT_SCOPES
from app.domain.states import JobState
from app.embedded.processes import find_free_port
from app.services.keys import create_key
from app.services.storage import Storage
from app.settings import Settings
from tests.factories import make_job, make_project, make_spec, make_training
from tests.faults.processes import eventually, is_alive
from tests.stored import store_base_model, store_file

ROOT = Path(__file__).resolve().parents[2]
SLACK_SECONDS = 2.5  # for starting processes on a busy machine

Process = subprocess.Popen[bytes]


@dataclass
class Fleet:
    """Processes by name, over one database and one store; everything is ended by `stop`."""

    factory: SessionFactory
    settings: Settings
    log: Path
    ids: dict[str, UUID]
    processes: dict[str, Process] = field(default_factory=dict)
    numbers: "count[int]" = field(default_factory=lambda: count(1))

    @property
    def takeover_seconds(self) -> float:
        """A new attempt runs so long after a death at most: lease, sweep, first wait and poll."""
        s = self.settings
        times = (s.lease_ttl_seconds * 13 / 12, s.reap_seconds, s.poll_seconds, SLACK_SECONDS)
        return allowed(sum(times))

    # ---- processes

    def worker(
        self,
        scenario: str = "paced",
        *arguments: str,
        pace: float = 0.05,
        name: str | None = None,
        database_url: str | None = None,
        redis_url: str | None = None,
        scratch: str = "",
        **settings: object,
    ) -> Process:
        """A worker process with the scripted trainer; under Celery where a broker is given."""
        name = name or f"worker-{next(self.numbers)}"
        line = ["-m", "tests.faults.worker", scenario, "--pace", str(pace), *arguments]
        if redis_url is not None:
            line.append("--celery")
        own = {
            "database_url": database_url or self.settings.database_url,
            "redis_url": redis_url,
            "scratch_dir": self.settings.data_dir / (scratch or "scratch"),
        }
        return self.start(name, line, own | settings)

    def wait_for_workers(self, number: int) -> None:
        """Waits until so many workers are on the roll: they are up and look for jobs."""

        def are_there() -> bool:
            with transaction(self.factory) as session:
                return len(session.scalars(select(Worker.id)).all()) >= number

        eventually(are_there, f"{number} workers", tail=self.tail)

    def control(self, **settings: object) -> Process:
        """The control loops."""
        own = {"redis_url": self.settings.redis_url}
        return self.start("control", ["-m", "app.control"], own | settings)

    def api(self, **settings: object) -> "Client":
        """An API process, and a client with a key of the fleet's project."""
        with transaction(self.factory) as session:
            key = create_key(
                session, project_id=self.ids["project"], name="key", scopes=DEFAULT_SCOPES
            )
            base = session.get_one(BaseModel, self.ids["base"]).name
        port = find_free_port()
        line = ["-m", "uvicorn", "app.main:create_app_from_environment", "--factory"]
        line += ["--port", str(port), "--log-level", "warning"]
        own: dict[str, object] = {"redis_url": self.settings.redis_url, "max_queued_jobs": 10_000}
        self.start("api", line, own | settings)
        client = Client(
            f"http://127.0.0.1:{port}",
            key.text,
            {
                "model": base,
                "training_file": public_id("file", self.ids["rows"]),
                "retention": None,
            },
        )
        eventually(client.is_up, "the API is up", tail=self.tail)
        return client

    def start(self, name: str, line: list[str], settings: dict[str, object]) -> Process:
        """A Python process with the fleet's settings, in a group of its own."""
        merged = self.settings.model_dump(exclude_none=True, include=PASSED_ON) | settings
        environment = os.environ | {
            f"RETAIN_{key.upper()}": str(value)
            for key, value in merged.items()
            if value is not None
        }
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *line],
                env=environment | {"RETAIN_PROCESS": name, "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def stop(self) -> None:
        """Ends everything at once."""
        for process in self.processes.values():
            signal_group(process, signal.SIGKILL)
            process.wait()

    # ---- jobs

    def submit(self, *, steps: int = 20, policy: Policy | None = None, **overrides: Any) -> UUID:
        """A queued job with its bell in the outbox."""
        with transaction(self.factory) as session:
            spec = make_spec(training=make_training(total_steps=steps), policy=policy)
            job = make_job(
                session,
                session.get_one(Project, self.ids["project"]),
                base_model_id=self.ids["base"],
                training_file_id=self.ids["rows"],
                spec=spec.model_dump(mode="json"),
                total_steps=steps,
                **overrides,
            )
            JobRepository(session).add_bell(job.id)
        return job.id

    def job(self, job_id: UUID) -> Job:
        with transaction(self.factory) as session:
            return session.get_one(Job, job_id)

    def rows(self, kind: type[Any], job_id: UUID) -> list[Any]:
        with transaction(self.factory) as session:
            query = select(kind).where(kind.job_id == job_id).order_by(kind.seq)
            return list(session.scalars(query))

    def events(self, job_id: UUID, code: str) -> list[JobEvent]:
        """A job's events of one code."""
        found = self.rows(JobEvent, job_id)
        return [event for event in found if (event.data or {}).get("code") == code]

    def claimed(self, job_id: UUID, attempt: int) -> JobEvent:
        """Waits for an attempt; its event."""

        def found() -> JobEvent | None:
            claims = self.events(job_id, "claimed")
            return next((e for e in claims if (e.data or {})["attempt"] == attempt), None)

        event: JobEvent = eventually(found, f"attempt {attempt}", tail=self.tail)
        return event

    def reaches(self, job_id: UUID, step: int) -> Job:
        """Waits until the trainer is at a step."""
        eventually(lambda: self.job(job_id).step >= step, f"step {step}", tail=self.tail)
        return self.job(job_id)

    def ends(self, job_id: UUID, state: JobState = JobState.SUCCEEDED) -> Job:
        """Waits until the job is over, as it should be."""
        eventually(lambda: self.job(job_id).state.is_terminal, "the job ends", tail=self.tail)
        job = self.job(job_id)
        assert job.state is state, (job.error, self.tail())
        return job

    def holder(self, job_id: UUID) -> Process:
        """The worker process that holds a job."""
        worker_id = eventually(lambda: self.job(job_id).worker_id, "a worker has it")
        pid = int(worker_id.split(":")[-2])
        return next(process for process in self.processes.values() if process.pid == pid)

    def count(self, state: JobState) -> int:
        """How many jobs are in a state."""
        with transaction(self.factory) as session:
            query = select(func.count()).select_from(Job).where(Job.state == state)
            return session.scalar(query) or 0

    def tail(self) -> str:
        """The end of what the processes wrote."""
        return "\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])

    def check_history(self, job_id: UUID, *, attempts: int) -> None:
        """What holds for every history: rising attempts, one end, and nothing by an attempt after the next began."""
        job, events = self.job(job_id), self.rows(JobEvent, job_id)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        claims = [e for e in events if (e.data or {}).get("code") == "claimed"]
        numbers = [(e.data or {})["attempt"] for e in claims]
        assert numbers == list(range(1, attempts + 1)), (numbers, self.tail())
        assert job.attempt == attempts
        words = [e.data["status"] for e in events if "status" in (e.data or {})]
        ends = [JobState(word).is_terminal for word in words]
        assert ends.count(True) == int(job.state.is_terminal)
        for checkpoint in self.rows(Checkpoint, job_id):
            later = claims[checkpoint.attempt :]
            assert all(checkpoint.created_at < claim.created_at for claim in later)


@dataclass
class Client:
    """A caller of the API; a new connection each time, as after a restart."""

    url: str
    key: str
    body: dict[str, object]

    def post_job(self, idempotency_key: str | None = None) -> httpx.Response:
        """Submits a job."""
        headers = {"authorization": f"Bearer {self.key}"}
        if idempotency_key is not None:
            headers["idempotency-key"] = idempotency_key
        return httpx.post(
            f"{self.url}/v1/fine_tuning/jobs", json=self.body, headers=headers, timeout=30
        )

    def is_up(self) -> bool:
        """Whether it answers at all."""
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


PASSED_ON = {
    *("database_url", "data_dir", "lease_ttl_seconds", "beat_seconds", "reap_seconds"),
    *("poll_seconds", "stop_grace_seconds", "partition_grace_seconds", "stall_seconds"),
    *("max_crashes",),
}


def allowed(seconds: float) -> float:
    """A bound that holds on an idle machine; longer where more wants to run than there are cores."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def signal_group(process: Process, number: signal.Signals) -> None:
    """Sends a signal to a process and its own children; a trainer is in a group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def wait_dead(pids: list[int], *, seconds: float) -> float:
    """Waits until processes are gone; how long it took."""
    began = time.monotonic()
    eventually(lambda: not any(is_alive(pid) for pid in pids), "they are gone", seconds=seconds)
    return time.monotonic() - began


def make_fleet(factory: SessionFactory, settings: Settings, root: Path) -> Fleet:
    """A fleet without processes yet, over a project with a base model and rows."""
    storage = Storage(settings.storage_root)
    base = root / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({}))
    with transaction(factory) as session:
        project = make_project(session)
        stored = {
            "project": project,
            "base": store_base_model(session, storage, base),
            "rows": store_file(session, storage, project, '{"text": "a"}\n', root / "files"),
        }
        ids = {name: row.id for name, row in stored.items()}
    return Fleet(factory, settings, root / "log", ids)


def measured(row: str, **figures: float | str) -> None:
    """Prints what a row measured; RESULTS.md is made of these lines (`pytest -rA` or `-s` shows them)."""
    shown = ", ".join(
        f"{name}={value:.2f}" if isinstance(value, float) else f"{name}={value}"
        for name, value in figures.items()
    )
    print(f"MEASURED {row}: {shown}", flush=True)
    path = os.environ.get("RETAIN_FAULT_FIGURES")
    if path:
        with Path(path).open("a") as file:
            file.write(f"{row}: {shown}\n")

"""Real workers, trainers, Postgres and Redis: whatever is killed, the run ends as if nothing had been.

The job under test forgets at once and is rolled back to its start, then holds; an uninterrupted run of the same
job says what the others have to end with, bit for bit.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from app.db.models import (
    Checkpoint,
    DecisionRow,
    File,
    Job,
    JobEvent,
    ModelVersion,
    Project,
    Worker,
)
from app.db.repositories.jobs import JobRepository
from app.db.session import SessionFactory, build_engine, build_session_factory, transaction
from app.domain.benchmarks import Scorer
from app.domain.configs.quadratic import L2SpConfig
from app.domain.policy import EarlyStopping, Ladder, Policy, WatchedBenchmark
from app.domain.requests import PublishPoint
from app.domain.states import JobState
from app.embedded import Endpoints
from app.services.control import request_cancel, request_pause, resume_job
from app.services.registry import publish_point
from app.services.storage import Storage
from app.settings import Settings
from tests.databases import clone_database, drop_database
from tests.factories import make_job, make_project, make_spec, make_training
from tests.stored import store_base_model, store_benchmark, store_file
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 10  # steps between evaluations
SAVED_EVERY = 5  # steps between checkpoints
TOTAL_STEPS = 40
WAIT_SECONDS = 120.0

pytestmark = pytest.mark.timeout(400)


@dataclass
class Stack:
    """Control loops and a worker as processes, over a database and a store with everything a job needs."""

    factory: SessionFactory
    settings: Settings
    endpoints: Endpoints
    log: Path
    ids: dict[str, UUID]
    benchmark: str
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(
        self, name: str, *, redis_url: str | None = None, queues: str = "default"
    ) -> "subprocess.Popen[bytes]":
        module = "app.control" if name == "control" else "workers.celery_app"
        settings = self.settings
        environment = os.environ | {
            "RETAIN_DATABASE_URL": settings.database_url or "",
            "RETAIN_REDIS_URL": redis_url or settings.redis_url or "",
            "RETAIN_QUEUES": queues,
            "RETAIN_DATA_DIR": str(settings.data_dir),
            "RETAIN_LEASE_TTL_SECONDS": "3",
            "RETAIN_BEAT_SECONDS": "0.5",
            "RETAIN_REAP_SECONDS": "0.5",
            "RETAIN_POLL_SECONDS": "1",
            "RETAIN_TORCH_THREADS": "1",
            "RETAIN_PROCESS": name,
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=environment,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def stop(self) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def submit(self) -> UUID:
        policy = Policy(
            benchmarks=(WatchedBenchmark(name=self.benchmark),),
            eval_interval=INTERVAL,
            gate_items=20,
            ladder=Ladder(
                repair=False, rollback_strength_factor=1000.0, rollback_learning_rate_factor=0.01
            ),
            early_stopping=EarlyStopping(enabled=False),
        )
        training = make_training(
            total_steps=TOTAL_STEPS,
            learning_rate=1e-2,
            batch_size=16,
            max_seq_length=128,
            max_tokens_per_micro_batch=2048,
            checkpoint_interval=SAVED_EVERY,
        )
        spec = make_spec(training=training, strategies=(L2SpConfig(strength=0.01),), policy=policy)
        with transaction(self.factory) as session:
            job = make_job(
                session,
                session.get_one(Project, self.ids["project"]),
                base_model_id=self.ids["base"],
                training_file_id=self.ids["rows"],
                validation_file_id=self.ids["validation"],
                spec=spec.model_dump(mode="json"),
            )
            JobRepository(session).add_bell(job.id)
        return job.id

    def job(self, job_id: UUID) -> Job:
        with transaction(self.factory) as session:
            return session.get_one(Job, job_id)

    def rows(self, kind: type[Any], job_id: UUID) -> list[Any]:
        with transaction(self.factory) as session:
            return list(
                session.scalars(select(kind).where(kind.job_id == job_id).order_by(kind.seq))
            )

    def wait(self, holds: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            found = holds()
            if found:
                return found
            time.sleep(0.02)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
        raise AssertionError(f"never: {what}\n{tail}")

    def ends(self, job_id: UUID) -> Job:
        self.wait(lambda: self.job(job_id).state.is_terminal, "the job ends")
        return self.job(job_id)

    def saves(self, job_id: UUID, step: int, branch: int = 1) -> Checkpoint:
        """Waits until a checkpoint of this step or a later one is registered."""

        def found() -> Checkpoint | None:
            rows = self.rows(Checkpoint, job_id)
            return next((c for c in rows if c.branch == branch and c.step >= step), None)

        saved: Checkpoint = self.wait(found, f"a checkpoint at step {step}")
        return saved

    def outcome(self, job_id: UUID) -> dict[str, Any]:
        """What may not depend on what was killed: weights, decisions and the result file's numbers."""
        job = self.ends(job_id)
        assert job.state is JobState.SUCCEEDED, (job.error, self.log.read_text()[-4000:])
        with transaction(self.factory) as session:
            version = session.get_one(ModelVersion, job.model_version_id)
            result = session.get_one(File, job.result_file_id)
        storage = Storage(self.settings.storage_root)
        losses = [
            line.split(",")[:3] for line in storage.read_bytes(result.path).decode().splitlines()
        ]
        decisions = self.rows(DecisionRow, job_id)
        return {
            "weights": storage.read_bytes(f"{version.path}/model.safetensors"),
            "decisions": [
                (d.branch, d.step, d.action, json.dumps(d.decision["state"])) for d in decisions
            ],
            "losses": losses,
        }

    def check_history(self, job_id: UUID, *, attempts: int) -> None:
        """What holds for every history: one end, no gap, rising attempts."""
        job = self.job(job_id)
        events = self.rows(JobEvent, job_id)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        claims = [e.data["attempt"] for e in events if (e.data or {}).get("code") == "claimed"]
        assert claims == list(range(1, attempts + 1))
        states = [event.data["status"] for event in events if "status" in (event.data or {})]
        assert [JobState(state).is_terminal for state in states].count(True) == 1
        assert states[-1] == job.state.value
        assert job.attempt == attempts


@pytest.fixture(scope="module")
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("kills")
    database = clone_database(template_url)
    settings = Settings(data_dir=root / "data", database_url=database, redis_url=servers.redis_url)
    engine = build_engine(database)
    factory = build_session_factory(engine)
    ids, benchmark = fill(factory, Storage(settings.storage_root), root)
    stack = Stack(factory, settings, servers, root / "log", ids, benchmark)
    stack.start("control")
    stack.start("worker")
    yield stack
    stack.stop()
    engine.dispose()
    drop_database(database)


@pytest.fixture(scope="module")
def reference(stack: Stack) -> dict[str, Any]:
    """The outcome of a run that nothing happened to."""
    job_id = stack.submit()
    outcome = stack.outcome(job_id)
    assert [(step, action) for _, step, action, _ in outcome["decisions"]][:1] == [
        (INTERVAL, "roll_back")
    ]
    assert outcome["decisions"][-1][:2] == (1, TOTAL_STEPS)
    return outcome


def fill(factory: SessionFactory, storage: Storage, root: Path) -> tuple[dict[str, UUID], str]:
    """A tiny base model, rows in lower case to learn, and texts of digits not to forget."""
    base = make_tiny_model(root / "base")
    generator = random.Random(0)

    def text(letters: str, words: int) -> str:
        return " ".join("".join(generator.choices(letters, k=7)) for _ in range(words))

    rows = "".join(json.dumps({"text": text("abcdef", 14)}) + "\n" for _ in range(200))
    validation = "".join(json.dumps({"text": text("abcdef", 6)}) + "\n" for _ in range(8))
    items = "".join(
        json.dumps({"id": f"i{n}", "text": text("0123456789", 5)}) + "\n" for n in range(60)
    )
    with transaction(factory) as session:
        project = make_project(session)
        stored: dict[str, Any] = {
            "project": project,
            "base": store_base_model(session, storage, base, has_chat_template=False),
            "rows": store_file(session, storage, project, rows, root / "files"),
            "validation": store_file(session, storage, project, validation, root / "files"),
        }
        file = store_file(session, storage, None, items, root / "files", purpose="evals")
        store_benchmark(session, file, 60, name="digits", scorer=Scorer.NLL, chance=0.0)
        return {name: row.id for name, row in stored.items()}, "digits@1"


def trainers(job_id: UUID) -> list[int]:
    """Process ids of a job's live trainers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                if job_id.hex in line and "workers.training.trainer" in line:
                    found.append(int(entry.name))
    return found


def test_a_trainer_killed_mid_step_costs_at_most_one_interval(
    stack: Stack, reference: dict[str, Any]
):
    job_id = stack.submit()
    killed_after = stack.saves(job_id, 20)
    [pid] = trainers(job_id)
    os.kill(pid, signal.SIGKILL)
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)
    job = stack.job(job_id)
    assert job.run_plan is not None
    assert job.run_plan["resume"]["branch"] == 1
    assert job.run_plan["resume"]["step"] >= killed_after.step
    assert job.crashes_without_progress == 0  # forgiven by the checkpoints that followed


def test_a_trainer_killed_around_a_rollback_rolls_back_once(
    stack: Stack, reference: dict[str, Any]
):
    job_id = stack.submit()
    stack.wait(
        lambda: [d for d in stack.rows(DecisionRow, job_id) if d.action == "roll_back"],
        "the rollback",
    )
    for pid in trainers(job_id):
        os.kill(pid, signal.SIGKILL)
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)
    left = [c for c in stack.rows(Checkpoint, job_id) if c.branch == 0 and c.step > 0]
    assert left
    assert all(checkpoint.superseded for checkpoint in left)


def test_a_killed_worker_takes_its_trainer_along_and_another_goes_on(
    stack: Stack, reference: dict[str, Any]
):
    job_id = stack.submit()
    stack.saves(job_id, 15)
    pids = trainers(job_id)
    worker = stack.processes["worker"]
    worker.kill()
    worker.wait()
    died = time.monotonic()
    stack.wait(lambda: not any(is_alive(pid) for pid in pids), "the trainer is gone")
    assert time.monotonic() - died < 2
    stack.start("worker")
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)


def test_a_drained_worker_saves_and_the_next_goes_on(stack: Stack, reference: dict[str, Any]):
    job_id = stack.submit()
    stack.saves(job_id, 15)
    worker = stack.processes["worker"]
    worker.terminate()
    assert worker.wait(60) == 0
    job = stack.job(job_id)
    assert (job.state, job.crashes_without_progress) == (JobState.QUEUED, 0)
    saved = next(c for c in stack.rows(Checkpoint, job_id) if c.id == job.ckpt_id)
    assert saved.step == job.step >= 15  # nothing was lost
    stack.start("worker")
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)


def test_pause_then_resume_and_cancel(stack: Stack, reference: dict[str, Any]):
    job_id = stack.submit()
    stack.saves(job_id, 15)
    project_id = stack.ids["project"]
    with transaction(stack.factory) as session:
        request_pause(session, project_id=project_id, job_id=job_id)
    stack.wait(lambda: stack.job(job_id).state is JobState.PAUSED, "paused")
    assert stack.job(job_id).step >= 15
    with transaction(stack.factory) as session:
        resume_job(session, project_id=project_id, job_id=job_id)
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)

    cancelled_id = stack.submit()
    stack.saves(cancelled_id, 0, branch=0)
    with transaction(stack.factory) as session:
        request_cancel(session, project_id=project_id, job_id=cancelled_id)
    assert stack.ends(cancelled_id).state is JobState.CANCELLED
    stack.wait(lambda: not trainers(cancelled_id), "its trainer is gone")
    stack.check_history(cancelled_id, attempts=1)


@pytest.mark.slow
def test_a_point_of_a_finished_run_is_exported_though_its_trainer_is_killed(
    stack: Stack, reference: dict[str, Any]
):
    job_id = stack.submit()
    stack.outcome(job_id)
    with transaction(stack.factory) as session:
        asked = publish_point(session, stack.ids["project"], job_id, PublishPoint(alpha=0.5))
        version_id, export_id = asked[0].row.id, asked[1].id
    [pid] = stack.wait(lambda: trainers(export_id), "its trainer")
    os.kill(pid, signal.SIGKILL)
    export = stack.ends(export_id)
    assert (export.state, export.attempt) == (JobState.SUCCEEDED, 2), export.error
    with transaction(stack.factory) as session:
        version = session.get_one(ModelVersion, version_id)
    assert (version.status, version.alpha, version.kind) == ("ready", 0.5, "full")
    assert version.verdict is not None
    storage = Storage(stack.settings.storage_root)
    weights = storage.read_bytes(f"{version.path}/model.safetensors")
    assert len(weights) == len(reference["weights"])
    assert weights != reference["weights"]


def test_a_worker_works_and_stops_without_a_broker(stack: Stack):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
    worker = stack.start("lonely", redis_url=closed, queues="nobody-uses-this")

    def is_on_the_roll() -> bool:
        with transaction(stack.factory) as session:
            ids = session.scalars(select(Worker.id)).all()
        return any(f":{worker.pid}:" in worker_id for worker_id in ids)

    stack.wait(is_on_the_roll, "it signs in")
    worker.terminate()
    assert worker.wait(30) == 0
    assert not is_on_the_roll()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    with suppress(FileNotFoundError):
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    return False

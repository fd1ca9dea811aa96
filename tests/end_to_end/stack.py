"""Control loops and a worker as processes over a real database, and what a test asks of them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import select

from app.db.models import Checkpoint, DecisionRow, File, Job, JobEvent, ModelVersion, Project
from app.db.repositories.jobs import JobRepository
from app.db.session import SessionFactory, build_engine, build_session_factory, transaction
from app.domain.benchmarks import Scorer
from app.domain.configs.quadratic import L2SpConfig
from app.domain.policy import EarlyStopping, Ladder, Policy, WatchedBenchmark
from app.domain.scopes import DEFAULT_SCOPES
from app.domain.spec import JobSpec
from app.domain.states import JobState
from app.domain.strategies import StrategyConfig
from app.embedded import Endpoints
from app.services.keys import create_key
from app.services.storage import Storage
from app.settings import Settings
from tests.databases import clone_database, drop_database
from tests.factories import make_job, make_project, make_spec, make_training
from tests.serving import serving
from tests.stored import store_base_model, store_benchmark, store_file
from tests.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 120.0


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

    def submit(self, spec: JobSpec) -> UUID:
        with transaction(self.factory) as session:
            job = make_job(
                session,
                session.get_one(Project, self.ids["project"]),
                base_model_id=self.ids["base"],
                training_file_id=self.ids["rows"],
                validation_file_id=self.ids["validation"],
                general_file_id=self.ids["general"],
                spec=spec.model_dump(mode="json"),
                total_steps=spec.training.total_steps,
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

    def wait(self, holds: Callable[[], Any], what: str, *, seconds: float = WAIT_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
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


@contextmanager
def running_stack(servers: Endpoints, template_url: str, root: Path) -> Iterator[Stack]:
    """A stack with one worker, over a database of its own; gone afterwards."""
    database = clone_database(template_url)
    settings = Settings(data_dir=root / "data", database_url=database, redis_url=servers.redis_url)
    engine = build_engine(database)
    factory = build_session_factory(engine)
    ids, benchmark = fill(factory, Storage(settings.storage_root), root)
    stack = Stack(factory, settings, servers, root / "log", ids, benchmark)
    stack.start("control")
    stack.start("worker")
    try:
        yield stack
    finally:
        stack.stop()
        engine.dispose()
        drop_database(database)


@contextmanager
def served(stack: Stack) -> Iterator[tuple[str, str]]:
    """The API over a stack: its address and a key of the stack's project."""
    with transaction(stack.factory) as session:
        key = create_key(
            session, project_id=stack.ids["project"], name="k", scopes=DEFAULT_SCOPES
        ).text
    with serving(stack.settings, stack.factory) as url:
        yield url, key


def forgetting(
    benchmark: str, *more: StrategyConfig, total_steps: int, interval: int, saved_every: int
) -> JobSpec:
    """A job that forgets at once, is rolled back with more strength, and then holds.

    Args:
        benchmark: That is watched.
        more: Strategies beside its own.
        total_steps: Of training.
        interval: Steps from one evaluation to the next.
        saved_every: Steps from one checkpoint to the next.
    """
    policy = Policy(
        benchmarks=(WatchedBenchmark(name=benchmark),),
        eval_interval=interval,
        gate_items=20,
        ladder=Ladder(
            repair=False, rollback_strength_factor=1000.0, rollback_learning_rate_factor=0.01
        ),
        early_stopping=EarlyStopping(enabled=False),
    )
    training = make_training(
        total_steps=total_steps,
        learning_rate=1e-2,
        batch_size=16,
        max_seq_length=128,
        max_tokens_per_micro_batch=2048,
        checkpoint_interval=saved_every,
    )
    return make_spec(
        training=training, strategies=(L2SpConfig(strength=0.01), *more), policy=policy
    )


def fill(factory: SessionFactory, storage: Storage, root: Path) -> tuple[dict[str, UUID], str]:
    """A tiny base model, rows in lower case to learn, and texts of digits not to forget."""
    base = make_tiny_model(root / "base")
    generator = random.Random(0)

    def text(letters: str, words: int) -> str:
        return " ".join("".join(generator.choices(letters, k=7)) for _ in range(words))

    rows = "".join(json.dumps({"text": text("abcdef", 14)}) + "\n" for _ in range(200))
    validation = "".join(json.dumps({"text": text("abcdef", 6)}) + "\n" for _ in range(8))
    general = "".join(json.dumps({"text": text("0123456789", 5)}) + "\n" for _ in range(60))
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
            "general": store_file(session, storage, project, general, root / "files"),
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

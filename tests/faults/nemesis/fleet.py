"""A fleet of jobs, workers and control loops under random faults; the same seed draws the same faults."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from uuid import UUID

import psycopg
import redis
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.broker import BellUnreachable, build_celery, ring
from app.db.models import Job, WebhookEndpoint
from app.db.repositories.jobs import JobRepository
from app.db.session import transaction
from app.domain.states import JobState
from app.errors import Conflict
from app.services.control import request_cancel, request_pause, resume_job
from app.services.webhooks import EVENT_TYPES
from tests.faults.conftest import FAST, IMMEDIATE, SHORT, Servers
from tests.faults.fleet import Fleet
from tests.faults.nemesis.nursery import Nursery
from tests.faults.nemesis.trainer import ROLLS_BACK
from tests.faults.processes import find_trainers, is_alive

PACE_SECONDS = 0.1  # of a trainer's step
ZOMBIE_SECONDS = 20.0  # a worker sleeps so long at most until its job is another's
FORGIVING = 50  # crashes in a row: here no job may fail of what the nemesis does
WISHES = {"cancel": request_cancel, "pause": request_pause, "resume": resume_job}


@dataclass
class Nemesis:
    """Does harm for a while, then lets the fleet recover.

    Args:
        fleet: Over a database of its own.
        servers: The fleet's Postgres and Redis.
        nursery: Where processes come from.
        seed: Of the faults.
        unfenced: The workers are mutants that forget the attempt.
    """

    fleet: Fleet
    servers: Servers
    nursery: Nursery
    seed: int
    unfenced: bool = False
    num_workers: int = 3
    done: Counter[str] = field(default_factory=Counter)
    submitted: set[str] = field(default_factory=set)
    job_ids: list[UUID] = field(default_factory=list)
    _due: list[tuple[float, Callable[[], object]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = Random(self.seed)
        self._celery = build_celery(self.servers.redis_url)

    # ---- a run

    def begin(self, num_jobs: int) -> None:
        """Submits the jobs, of which some will roll back, and starts everything."""
        self._add_endpoint()
        for number in range(num_jobs):
            steps = ROLLS_BACK if number % 4 == 0 else self._random.randint(10, 30)
            job_id = self.fleet.submit(steps=steps)
            self.job_ids.append(job_id)
            self.submitted.add(str(job_id))
        self._start_control()
        for number in range(self.num_workers):
            self._start_worker(number)
        self.fleet.wait_for_workers(self.num_workers)

    def harm(self, num_faults: int) -> None:
        """So many random faults, while there are jobs left; long stops of workers among them for certain."""
        faults = self._faults()
        names = list(faults)
        weights = [faults[name][1] for name in names]
        drawn = self._random.choices(names, weights, k=num_faults)
        drawn[2:2], drawn[12:12] = ["make_zombie"], ["make_zombie"]
        for name in drawn:
            if self._are_over():
                break
            try:
                faults[name][0]()
                self.done[name] += 1
            except (SQLAlchemyError, psycopg.Error, redis.RedisError, BellUnreachable, Conflict):
                self.done[f"{name} refused"] += 1
            self._wait(self._random.uniform(0.1, 0.7))
        self._finish_due()

    def recover(self, seconds: float) -> float:
        """Mends what is broken and waits until every job is over; how long that took.

        Raises:
            AssertionError: Some job does not come to its end in time.
        """
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            self._revive()
            with suppress(SQLAlchemyError):
                if self._are_over():
                    return time.monotonic() - began
                self._resume_paused()
            time.sleep(0.1)
        raise AssertionError(f"jobs don't end: {self._states()}{self.fleet.tail()}")

    def settle(self, seconds: float) -> None:
        """Gives writers that are late the time to write."""
        time.sleep(seconds)

    # ---- what it does

    def _faults(self) -> dict[str, tuple[Callable[[], object], int]]:
        return {
            "kill_worker": (self._kill_worker, 2),
            "stop_worker": (self._stop_worker, 3),
            "make_zombie": (self._make_zombie, 1),
            "kill_trainer": (lambda: self._signal_trainer(signal.SIGKILL), 3),
            "stop_trainer": (self._stop_trainer, 2),
            "kill_control": (self._kill_control, 1),
            "terminate_backends": (self._terminate_backends, 4),
            "restart_postgres": (lambda: self._restart_postgres(FAST), 1),
            "crash_postgres": (lambda: self._restart_postgres(IMMEDIATE), 1),
            "flush_redis": (self._flush_redis, 2),
            "cut_redis": (self._cut_redis, 2),
            "double_bells": (self._double_bells, 3),
            "cancel": (lambda: self._ask("cancel"), 1),
            "pause": (lambda: self._ask("pause"), 3),
            "resume": (lambda: self._ask("resume"), 3),
        }

    def _kill_worker(self) -> None:
        number = self._random.randrange(self.num_workers)
        self._kill(f"worker-{number}")
        self._later(self._random.uniform(0.1, 1.5), lambda: self._start_worker(number))

    def _stop_worker(self) -> None:
        """Longer than its lease more often than not: a zombie, once it goes on."""
        process = self.fleet.processes[f"worker-{self._random.randrange(self.num_workers)}"]
        pid, ttl = process.pid, self.fleet.settings.lease_ttl_seconds
        if process.poll() is None:
            os.kill(pid, signal.SIGSTOP)
            wait = self._random.uniform(0.5 * ttl, 2.5 * ttl)
            self._later(wait, lambda: _send(pid, signal.SIGCONT))

    def _make_zombie(self) -> None:
        """A worker that holds a job stops until another has taken the job up, and then goes on."""
        with transaction(self.fleet.factory) as session:
            held = session.scalars(select(Job).where(Job.worker_id.is_not(None)).order_by(Job.seq))
            job = self._random.choice(held.all() or [None])
        if job is None or job.worker_id is None:
            return
        pid = int(job.worker_id.split(":")[1])
        _send(pid, signal.SIGSTOP)
        self._wake_once_replaced(pid, job.id, job.attempt, time.monotonic() + ZOMBIE_SECONDS)

    def _wake_once_replaced(self, pid: int, job_id: UUID, attempt: int, until: float) -> None:
        is_replaced = False
        with suppress(SQLAlchemyError), transaction(self.fleet.factory) as session:
            job = session.get_one(Job, job_id)
            is_replaced = job.attempt > attempt and job.step > 0 and job.state.is_leased
        if is_replaced or time.monotonic() > until:
            _send(pid, signal.SIGCONT)
        else:
            again = partial(self._wake_once_replaced, pid, job_id, attempt, until)
            self._later(0.2, again)

    def _signal_trainer(self, number: signal.Signals) -> int | None:
        for job_id in self._random.sample(self.job_ids, len(self.job_ids)):
            for pid in find_trainers(job_id.hex):
                _send(pid, number)
                return pid
        return None

    def _stop_trainer(self) -> None:
        pid = self._signal_trainer(signal.SIGSTOP)
        if pid is not None:
            self._later(self._random.uniform(0.3, 2.0), lambda: _send(pid, signal.SIGCONT))

    def _kill_control(self) -> None:
        self._kill("control")
        self._later(self._random.uniform(0.1, 1.0), self._start_control)

    def _terminate_backends(self) -> None:
        share = self._random.choice([0.2, 0.5, 1.0])
        assert self.fleet.settings.database_url is not None
        with psycopg.connect(self.fleet.settings.database_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' AND random() < %s",
                [share],
            )

    def _restart_postgres(self, how: int) -> None:
        self.servers.stop_postgres(how)
        time.sleep(self._random.uniform(0, 0.5))
        self.servers.start_postgres()

    def _flush_redis(self) -> None:
        with redis.Redis.from_url(self.servers.redis_url, socket_timeout=2) as client:
            client.flushall()

    def _cut_redis(self) -> None:
        with redis.Redis.from_url(self.servers.redis_url, socket_timeout=2) as client:
            client.client_kill_filter(_type="normal", skipme=True)

    def _double_bells(self) -> None:
        """Bells that nobody asked for: in the outbox, and at the broker itself."""
        job_id = self._random.choice(self.job_ids)
        with transaction(self.fleet.factory) as session:
            for _ in range(2):
                JobRepository(session).add_bell(job_id)
        ring(self._celery, job_id)

    def _ask(self, wish: str) -> None:
        """What fits some job's state, where there is one; else whatever comes of it."""
        fitting = {"pause": JobState.RUNNING, "resume": JobState.PAUSED}.get(wish)
        with transaction(self.fleet.factory) as session:
            found = session.scalars(select(Job.id).where(Job.state == fitting).order_by(Job.seq))
            job_id = self._random.choice(found.all() or self.job_ids)
            WISHES[wish](session, project_id=self.fleet.ids["project"], job_id=job_id)

    # ---- bookkeeping

    def _start_worker(self, number: int) -> None:
        mutant = ["--unfenced"] if self.unfenced else []
        scratch = self.fleet.settings.data_dir / f"scratch-{number}"
        self._fork(f"worker-{number}", ["--pace", str(PACE_SECONDS), *mutant], scratch_dir=scratch)

    def _start_control(self) -> None:
        self._fork("control", [])

    def _fork(self, name: str, arguments: list[str], **own: object) -> None:
        values = self.fleet.settings.model_dump(include={*SHORT, "database_url", "data_dir"})
        values |= {"max_crashes": FORGIVING, "stall_seconds": 8.0, "process": name} | own
        environment = {f"RETAIN_{key.upper()}": str(value) for key, value in values.items()}
        kind = name.partition("-")[0]
        self.fleet.processes[name] = self.nursery.fork(kind, arguments, environment, self.fleet.log)  # type: ignore[assignment]

    def _kill(self, name: str) -> None:
        process = self.fleet.processes[name]
        process.kill()
        process.wait(10)

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        self._due.append((time.monotonic() + seconds, act))

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            now = time.monotonic()
            due = [act for at, act in self._due if at <= now]
            self._due = [(at, act) for at, act in self._due if at > now]
            for act in due:
                act()
            time.sleep(0.02)

    def _finish_due(self) -> None:
        while self._due:
            self._wait(0.05)

    def _revive(self) -> None:
        """Starts again what has ended, as whatever runs production's processes does."""
        for name, process in list(self.fleet.processes.items()):
            if process.poll() is not None:
                if name == "control":
                    self._start_control()
                else:
                    self._start_worker(int(name.rpartition("-")[2]))

    def _states(self) -> Counter[JobState]:
        with transaction(self.fleet.factory) as session:
            return Counter(session.scalars(select(Job.state)))

    def _are_over(self) -> bool:
        try:
            return all(state.is_terminal for state in self._states())
        except SQLAlchemyError:
            return False

    def _resume_paused(self) -> None:
        project = self.fleet.ids["project"]
        with transaction(self.fleet.factory) as session:
            paused = session.scalars(select(Job.id).where(Job.state == JobState.PAUSED)).all()
            for job_id in paused:
                resume_job(session, project_id=project, job_id=job_id)

    def _add_endpoint(self) -> None:
        """A receiver that is never there: its deliveries are what is counted."""
        with transaction(self.fleet.factory) as session:
            session.add(
                WebhookEndpoint(
                    project_id=self.fleet.ids["project"],
                    name="receiver",
                    url="https://receiver.invalid/hook",
                    event_types=list(EVENT_TYPES),
                    secret_encrypted=b"-",
                    secret_hint="----",
                )
            )


def _send(pid: int, number: signal.Signals) -> None:
    if is_alive(pid):
        with suppress(ProcessLookupError):
            os.kill(pid, number)

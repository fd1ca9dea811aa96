"""What a long queue and idle workers cost Postgres: `python -m tests.benchmarks.queue_cost`.

10,000 jobs wait that no worker can take, the worst that a queue can be: 200 idle workers look for jobs every
15 s and sign in every 10 s, the reconciler sweeps and rings again every 10 s, the relay rings, and each bell has
a worker look once more. What is measured is the CPU time of all of Postgres' processes.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from celery import Celery
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.broker import build_celery
from app.control.outbox import relay
from app.control.reconciler import sweep
from app.db.models import Project
from app.db.repositories.delivery import WorkerRepository
from app.db.session import SessionFactory, build_engine, build_session_factory, transaction
from app.embedded.postgres import EmbeddedPostgres
from app.embedded.redis import EmbeddedRedis
from app.services.engine import claim_job
from app.settings import Settings
from tests.databases import migrate
from tests.factories import make_base_model, make_file, make_job, make_project

JOBS, PROJECTS, WORKERS = 10_000, 20, 200
TICKS = os.sysconf("SC_CLK_TCK")
WHY_WAITING = ("too_large", "at_quota", "backing_off")


class Server:
    """Postgres as the kernel sees it.

    Args:
        pid: Of the postmaster.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def cpu_seconds(self) -> float:
        """Spent by the postmaster, its live children, and those that have ended."""
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        ended = sum(self._times(self._pid)[2:])
        alive = sum(sum(self._times(int(pid))[:2]) for pid in children)
        return (ended + alive + sum(self._times(self._pid)[:2])) / TICKS

    def _times(self, pid: int) -> list[int]:
        """utime, stime, and both of the children that were waited for."""
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return [0] * 4
        return [int(word) for word in words[11:15]]


class Load:
    """200 workers' and the control loops' statements, at the rates of production's periods.

    Args:
        factory: Sessions on the database.
        settings: The periods.
        celery: Where the relay rings.
    """

    def __init__(self, factory: SessionFactory, settings: Settings, celery: Celery) -> None:
        self.done: Counter[str] = Counter()
        self._factory = factory
        self._settings = settings
        self._celery = celery
        self._stop = threading.Event()
        self._bells = threading.Semaphore(0)

    def run(self, seconds: float) -> None:
        """All of it for so long."""
        s = self._settings
        with ThreadPoolExecutor(8) as pool:
            running = [
                pool.submit(self._every, s.poll_seconds / WORKERS * 2, self._claim),
                pool.submit(self._every, s.poll_seconds / WORKERS * 2, self._claim),
                pool.submit(self._every, 10.0 / WORKERS, self._sign_in),
                pool.submit(self._every, s.reap_seconds, lambda _: sweep(self._factory, s)),
                pool.submit(self._every, 0.5, self._relay),
                pool.submit(self._answer),
            ]
            self._stop.wait(seconds)
            self._stop.set()
            for future in running:
                future.result()

    def _every(self, seconds: float, act: Callable[[int], object]) -> None:
        began = time.monotonic()
        number = 0
        while not self._stop.is_set():
            act(number)
            number += 1
            self._stop.wait(max(began + number * seconds - time.monotonic(), 0))

    def _claim(self, number: int) -> None:
        with transaction(self._factory) as session:
            found = claim_job(
                session,
                worker_id=f"w{number % WORKERS}",
                free_slots=1,
                queues=self._settings.queues,
                ttl=60,
            )
        if found is not None:
            raise RuntimeError("a job was taken that should wait")
        self.done["claims"] += 1

    def _sign_in(self, number: int) -> None:
        with transaction(self._factory) as session:
            name = f"w{number % WORKERS}"
            WorkerRepository(session).sign_in(name, host="h", num_slots=1, num_free=1, device="cpu")
        self.done["sign_ins"] += 1

    def _relay(self, _: int) -> None:
        while (rung := relay(self._factory, self._celery)) > 0 and not self._stop.is_set():
            self.done["bells"] += rung
            self._bells.release(rung)

    def _answer(self) -> None:
        number = 0
        while not self._stop.is_set():
            if self._bells.acquire(timeout=0.2):
                number += 1
                self._claim(number)


@contextmanager
def servers(root: Path) -> Iterator[tuple[str, str, Server]]:
    """A durable Postgres, migrated, and a Redis."""
    postgres = EmbeddedPostgres(root / "postgres", root / "postgres.log")
    redis = EmbeddedRedis(root / "redis", root / "redis.log")
    try:
        url = postgres.start()
        migrate(url)
        assert postgres.process is not None
        yield url, redis.start(), Server(_postmaster(postgres.process.pid))
    finally:
        redis.stop()
        postgres.stop()


def fill(factory: SessionFactory, why: str) -> None:
    """10,000 queued jobs of 20 projects that nobody can take: by their size, their quota or their back-off."""
    with transaction(factory) as session:
        for number in range(PROJECTS):
            project = make_project(session, max_running_jobs=1 if why == "at_quota" else None)
            first = make_job(
                session,
                project,
                base_model_id=make_base_model(session).id,
                training_file_id=make_file(session, project).id,
                num_gpus=8 if why == "too_large" else 1,
            )
            _copy(session, first.id, JOBS // PROJECTS - 1)
            if why == "at_quota":
                make_job(session, project, state="running", worker_id=f"other-{number}")
        if why == "backing_off":
            session.execute(text("UPDATE jobs SET not_before = now() + interval '1 hour'"))
        session.execute(text("UPDATE jobs SET created_at = now() - interval '1 hour'"))
        session.execute(
            text(
                "UPDATE jobs SET lease_expires_at = now() + interval '1 day' WHERE state = 'running'"
            )
        )
        assert session.query(Project).count() == PROJECTS


def measure(root: Path, seconds: float, why: str) -> float:
    """Share of one core that Postgres took, in percent."""
    with servers(root) as (url, redis_url, server):
        engine = build_engine(url, pool_size=10)
        factory = build_session_factory(engine)
        fill(factory, why)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
        settings = Settings(data_dir=root, database_url=url, redis_url=redis_url)
        load = Load(factory, settings, build_celery(redis_url))
        load._sign_in(0)
        before, began = server.cpu_seconds(), time.monotonic()
        load.run(seconds)
        spent, took = server.cpu_seconds() - before, time.monotonic() - began
        engine.dispose()
    share = 100 * spent / took
    rates = ", ".join(f"{count / took:.1f} {name}/s" for name, count in sorted(load.done.items()))
    sys.stdout.write(f"{why}: {share:.2f} % of a core over {took:.0f} s ({rates})\n")
    sys.stdout.flush()
    return share


def _postmaster(pid: int) -> int:
    """The server itself, below whatever launched it."""
    while "postgres" not in Path(f"/proc/{pid}/comm").read_text():
        [pid] = (int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return pid


def _copy(session: Session, job_id: UUID, times: int) -> None:
    """The same job so many times more."""
    columns = session.scalar(
        text(
            "SELECT string_agg(quote_ident(column_name), ', ') FROM information_schema.columns"
            " WHERE table_name = 'jobs' AND column_name NOT IN ('id', 'seq')"
        )
    )
    session.execute(
        text(
            f"INSERT INTO jobs (id, {columns})"
            f" SELECT gen_random_uuid(), {columns} FROM jobs, generate_series(1, :times) WHERE id = :id"
        ),
        {"times": times, "id": job_id},
    )


def main() -> None:
    """Prints a line for each reason to wait."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=65.0)
    parser.add_argument("--why", nargs="*", default=WHY_WAITING, choices=WHY_WAITING)
    options = parser.parse_args()
    for why in options.why:
        with tempfile.TemporaryDirectory() as root:
            measure(Path(root), options.seconds, why)


if __name__ == "__main__":
    main()

"""The relay on real Postgres and Redis: bells ring once, late when the broker is away, at once when notified."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
import redis
from sqlalchemy import select, update

from app.broker import QUEUE, BellUnreachable, build_celery, ring
from app.control.outbox import relay, run
from app.db.models import Job, OutboxMessage
from app.db.repositories.jobs import JobRepository
from app.db.session import SessionFactory, transaction
from app.domain.states import JobKind, JobState
from app.settings import Settings
from tests.factories import lease, make_base_model, make_job, make_project

LIST = f"retain:{QUEUE}"


def add_jobs(factory: SessionFactory, number: int, *, seconds: float = 0) -> list[Job]:
    """Queued jobs with a bell each."""
    with transaction(factory) as session:
        project, base = make_project(session), make_base_model(session)
        jobs = [
            make_job(session, project, kind=JobKind.EXPORT, base_model_id=base.id)
            for _ in range(number)
        ]
        for job in jobs:
            JobRepository(session).add_bell(job.id, seconds=seconds)
    return jobs


def num_rung(redis_url: str) -> int:
    with redis.Redis.from_url(redis_url) as client:
        return int(client.llen(LIST))


def undone(factory: SessionFactory) -> list[OutboxMessage]:
    with transaction(factory) as session:
        return list(session.scalars(select(OutboxMessage).where(OutboxMessage.done_at.is_(None))))


@pytest.fixture
def stalled_broker() -> Iterator[str]:
    """A broker that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


class TestRelay:
    def test_each_bell_is_rung_once(self, committed_factory: SessionFactory, redis_url: str):
        jobs = add_jobs(committed_factory, 3)
        app = build_celery(redis_url)
        assert relay(committed_factory, app) == 3
        assert relay(committed_factory, app) == 0
        assert num_rung(redis_url) == 3
        assert undone(committed_factory) == []
        with transaction(committed_factory) as session:
            rung = session.scalars(select(Job.last_rung_at).where(Job.id == jobs[0].id)).one()
            assert rung is not None

    def test_many_relays_share_the_work(self, committed_factory: SessionFactory, redis_url: str):
        add_jobs(committed_factory, 120)

        def work(_: int) -> int:
            app = build_celery(redis_url)
            total = 0
            while taken := relay(committed_factory, app):
                total += taken
            return total

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) == 120
        assert num_rung(redis_url) == 120

    def test_what_is_not_due_waits_and_a_job_that_is_gone_rings_no_bell(
        self, committed_factory: SessionFactory, redis_url: str
    ):
        add_jobs(committed_factory, 1, seconds=60)
        [cancelled] = add_jobs(committed_factory, 1)
        with transaction(committed_factory) as session:
            values = {"state": JobState.CANCELLED, "finished_at": lease(0)}
            session.execute(update(Job).where(Job.id == cancelled.id).values(values))
        assert relay(committed_factory, build_celery(redis_url)) == 1
        assert num_rung(redis_url) == 0
        assert len(undone(committed_factory)) == 1

    def test_a_late_commit_with_a_lower_id_is_not_missed(
        self, committed_factory: SessionFactory, redis_url: str
    ):
        app = build_celery(redis_url)
        with committed_factory() as slow:
            job = make_job(slow, kind=JobKind.EXPORT)
            JobRepository(slow).add_bell(job.id)
            slow.flush()
            add_jobs(committed_factory, 1)
            assert relay(committed_factory, app) == 1
            slow.commit()
        assert relay(committed_factory, app) == 1
        assert num_rung(redis_url) == 2

    def test_a_dead_broker_puts_bells_off_and_loses_none(
        self, committed_factory: SessionFactory, redis_url: str
    ):
        add_jobs(committed_factory, 2)
        with socket.create_server(("127.0.0.1", 0)) as server:
            closed = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        assert relay(committed_factory, build_celery(closed)) == 2
        messages = undone(committed_factory)
        assert [message.tries for message in messages] == [1, 1]
        assert relay(committed_factory, build_celery(redis_url)) == 0  # not yet
        with transaction(committed_factory) as session:
            session.execute(update(OutboxMessage).values(available_at=lease(0)))
        assert relay(committed_factory, build_celery(redis_url)) == 2
        assert num_rung(redis_url) == 2

    @pytest.mark.slow
    def test_a_stalled_broker_holds_the_relay_for_seconds_only(self, stalled_broker: str):
        began = time.monotonic()
        with pytest.raises(BellUnreachable):
            ring(build_celery(stalled_broker), uuid4())
        assert time.monotonic() - began < 30

    def test_a_committed_bell_is_rung_at_once(
        self, committed_factory: SessionFactory, database: str, redis_url: str, settings: Settings
    ):
        here = settings.model_copy(update={"database_url": database, "redis_url": redis_url})
        stop = threading.Event()
        thread = threading.Thread(target=run, args=(committed_factory, here, stop))
        thread.start()
        try:
            time.sleep(0.5)  # it listens by now
            began = time.monotonic()
            add_jobs(committed_factory, 1)
            while num_rung(redis_url) == 0 and time.monotonic() - began < 10:
                time.sleep(0.01)
            assert num_rung(redis_url) == 1
        finally:
            stop.set()
            thread.join()

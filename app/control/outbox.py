"""The outbox relay: rings the doorbells of committed transactions; the only process that speaks to the broker."""

import contextlib
import threading
import time
from collections.abc import Iterator

import psycopg
import structlog
from celery import Celery

from app.broker import BellUnreachable, build_celery, ring
from app.db.repositories.delivery import OutboxRepository
from app.db.session import SessionFactory, transaction
from app.settings import Settings

BATCH = 50
CLAIM_SECONDS = 30.0  # a relay that dies holds its batch back for so long
POLL_SECONDS = 2.0  # what a lost notification costs at most
FIRST_WAIT_SECONDS = 1.0
MAX_WAIT_SECONDS = 15.0
CHANNEL = "retain_outbox"

log = structlog.get_logger()


def run(factory: SessionFactory, settings: Settings, stop: threading.Event) -> None:
    """Relays until `stop` is set; a broken database connection ends it with an error, to be run again."""
    app = build_celery(settings.redis_url)
    with listening(settings.database_url, CHANNEL) as wait:
        while not stop.is_set():
            if relay(factory, app) == 0:
                wait(POLL_SECONDS, stop)


def relay(factory: SessionFactory, app: Celery) -> int:
    """Rings one batch of due bells; how many messages were taken.

    No transaction is open while the broker is spoken to. At the first failure the rest of the batch waits too:
    the next one would wait for the same timeout.
    """
    with transaction(factory) as session:
        repository = OutboxRepository(session)
        due = repository.claim_due(limit=BATCH, seconds=CLAIM_SECONDS)
        waiting = repository.list_waiting_jobs([job_id for _, job_id in due])
    if not due:
        return 0
    done, rung = [], []
    for message_id, job_id in due:
        if job_id in waiting:
            try:
                ring(app, job_id)
            except BellUnreachable as error:
                log.warning("outbox.broker_unreachable", error=str(error))
                break
            rung.append(job_id)
        done.append(message_id)
    with transaction(factory) as session:
        repository = OutboxRepository(session)
        repository.mark_done(done, rung)
        left = [message_id for message_id, _ in due if message_id not in set(done)]
        repository.put_off(left, base=FIRST_WAIT_SECONDS, most=MAX_WAIT_SECONDS)
    return len(due)


class Wait:
    """Waits for a notification, a stop or the end of the time, whichever comes first."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def __call__(self, seconds: float, stop: threading.Event) -> bool:
        """Whether a notification came."""
        deadline = time.monotonic() + seconds
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            # Short slices, since a notification can be waited for but an event not at the same time.
            for _ in self._connection.notifies(timeout=min(left, 0.25), stop_after=1):
                return True
        return False


@contextlib.contextmanager
def listening(database_url: str | None, channel: str) -> Iterator[Wait]:
    """A connection of its own that hears a channel."""
    assert database_url is not None
    with psycopg.connect(
        database_url, autocommit=True, connect_timeout=3, application_name="retain-outbox"
    ) as connection:
        connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
        yield Wait(connection)

"""Engine and sessions: the one place that commits."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic_core import from_json
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

SessionFactory = sessionmaker[Session]

# Limits that keep a frozen client from holding a row lock for ever (a lock-holding zombie is passed
# over by SKIP LOCKED); milliseconds.
SESSION_LIMITS = (
    "-c idle_in_transaction_session_timeout=10000 -c transaction_timeout=60000"
    " -c statement_timeout=30000 -c lock_timeout=5000"
)


def build_engine(database_url: str, *, pool_size: int = 5, application: str = "retain") -> Engine:
    """An engine whose sessions are bounded in time; READ COMMITTED."""
    url = database_url
    for prefix in ("postgresql://", "postgres://"):
        if url.startswith(prefix):
            url = "postgresql+psycopg://" + url.removeprefix(prefix)
    return create_engine(
        url,
        json_deserializer=from_json,  # parsing was a sixth of a page of jobs by the json module
        pool_size=pool_size,
        max_overflow=pool_size * 2,
        pool_pre_ping=True,
        pool_recycle=1800,
        connect_args={
            "connect_timeout": 3,
            "application_name": application,
            "options": SESSION_LIMITS,
            "keepalives_idle": 10,
            "tcp_user_timeout": 10_000,
        },
    )


def build_session_factory(engine: Engine) -> SessionFactory:
    """Sessions whose objects stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)


@contextmanager
def transaction(factory: SessionFactory) -> Iterator[Session]:
    """One transaction: commits at the end, rolls back on any error."""
    with factory() as session, session.begin():
        yield session

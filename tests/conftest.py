"""Real Postgres and Redis for a test run: a migrated template, a rollback per test, clones for real commits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, sessionmaker

from app.db.session import SessionFactory, build_engine, build_session_factory
from app.embedded import EmbeddedServices, Endpoints
from app.settings import Settings
from tests.databases import clone_database, drop_database, migrate


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """Postgres and Redis of this process (one xdist worker has one pair); they end with it, however it ends."""
    services = EmbeddedServices(tmp_path_factory.mktemp("servers"), is_durable=False)
    try:
        yield services.start()
    finally:
        services.stop()


@pytest.fixture(scope="session")
def template_url(servers: Endpoints) -> str:
    """A database built by Alembic that nobody connects to: what others are cloned from."""
    migrate(servers.database_url)
    return servers.database_url


@pytest.fixture(scope="session")
def engine(template_url: str) -> Iterator[Engine]:
    """The engine of the database that tests leave as they found it."""
    engine = build_engine(clone_database(template_url))
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """One connection inside a transaction that is rolled back."""
    with engine.connect() as connection:
        outer = connection.begin()
        yield connection
        outer.rollback()


@pytest.fixture
def session_factory(connection: Connection) -> SessionFactory:
    """Sessions that commit as in production, to a savepoint of the test's transaction."""
    return sessionmaker(
        connection, expire_on_commit=False, join_transaction_mode="create_savepoint"
    )


@pytest.fixture
def session(session_factory: SessionFactory) -> Iterator[Session]:
    """One session of the test's transaction."""
    with session_factory() as session:
        yield session


@pytest.fixture
def database(template_url: str) -> Iterator[str]:
    """The URL of a fresh database, for what needs real commits: locks, leases, races, other processes."""
    url = clone_database(template_url)
    yield url
    drop_database(url)


@pytest.fixture
def committed_engine(database: str) -> Iterator[Engine]:
    """The engine of the fresh database."""
    engine = build_engine(database, pool_size=10)
    yield engine
    engine.dispose()


@pytest.fixture
def committed_factory(committed_engine: Engine) -> SessionFactory:
    """Sessions on the fresh database; what they commit stays for the test."""
    return build_session_factory(committed_engine)


@pytest.fixture
def redis_url(servers: Endpoints) -> str:
    """An empty Redis."""
    with redis.Redis.from_url(servers.redis_url) as client:
        client.flushall()
    return servers.redis_url


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a throw-away data directory; a test that needs servers adds their URLs by `model_copy`."""
    return Settings(data_dir=tmp_path / "data")

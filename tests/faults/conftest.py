"""A fleet with short leases, and a pair of servers of the faults' own that may be killed and restarted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGQUIT

import psycopg
import pytest

from app.db.session import build_engine, build_session_factory
from app.embedded.postgres import EmbeddedPostgres
from app.embedded.redis import EmbeddedRedis
from app.settings import Settings
from tests.databases import clone_database, drop_database, migrate
from tests.faults.fleet import Fleet, make_fleet

FAST, IMMEDIATE, CRASH = SIGINT, SIGQUIT, SIGKILL  # how a server is taken down

SHORT = {
    "lease_ttl_seconds": 2.0,
    "beat_seconds": 0.4,
    "reap_seconds": 0.3,
    "poll_seconds": 0.5,
    "stop_grace_seconds": 5.0,
}


@dataclass
class Servers:
    """Postgres with fsync on, and Redis; both keep their addresses over a restart."""

    postgres: EmbeddedPostgres
    redis: EmbeddedRedis
    template_url: str
    redis_url: str

    def stop_postgres(self, how: "int" = FAST) -> None:
        """`pg_ctl stop`, fast or immediate."""
        assert self.postgres.process is not None
        self.postgres.process.send_signal(how)
        self.postgres.process.wait(30)

    def start_postgres(self) -> None:
        """After `stop_postgres`: recovers where it has to, at the same address."""
        self.postgres.start()

    def kill_redis(self) -> None:
        """SIGKILL; what it held is gone."""
        assert self.redis.process is not None
        self.redis.process.kill()
        self.redis.process.wait(30)


@contextmanager
def start_servers(root: Path) -> Iterator[Servers]:
    """A durable pair, migrated, for as long as the block lasts."""
    postgres = EmbeddedPostgres(root / "postgres", root / "postgres.log")
    redis = EmbeddedRedis(root / "redis", root / "redis.log")
    try:
        url = postgres.start()
        migrate(url)
        yield Servers(postgres, redis, url, redis.start())
    finally:
        redis.stop()
        postgres.stop()


@pytest.fixture(scope="session")
def own_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A durable pair beside the suite's, which other tests are connected to."""
    with start_servers(tmp_path_factory.mktemp("faults")) as servers:
        yield servers


@pytest.fixture
def fleet(own_servers: Servers, tmp_path: Path) -> Iterator[Fleet]:
    """A fleet over a database of its own."""
    database = clone_database(own_servers.template_url)
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=database,
        redis_url=own_servers.redis_url,
        **SHORT,  # type: ignore[arg-type]
    )
    engine = build_engine(database)
    fleet = make_fleet(build_session_factory(engine), settings, tmp_path)
    _wait_out_the_guard(database, settings.lease_ttl_seconds)
    try:
        yield fleet
    finally:
        fleet.stop()
        engine.dispose()
        drop_database(database)


def _wait_out_the_guard(url: str, seconds: float) -> None:
    """No lease is reaped for one TTL after a server start; tests begin after that."""
    query = "SELECT pg_sleep(greatest(0, %s - extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())))"
    with psycopg.connect(url) as connection:
        connection.execute(query, [seconds])

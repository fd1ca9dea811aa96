"""The schema: built from nothing, equal to the models, and taken down to nothing."""

import psycopg
import pytest
from alembic import command
from alembic.util.exc import CommandError

from app.embedded import Endpoints
from tests.databases import alembic_config, create_database, drop_database, migrate


@pytest.fixture
def empty_database(servers: Endpoints):
    url = create_database(servers.database_url)
    yield url
    drop_database(url)


def objects(url: str) -> set[str]:
    """Tables, functions and sequences in `public`, without Alembic's own table."""
    query = """
        SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'S')
        UNION SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    """
    with psycopg.connect(url) as connection:
        return {name for (name,) in connection.execute(query)} - {"alembic_version"}


def test_upgrade_from_empty_and_downgrade_leave_nothing_behind(empty_database: str):
    migrate(empty_database)
    assert {"jobs", "checkpoints", "decisions", "outbox"} <= objects(empty_database)

    command.downgrade(alembic_config(empty_database), "base")
    assert objects(empty_database) == set()

    migrate(empty_database)  # and up again
    assert "jobs" in objects(empty_database)


def test_the_models_and_the_migrations_agree(empty_database: str):
    migrate(empty_database)
    command.check(alembic_config(empty_database))


def test_the_drift_check_sees_a_missing_column(empty_database: str):
    migrate(empty_database)
    with psycopg.connect(empty_database) as connection:
        connection.execute("ALTER TABLE jobs DROP COLUMN last_rung_at")
    with pytest.raises(CommandError, match="last_rung_at"):
        command.check(alembic_config(empty_database))


def test_a_migration_waits_at_most_seconds_for_a_lock(empty_database: str):
    migrate(empty_database)
    with psycopg.connect(empty_database) as holder:
        holder.execute("LOCK TABLE jobs IN ACCESS SHARE MODE")
        with pytest.raises(Exception, match="lock timeout"):
            command.downgrade(alembic_config(empty_database), "base")
    assert "jobs" in objects(empty_database)

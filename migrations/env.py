"""Runs migrations on the configured database, one process at a time.

The URL is `sqlalchemy.url` of the Alembic configuration when a caller set it, else RETAIN_DATABASE_URL.
"""

from alembic import context
from sqlalchemy import create_engine, text

import app.db.models  # noqa: F401 - registers every table
from app.db.base import Base
from app.settings import load_settings

ADVISORY_LOCK = 0x7265_7461_696E  # "retain": several starting processes migrate one after the other


def database_url() -> str:
    """The database to migrate, with the driver named."""
    url = context.config.get_main_option("sqlalchemy.url") or load_settings().database_url
    if not url:
        raise SystemExit("set RETAIN_DATABASE_URL to the database to migrate")
    for prefix in ("postgresql://", "postgres://"):
        if url.startswith(prefix):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    return url


def run() -> None:
    """All steps in one transaction; a lock that cannot be had within 3 s fails instead of queueing heartbeats."""
    engine = create_engine(database_url())
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        connection.execute(text("SET LOCAL lock_timeout = '3s'"))
        context.configure(
            connection=connection, target_metadata=Base.metadata, compare_server_default=False
        )
        context.run_migrations()
    engine.dispose()


if context.is_offline_mode():
    raise SystemExit("migrations need a database: offline mode is not supported")
run()

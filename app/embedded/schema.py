"""Brings a database to the newest schema."""

from pathlib import Path

import alembic.command
from alembic.config import Config

import app

MIGRATIONS = Path(app.__file__).resolve().parent.parent / "migrations"


def upgrade(database_url: str) -> None:
    """Runs the missing migrations, all in one transaction and behind an advisory lock."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    alembic.command.upgrade(config, "head")

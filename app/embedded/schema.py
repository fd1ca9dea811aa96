"""Brings a database to the newest schema."""

import re
from pathlib import Path

import alembic.command
from alembic.config import Config

import app

_REVISION = re.compile(r'^revision = "(\w+)"', re.MULTILINE)  # migrations load within Alembic alone
MIGRATIONS = Path(app.__file__).resolve().parent.parent / "migrations"


def upgrade(database_url: str) -> None:
    """Runs the missing migrations, all in one transaction and behind an advisory lock."""
    config = _config()
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    alembic.command.upgrade(config, "head")


def known_revisions() -> frozenset[str]:
    """Every schema that this release can bring to the newest."""
    found = (_REVISION.search(path.read_text()) for path in (MIGRATIONS / "versions").glob("*.py"))
    return frozenset(revision[1] for revision in found if revision is not None)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config

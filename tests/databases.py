"""Databases for tests: migrated, cloned, dropped."""

from pathlib import Path
from uuid import uuid4

import psycopg
from alembic import command
from alembic.config import Config
from psycopg import sql

ROOT = Path(__file__).resolve().parent.parent


def migrate(database_url: str, revision: str = "head") -> None:
    """Upgrades a database."""
    command.upgrade(alembic_config(database_url), revision)


def alembic_config(database_url: str) -> Config:
    """Alembic's configuration for a database."""
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("sqlalchemy.url", database_url.replace("%", "%%"))
    return config


def clone_database(template_url: str) -> str:
    """Makes a copy of a database that nobody is connected to; returns its URL."""
    server, _, template = template_url.rpartition("/")
    name = f"test_{uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    return f"{server}/{name}"


def create_database(server_url: str) -> str:
    """Makes an empty database beside the given one; returns its URL."""
    return clone_database(f"{server_url.rpartition('/')[0]}/template1")


def drop_database(url: str) -> None:
    """Removes a database with whoever is still connected to it."""
    server, _, name = url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

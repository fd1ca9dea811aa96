"""A connection of its own that hears what transactions tell when they commit."""

import contextlib
from collections.abc import Iterator
from typing import Final

import psycopg
from psycopg import sql
from sqlalchemy import Engine

#: Told by a trigger when a line of a job's log commits; the payload is the job's id.
JOB_EVENTS: Final = "retain_job_events"


class Ear:
    """Hears one channel until it is closed or its connection breaks."""

    def __init__(self, engine: Engine, channel: str) -> None:
        """Connects outside the engine's pool, with its limits.

        Raises:
            psycopg.Error: The server cannot be reached.
        """
        address, options = engine.dialect.create_connect_args(engine.url)
        self._connection: psycopg.Connection[tuple[object, ...]] = psycopg.connect(
            *address,
            **options,
            autocommit=True,
            connect_timeout=3,
            application_name="retain-ear",
            keepalives_idle=10,
            tcp_user_timeout=10_000,
        )
        self._connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    def hear(self, seconds: float) -> Iterator[str]:
        """Payloads as they come, for so long.

        Raises:
            psycopg.Error: The connection is broken.
        """
        for notification in self._connection.notifies(timeout=seconds):
            yield notification.payload

    def close(self) -> None:
        """Gives the connection up."""
        with contextlib.suppress(psycopg.Error):  # it may be broken already
            self._connection.close()

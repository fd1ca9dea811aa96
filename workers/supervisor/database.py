"""A database connection of one's own, on which no transaction can hang."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from app.db.session import build_engine, transaction


class Database:
    """One connection, kept between transactions and made anew when it broke; for one thread.

    A peer whose kernel still acknowledges can hold a client for ever, whatever the driver's timeouts: so a
    watchdog closes the socket of a transaction that takes too long.

    Args:
        url: The database.
        application: Name of the connection, for the server's lists.
        limit_seconds: Of a transaction, from its beginning to its commit.
    """

    def __init__(self, url: str, *, application: str, limit_seconds: float) -> None:
        self._engine = build_engine(url, pool_size=1, application=application)
        self._limit_seconds = limit_seconds
        self._connection: Connection | None = None
        self._mutex = threading.Lock()
        self._watched: int | None = None  # file descriptor of the transaction under way

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction; an outage raises an error for which `is_outage` holds."""
        connection = self._connect()
        timer = threading.Timer(self._limit_seconds, self._sever)
        timer.daemon = True
        with self._mutex:
            self._watched = connection.connection.driver_connection.fileno()  # type: ignore[union-attr]
        timer.start()
        try:
            with transaction(sessionmaker(connection, expire_on_commit=False)) as session:
                yield session
        except DBAPIError as error:
            if is_outage(error):
                self._drop()
            raise
        finally:
            timer.cancel()
            with self._mutex:
                self._watched = None

    def close(self) -> None:
        """Ends the connection."""
        self._drop()
        self._engine.dispose()

    def _connect(self) -> Connection:
        if self._connection is not None and (
            self._connection.closed or self._connection.invalidated
        ):
            self._drop()
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def _drop(self) -> None:
        with self._mutex:
            self._watched = None
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(DBAPIError):
                connection.invalidate()
                connection.close()

    def _sever(self) -> None:
        with self._mutex, contextlib.suppress(OSError):
            if self._watched is not None:
                with socket.socket(fileno=os.dup(self._watched)) as peer:
                    peer.shutdown(socket.SHUT_RDWR)


def is_outage(error: BaseException) -> bool:
    """Whether the database is away or over its limits: to be tried again, not a mistake of ours."""
    if isinstance(error, PoolTimeout | OperationalError | InterfaceError):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated

"""Whether what the API stands on can be reached."""

import socket
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.db.session import SessionFactory, transaction

PING_SECONDS = 0.5
REDIS_PORT = 6379


def check_health(factory: SessionFactory, redis_url: str | None) -> Mapping[str, str]:
    """`ok` or `down` by component; Redis is a doorbell, so without it things are only slower."""
    found = {"database": "ok" if _has_database(factory) else "down"}
    if redis_url is not None:
        found["redis"] = "ok" if _has_redis(redis_url) else "down"
    return MappingProxyType(found)


def _has_database(factory: SessionFactory) -> bool:
    try:
        with transaction(factory) as session:
            session.execute(text("SELECT 1"))
    except SQLAlchemyError:
        return False
    return True


def _has_redis(url: str) -> bool:
    """Whether something answers there as Redis does; the client library would cost each API process 6 MB."""
    parts = urlsplit(url)
    try:
        if parts.scheme == "unix":
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PING_SECONDS)
            connection.connect(parts.path)
        else:
            address = (parts.hostname or "localhost", parts.port or REDIS_PORT)
            connection = socket.create_connection(address, PING_SECONDS)
        with connection:
            if parts.scheme == "rediss":
                return True  # it listens; asking would take a handshake
            connection.sendall(b"PING\r\n")
            # A server that wants a password says -NOAUTH, and lives.
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False

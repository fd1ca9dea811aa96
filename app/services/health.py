"""Whether what the API stands on can be reached."""

from collections.abc import Mapping
from types import MappingProxyType

import redis
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.db.session import SessionFactory, transaction

PING_SECONDS = 0.5


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
    try:
        with redis.Redis.from_url(
            url, socket_timeout=PING_SECONDS, socket_connect_timeout=PING_SECONDS
        ) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False

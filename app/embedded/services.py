"""Both servers together, and the database for an operator's command."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from app.embedded.directory import DataDirectory, DataDirectoryInUse, Endpoints
from app.embedded.postgres import EmbeddedPostgres
from app.embedded.processes import ServerFailed
from app.embedded.redis import EmbeddedRedis
from app.settings import Settings

COMMAND_WAIT_SECONDS = 60.0


class EmbeddedServices:
    """Postgres and Redis under one data directory, for as long as this process lives.

    Start it from a thread that stays alive: the servers end when that thread does.

    Args:
        data_dir: Made when missing. Holds `postgres/`, `redis/`, `logs/`.
        database_url: Replaces the embedded Postgres.
        redis_url: Replaces the embedded Redis.
        is_durable: False only for throw-away databases of tests.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        database_url: str | None = None,
        redis_url: str | None = None,
        is_durable: bool = True,
    ) -> None:
        self.directory = DataDirectory(data_dir)
        logs = self.directory.path / "logs"
        self._given = (database_url, redis_url)
        self._postgres = EmbeddedPostgres(
            self.directory.path / "postgres", logs / "postgres.log", is_durable=is_durable
        )
        self._redis = EmbeddedRedis(self.directory.path / "redis", logs / "redis.log")

    def start(self) -> Endpoints:
        """Starts what was not replaced; seconds, also after a killed run.

        Raises:
            DataDirectoryInUse: Another process runs on the directory.
            ServerFailed: A server did not come up.
        """
        self._acquire()
        database_url, redis_url = self._given
        try:
            endpoints = Endpoints(
                database_url or self._postgres.start(), redis_url or self._redis.start()
            )
            self.directory.publish(endpoints)
        except BaseException:
            self.stop()
            raise
        return endpoints

    def stop(self) -> None:
        """Shuts both down cleanly and gives the directory back."""
        self._redis.stop()
        self._postgres.stop()
        self.directory.release()

    def revive(self) -> bool:
        """Starts what has died again, at the same address; whether anything had.

        Raises:
            ServerFailed: It does not come up, or had to take another address.
        """
        dead = [
            server
            for server in (self._postgres, self._redis)
            if server.process is not None and server.process.poll() is not None
        ]
        known = self.directory.find_endpoints()
        for server in dead:
            if known is None or server.start() not in known:
                raise ServerFailed("An embedded server lost its address; start Retain again.")
        return bool(dead)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _acquire(self) -> None:
        # An operator's command holds the directory for seconds, and is worth waiting for.
        deadline = time.monotonic() + COMMAND_WAIT_SECONDS
        while True:
            try:
                return self.directory.acquire("up")
            except DataDirectoryInUse:
                holder = self.directory.find_holder()
                is_command = holder is not None and holder[1] == "command"
                if not is_command or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


@contextmanager
def operator_database(settings: Settings) -> Iterator[str]:
    """The data directory's database, for one command.

    The server of a running `retain up` when there is one, else one started here and stopped afterwards.

    Raises:
        DataDirectoryInUse: Another command holds the directory for too long.
    """
    if settings.database_url is not None:
        yield settings.database_url
        return
    directory = DataDirectory(settings.data_dir)
    found = _find_running(directory)
    if found is not None:
        yield found.database_url
        return
    postgres = EmbeddedPostgres(
        directory.path / "postgres", directory.path / "logs" / "postgres.log"
    )
    try:
        yield postgres.start()
    finally:
        postgres.stop()
        directory.release()


def _find_running(directory: DataDirectory) -> Endpoints | None:
    """The endpoints of the running stack; None once this process itself holds the directory."""
    deadline = time.monotonic() + COMMAND_WAIT_SECONDS
    while True:
        try:
            directory.acquire("command")
        except DataDirectoryInUse:
            endpoints = directory.find_endpoints()
            if endpoints is not None:
                return endpoints
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return None

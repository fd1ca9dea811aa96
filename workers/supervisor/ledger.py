"""An attempt's transactions: fenced, in order, and patient while the database is away."""

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.settings import Settings
from workers.supervisor.database import Database, is_outage
from workers.supervisor.lease import Lease

WRITE_LIMIT_SECONDS = 20.0
RETRY_SECONDS = 0.5
OUTAGE_PAUSE_SECONDS = 2.0  # what can wait is not even tried for so long after a failure

log = structlog.get_logger()
Result = TypeVar("Result")


class GivenUp(Exception):
    """The database stays away and there is no more time to wait for it."""


class Ledger:
    """One connection's writes, of which some may be put off.

    Args:
        lease: Of the attempt; nothing is written once it is lost.
        settings: Where the database is.
        may_wait: Whether there is time left to wait for it.
    """

    def __init__(self, lease: Lease, settings: Settings, may_wait: Callable[[], bool]) -> None:
        assert settings.database_url is not None
        self._lease = lease
        self._may_wait = may_wait
        self._database = Database(
            settings.database_url, application="retain-worker", limit_seconds=WRITE_LIMIT_SECONDS
        )
        self._pending: deque[Callable[[Session], object]] = deque()
        self._quiet_until = 0.0

    def close(self) -> None:
        """Ends the connection."""
        self._database.close()

    @property
    def is_quiet(self) -> bool:
        """Writes are being put off: the database was away a moment ago."""
        return bool(self._pending) or time.monotonic() < self._quiet_until

    def write(self, operation: Callable[[Session], Result]) -> Result:
        """One transaction, after everything that was put off; waits for a database that is away.

        Raises:
            Fenced: The attempt lost its job.
            GivenUp: There is no more time to wait.
        """
        while True:
            self._lease.check()
            try:
                self._flush()
                return self._once(operation)
            except SQLAlchemyError as error:
                self._note_outage(error)
                if not self._may_wait():
                    raise GivenUp from error
                time.sleep(RETRY_SECONDS)

    def write_soon(self, operation: Callable[[Session], object]) -> None:
        """Writes now, or once the database is back; in the order in which it was asked for."""
        self._pending.append(operation)
        self.catch_up()

    def write_now(self, operation: Callable[[Session], Result]) -> Result | None:
        """Writes if the database is there; None when it is not: for what may as well be left out."""
        if self.is_quiet:
            return None
        try:
            return self._once(operation)
        except SQLAlchemyError as error:
            self._note_outage(error)
            return None

    def catch_up(self) -> None:
        """Writes what was put off, if the database is back."""
        if self._pending and time.monotonic() >= self._quiet_until:
            try:
                self._flush()
            except SQLAlchemyError as error:
                self._note_outage(error)

    def _flush(self) -> None:
        while self._pending:
            self._once(self._pending[0])
            self._pending.popleft()

    def _once(self, operation: Callable[[Session], Result]) -> Result:
        with self._database.transaction() as session:
            return operation(session)

    def _note_outage(self, error: SQLAlchemyError) -> None:
        """Remembers an outage; raises what is none."""
        if not is_outage(error):
            raise error
        self._quiet_until = time.monotonic() + OUTAGE_PAUSE_SECONDS
        log.warning("worker.database_away", error=str(error)[:200])

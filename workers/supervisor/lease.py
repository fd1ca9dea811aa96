"""The lease of a running job: renewed by a thread and a connection of its own, whatever the rest is waiting for."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.domain.states import StopRequest
from app.errors import Fenced
from app.services.engine import Beat, beat
from app.settings import Settings
from workers.supervisor.database import Database, is_outage

BEAT_LIMIT_SECONDS = 5.0
RETRY_SECONDS = 1.0

log = structlog.get_logger()

Loss = Literal["fenced", "cut_off"]


@dataclass(frozen=True, slots=True)
class Holding:
    """Which attempt holds which job, and as whom."""

    job_id: UUID
    attempt: int
    worker_id: str


class Lease:
    """Renews until it is stopped, refused, or cut off from the database for longer than the grace.

    All times are monotonic, and a lease counts from before the heartbeat was sent.

    Args:
        holding: The attempt.
        settings: Database, periods and grace.
    """

    def __init__(self, holding: Holding, settings: Settings) -> None:
        assert settings.database_url is not None
        self.holding = holding
        self.position: tuple[int, int] | None = None  # branch and step of the trainer
        self.loss: Loss | None = None
        self._settings = settings
        limit = min(BEAT_LIMIT_SECONDS, settings.lease_ttl_seconds / 2)
        self._database = Database(
            settings.database_url, application="retain-beat", limit_seconds=limit
        )
        self._renewed_at = time.monotonic()
        self._latest: Beat | None = None
        self._is_over = False
        self._is_ending = False
        self._at_loss: Callable[[], None] | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"beat-{holding.job_id}", daemon=True
        )

    def start(self) -> None:
        """Begins to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Ends renewing."""
        self._is_over = True
        self._wake.set()
        self._thread.join()
        self._database.close()

    def expect_end(self) -> None:
        """From here on a refused heartbeat is no loss: the job's end is being written, perhaps already was."""
        self._is_ending = True

    def at_loss(self, act: Callable[[], None] | None) -> None:
        """What is done the moment the lease is lost, from the thread that renews.

        The attempt's own thread may hang in a write at that time, while its devices are another's to use.
        """
        self._at_loss = act

    def note(self, answer: Beat, sent_at: float) -> None:
        """Takes in a renewal that came with another write."""
        self._renewed_at = max(self._renewed_at, sent_at)
        self._latest = answer

    @property
    def is_fresh(self) -> bool:
        """The database was reached within the lease's time."""
        return time.monotonic() - self._renewed_at < self._settings.lease_ttl_seconds

    @property
    def stop_requested(self) -> StopRequest | None:
        """What a client asked for, as far as is known."""
        return None if self._latest is None else self._latest.stop_requested

    @property
    def order_version(self) -> int:
        """Of the last order from outside, as far as is known."""
        return 0 if self._latest is None else self._latest.order_version

    def check(self) -> None:
        """Says that the lease is lost, where it is.

        Raises:
            Fenced: It is another's, or could not be renewed for longer than the grace.
        """
        if self.loss is not None:
            raise Fenced(f"the lease of attempt {self.holding.attempt} is lost: {self.loss}")

    def _run(self) -> None:
        while not self._is_over and self.loss is None:
            is_renewed = self._renew()
            grace = self._settings.partition_grace_seconds
            if not is_renewed and time.monotonic() - self._renewed_at > grace:
                self._lose("cut_off")
                log.error("worker.cut_off", job=str(self.holding.job_id), grace_seconds=grace)
            pause = self._settings.beat_seconds
            self._wake.wait(pause if is_renewed else min(RETRY_SECONDS, pause))

    def _lose(self, loss: Loss) -> None:
        self.loss = loss
        if self._at_loss is not None:
            self._at_loss()

    def _renew(self) -> bool:
        sent_at = time.monotonic()
        holding = self.holding
        try:
            with self._database.transaction() as session:
                answer = beat(
                    session,
                    job_id=holding.job_id,
                    attempt=holding.attempt,
                    worker_id=holding.worker_id,
                    ttl=self._settings.lease_ttl_seconds,
                    at=self.position,
                )
        except Fenced:
            if self._is_ending:
                self._is_over = True
            else:
                self._lose("fenced")
                log.warning("worker.fenced", job=str(holding.job_id), attempt=holding.attempt)
            return False
        except SQLAlchemyError as error:
            if not is_outage(error):
                raise
            log.warning("worker.beat_failed", job=str(holding.job_id), error=str(error.args[:1]))
            return False
        self.note(answer, sent_at)
        return True

"""A worker process: its slots, the jobs it works on, and how it shuts down."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from uuid import UUID, uuid4

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.db.models import Job
from app.db.repositories.delivery import WorkerRepository
from app.errors import Unavailable
from app.services.engine import adopt_job, claim_job
from app.services.storage import Storage
from app.settings import Settings
from workers.supervisor.attempt import Attempt
from workers.supervisor.channel import clear_sockets
from workers.supervisor.database import Database, is_outage
from workers.supervisor.lease import Holding
from workers.supervisor.scratch import clear_scratch
from workers.supervisor.slots import Slot, Slots, find_slots

SIGN_IN_SECONDS = 10.0
LIMIT_SECONDS = 20.0  # of a claim, and of signing in

log = structlog.get_logger()


class Node:
    """Claims jobs as long as there are any that fit, and works on each in the thread that claimed it.

    A doorbell calls `serve`; so does a timer, so that a dead broker costs nothing but time.

    Args:
        settings: Database, store, periods and queues.
        slots: What can be given to jobs.
        command: Replaces the trainer's command line.
    """

    def __init__(
        self, settings: Settings, slots: Slots, *, command: Sequence[str] | None = None
    ) -> None:
        if settings.database_url is None:
            raise Unavailable("RETAIN_DATABASE_URL is not set; `retain up` starts a database.")
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        self.slots = slots
        self._settings = settings
        self._command = command
        self._storage = Storage(settings.storage_root)
        self._claims, self._roll = (
            Database(settings.database_url, application=name, limit_seconds=LIMIT_SECONDS)
            for name in ("retain-claims", "retain-roll")
        )
        self._claiming = threading.Lock()
        self._active: dict[UUID, Attempt] = {}
        self._may_hold_unknown = False  # a claim's reply was lost
        self._draining = threading.Event()
        self._timer: threading.Thread | None = None
        self._servers: list[threading.Thread] = []

    def start(self) -> None:
        """Clears what killed workers left, and begins to look for jobs."""
        clear_scratch(self._settings.scratch_root)
        clear_sockets()
        self._timer = threading.Thread(target=self._keep_looking, name="poll", daemon=True)
        self._timer.start()

    def drain(self) -> None:
        """Takes no more jobs; those under way are saved and given back."""
        self._draining.set()

    def stop(self) -> None:
        """Drains, waits for everything to end, and leaves the roll."""
        self.drain()
        if self._timer is not None:
            self._timer.join()
        for server in self._servers:
            server.join()
        with self._outage_logged(), self._roll.transaction() as session:
            WorkerRepository(session).sign_out(self.worker_id)
        self._roll.close()
        self._claims.close()

    def serve(self) -> int:
        """Claims and works on jobs until none is left that fits; how many there were."""
        num_jobs = 0
        while not self._draining.is_set():
            taken = self._take()
            if taken is None:
                break
            num_jobs += 1
            self._work_on(*taken)
        return num_jobs

    def _work_on(self, job: Job, slots: list[Slot]) -> None:
        holding = Holding(job.id, job.attempt, self.worker_id)
        attempt = Attempt(
            holding,
            slots,
            self._settings,
            self._storage,
            is_draining=self._draining.is_set,
            command=self._command,
        )
        self._active[job.id] = attempt
        try:
            ending = attempt.run()
            if ending.is_device_error:
                self.slots.note_device_error(slots)
        finally:
            del self._active[job.id]
            self.slots.give_back(slots)

    def _take(self) -> tuple[Job, list[Slot]] | None:
        """A job with the slots it needs; None when there is none that fits."""
        with self._claiming:
            free = self.slots.take_free()
            job = None
            with self._outage_logged():
                job = self._claim(len(free))
            needed = 0 if job is None else max(job.num_gpus, 1)
            self.slots.give_back(free[needed:])
            return None if job is None else (job, free[:needed])

    def _claim(self, num_free: int) -> Job | None:
        ttl = self._settings.lease_ttl_seconds
        if num_free and self._may_hold_unknown:
            with self._claims.transaction() as session:
                known = list(self._active)
                job = adopt_job(session, worker_id=self.worker_id, known=known, ttl=ttl)
            self._may_hold_unknown = job is not None
            if job is not None:
                return job
        try:
            with self._claims.transaction() as session:
                return claim_job(
                    session,
                    worker_id=self.worker_id,
                    free_slots=num_free,
                    queues=self._settings.queues,
                    ttl=ttl,
                    max_running=self._settings.max_running_jobs,
                )
        except SQLAlchemyError:
            self._may_hold_unknown = True  # the commit may have gone through
            raise

    def _keep_looking(self) -> None:
        """Signs in regularly, and serves by itself when a bell may have been lost."""
        looked_at = -self._settings.poll_seconds
        while not self._draining.is_set():
            with self._outage_logged():
                self._sign_in()
            if time.monotonic() - looked_at >= self._settings.poll_seconds:
                looked_at = time.monotonic()
                self._servers = [server for server in self._servers if server.is_alive()]
                if self.slots.num_free > 0:
                    self._spawn()
            self._draining.wait(min(SIGN_IN_SECONDS, self._settings.poll_seconds))

    def _spawn(self) -> None:
        server = threading.Thread(target=self.serve, name="serve")
        self._servers.append(server)
        server.start()

    def _sign_in(self) -> None:
        with self._roll.transaction() as session:
            WorkerRepository(session).sign_in(
                self.worker_id,
                host=socket.gethostname(),
                num_slots=self.slots.count,
                num_free=self.slots.num_free,
                device=self.slots.device,
            )

    @contextlib.contextmanager
    def _outage_logged(self) -> Iterator[None]:
        """Leaves out what cannot be done while the database is away."""
        try:
            yield
        except SQLAlchemyError as error:
            if not is_outage(error):
                raise
            log.warning("worker.database_away", error=str(error)[:200])


def build_node(settings: Settings) -> Node:
    """The node of this process."""
    return Node(settings, find_slots(settings))

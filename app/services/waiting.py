"""Those who wait for something to happen to a job: woken by one LISTEN of the process, else within a second."""

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar
from uuid import UUID

import psycopg
import structlog
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.db.listening import JOB_EVENTS, Ear
from app.db.repositories.following import FollowingRepository
from app.db.session import SessionFactory, transaction
from app.domain.scopes import Caller
from app.errors import Unauthorized, Unavailable

POLL_SECONDS: Final = (
    1.0  # what a lost notification costs, and how long a revoked key's waits go on
)
SLICE_SECONDS: Final = 0.25  # a listening thread sees so often whether it is to stop
MAX_WATCHES: Final = 5000  # of one process; a waiter takes about 100 kB
LOOKS_AT_ONCE: Final = (
    8  # so that a thousand who wake together leave threads and connections to others
)

Found = TypeVar("Found")

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class Watch:
    """One who waits for a job.

    Attributes:
        job_id: The job.
        key_id: The key it was asked with; once that is revoked nobody waits with it.
        seen: The number of the last line of the job's log that is known; the waiter keeps it.
        is_gone: The client has left.
        is_refused: The key is no longer good.
    """

    job_id: UUID
    key_id: str
    seen: int
    loop: asyncio.AbstractEventLoop
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    is_gone: bool = False
    is_refused: bool = False


class WaitingRoom:
    """Everybody in this process who waits for a job. Nobody holds a database session while waiting.

    One thread hears the notifications that committed lines of job logs send, and looks each second at all
    watched jobs and all keys in two queries. Without the thread, as in an application whose lifespan never
    began, a waiter looks for itself each second.

    Args:
        factory: Sessions; only an engine can be listened to.
        poll_seconds: Between looks.
    """

    def __init__(self, factory: SessionFactory, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._factory = factory
        self._poll_seconds = poll_seconds
        self._watches: dict[UUID, set[Watch]] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._limiter = CapacityLimiter(LOOKS_AT_ONCE)
        self.is_closing = False  # the server stops: nobody waits any more

    def start(self) -> None:
        """Begins to listen."""
        engine = self._factory.kw["bind"]
        if not isinstance(engine, Engine):
            return
        self._stop.clear()
        self.is_closing = False
        thread = threading.Thread(
            target=self._run, args=(engine,), name="waiting-room", daemon=True
        )
        thread.start()
        self._thread = thread  # whoever stops the room finds a thread that can be joined

    def close(self) -> None:
        """Sends everybody home, as the server is about to stop."""
        self.is_closing = True
        self._wake(self._everybody())

    def stop(self) -> None:
        """Ends the listening."""
        self.close()
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
            self._thread = None

    @contextlib.contextmanager
    def watch(self, job_id: UUID, caller: Caller, *, seen: int = 0) -> Iterator[Watch]:
        """Counts the caller among those who wait for a job; what happens from here on wakes it.

        Raises:
            Unavailable: Too many wait already.
        """
        watch = Watch(job_id, caller.key_id, seen, asyncio.get_running_loop())
        with self._lock:
            if self._count >= MAX_WATCHES:
                raise Unavailable("Too many requests are waiting; ask again without waiting.")
            self._count += 1
            self._watches.setdefault(job_id, set()).add(watch)
        try:
            yield watch
        finally:
            with self._lock:
                self._count -= 1
                others = self._watches[job_id]
                others.discard(watch)
                if not others:
                    del self._watches[job_id]

    async def wait(self, watch: Watch, seconds: float) -> None:
        """Waits until there may be something new, or for so long.

        Raises:
            Unauthorized: The key has been revoked or has expired.
        """
        if self._thread is None:
            seconds = min(seconds, self._poll_seconds)
        if not self.is_closing and not watch.is_gone:
            with contextlib.suppress(TimeoutError):  # nothing was told: the caller looks for itself
                async with asyncio.timeout(seconds):
                    await watch.woken.wait()
        watch.woken.clear()
        if watch.is_refused:
            raise Unauthorized("The API key was revoked or has expired.")

    async def look(self, read: Callable[[], Found]) -> Found:
        """Reads in a thread, a few at once."""
        return await run_sync(read, limiter=self._limiter)

    def count(self) -> int:
        """How many wait."""
        return self._count

    def _run(self, engine: Engine) -> None:
        ear: Ear | None = None
        looked_at = time.monotonic()
        while not self._stop.is_set():
            try:
                ear = ear or Ear(engine, JOB_EVENTS)
                for payload in ear.hear(SLICE_SECONDS):
                    self._hear(payload)
            except psycopg.Error as error:
                log.warning("waiting.deaf", error=str(error).splitlines()[:1])
                if ear is not None:
                    ear.close()
                    ear = None
                self._stop.wait(self._poll_seconds)
            if time.monotonic() - looked_at >= self._poll_seconds:
                self._look_at_all()
                looked_at = time.monotonic()
        if ear is not None:
            ear.close()

    def _hear(self, payload: str) -> None:
        try:
            job_id = UUID(payload)
        except ValueError:
            log.warning("waiting.strange_notification", payload=payload[:80])
            return
        with self._lock:
            woken = list(self._watches.get(job_id, ()))
        self._wake(woken)

    def _look_at_all(self) -> None:
        """Finds what no notification told: lines that were missed, and keys that are no longer good."""
        watches = self._everybody()
        if not watches:
            return
        try:
            with transaction(self._factory) as session:
                repository = FollowingRepository(session)
                counts = repository.count_lines({watch.job_id for watch in watches})
                live = repository.list_live_keys({watch.key_id for watch in watches})
        except SQLAlchemyError as error:
            log.warning("waiting.blind", error=str(error).splitlines()[:1])
            return
        changed = []
        for watch in watches:
            watch.is_refused = watch.key_id not in live
            if watch.is_refused or counts.get(watch.job_id, watch.seen) != watch.seen:
                changed.append(watch)
        self._wake(changed)

    def _everybody(self) -> list[Watch]:
        with self._lock:
            return [watch for watches in self._watches.values() for watch in watches]

    def _wake(self, watches: Iterable[Watch]) -> None:
        by_loop = defaultdict(list)
        for watch in watches:
            by_loop[watch.loop].append(watch)
        for loop, some in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_set_all, some)


@contextlib.contextmanager
def noticing_departure(
    watch: Watch, receive: Callable[[], Awaitable[Mapping[str, object]]]
) -> Iterator[None]:
    """Wakes the watch when its client leaves."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        watch.is_gone = True
        watch.woken.set()

    task = asyncio.get_running_loop().create_task(listen())
    try:
        yield
    finally:
        task.cancel()


def _set_all(watches: list[Watch]) -> None:
    for watch in watches:
        watch.woken.set()

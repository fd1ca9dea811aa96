"""Delivers webhook events: signed, retried for three days, at least once, in any order."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

import structlog
from cryptography.fernet import MultiFernet
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.control.webhook_http import Reply, WebhookClient
from app.control.webhook_lanes import (
    LEAST_SECONDS,
    MAX_HELD,
    MAX_IN_FLIGHT,
    PER_ENDPOINT,
    Claim,
    Lanes,
)
from app.control.webhook_results import GONE, record_results
from app.db.repositories.webhook_deliveries import ClaimedDelivery, WebhookDeliveryRepository
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.errors import Unavailable
from app.services.ciphers import load_cipher
from app.services.webhook_signing import decrypt_secret, sign_request
from app.services.webhooks import find_url_problem
from app.settings import Settings

CLAIM_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.5
GATHER_SECONDS: Final = 0.01  # tries that end within it are recorded together
STOP_SECONDS: Final = (
    3.0  # what is in flight may end within it, else it is tried again by whoever comes next
)
KEPT_FOR: Final = timedelta(days=30)
BURY_SECONDS: Final = 5.0
PURGE_SECONDS: Final = 3600.0

log = structlog.get_logger()
T = TypeVar("T")


def run(factory: SessionFactory, settings: Settings, stop: threading.Event) -> None:
    """Delivers until `stop` is set; several at once share the work by SKIP LOCKED."""
    client = WebhookClient(allow_private=settings.webhook_allow_private)
    sender = WebhookSender(
        factory,
        load_cipher(settings),
        client,
        schedule_scale=settings.webhook_schedule_scale,
    )
    asyncio.run(sender.run(stop))


class WebhookSender:
    """The loop: claim in one short transaction, post without any, record many tries in another.

    Args:
        factory: Sessions that really commit.
        cipher: Decrypts the endpoints' secrets.
        client: Makes the tries.
        schedule_scale: Multiplies the gaps between tries.
        poll_seconds: How long it rests when nothing is due.
    """

    def __init__(
        self,
        factory: SessionFactory,
        cipher: MultiFernet,
        client: WebhookClient,
        *,
        schedule_scale: float = 1.0,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._factory = factory
        self._cipher = cipher
        self._client = client
        self._scale = schedule_scale
        self._poll_seconds = poll_seconds
        self._lanes = Lanes()
        self._tasks: dict[asyncio.Task[None], Claim] = {}
        self._results: list[tuple[Claim, Reply]] = []
        self._hungry = asyncio.Event()  # an endpoint could take more than is claimed for it
        self._ended = asyncio.Event()  # there are results to record
        # Threads of its own: slow name lookups fill the event loop's default ones.
        self._database = ThreadPoolExecutor(4, thread_name_prefix="webhook-db")
        self._buried_at = self._purged_at = -PURGE_SECONDS

    async def run(self, stop: threading.Event) -> None:
        """Delivers until `stop` is set, then gives what is in flight a moment to end."""
        resolving = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="webhook-dns")
        asyncio.get_running_loop().set_default_executor(resolving)
        recording = asyncio.create_task(self._record_for_ever())
        try:
            while not stop.is_set():
                if recording.done():
                    recording.result()  # raises what broke it
                self._hungry.clear()
                try:
                    await self._claim_due()
                except (DBAPIError, PoolTimeout) as error:
                    log.warning("webhooks.database_away", error=str(error))
                    self._hungry.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hungry.wait(), self._poll_seconds)
            await self._wind_down(recording)
        finally:
            recording.cancel()
            self._database.shutdown()
            resolving.shutdown(wait=False, cancel_futures=True)

    async def _claim_due(self) -> None:
        free = MAX_HELD - self._lanes.num_held
        if free <= 0:
            return
        room = self._lanes.room()
        deadline = time.monotonic() + CLAIM_SECONDS
        claimed = await self._in_database(partial(self._claim, free, room))
        self._lanes.add([Claim(delivery, deadline) for delivery in claimed], room)
        for claim in self._lanes.take():
            self._start(claim)

    def _claim(self, limit: int, room: dict[UUID, int]) -> list[ClaimedDelivery]:
        now = time.monotonic()
        with transaction(self._factory) as session:
            repository = WebhookDeliveryRepository(session)
            if now - self._buried_at > BURY_SECONDS:
                self._buried_at = now
                repository.bury_orphans()
            if now - self._purged_at > PURGE_SECONDS:
                self._purged_at = now
                repository.purge(KEPT_FOR)
            return repository.claim_due(
                limit=limit, first=PER_ENDPOINT, room=room, seconds=CLAIM_SECONDS
            )

    def _start(self, claim: Claim) -> None:
        task = asyncio.create_task(self._try(claim))
        self._tasks[task] = claim
        task.add_done_callback(self._over)

    async def _try(self, claim: Claim) -> None:
        """Posts a delivery and leaves the result to be recorded."""
        if not claim.holds(LEAST_SECONDS):
            await self._give_back([claim])
            self._lanes.ended(claim, None)
            return
        began = time.monotonic()
        try:
            reply = await self._post(claim.delivery)
        except asyncio.CancelledError:
            self._lanes.ended(claim, None)
            raise
        self._lanes.ended(claim, time.monotonic() - began)
        say = log.debug if reply.error is None else log.info
        say(
            "webhooks.tried",
            delivery=public_id("webhook_delivery", claim.delivery.id),
            tries=claim.delivery.tries + 1,
            status=reply.status,
            error=reply.error,
        )
        self._results.append((claim, reply))
        self._ended.set()
        if reply.status == GONE:
            await self._give_back(self._lanes.close(claim.delivery.endpoint_id))

    async def _post(self, delivery: ClaimedDelivery) -> Reply:
        problem = find_url_problem(delivery.url, allow_private=self._client.allow_private)
        if problem is not None:  # it was taken under other settings
            return Reply(None, f"refused: {problem}")
        try:
            secrets = [decrypt_secret(self._cipher, item) for item in delivery.secrets_encrypted]
        except Unavailable as error:
            return Reply(None, str(error))
        request = sign_request(secrets, delivery.payload)
        return await self._client.post(delivery.url, request.headers, request.body)

    def _over(self, task: "asyncio.Task[None]") -> None:
        claim = self._tasks.pop(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:  # not recorded, so the claim runs out and it is tried again
            log.error("webhooks.try_lost", delivery=str(claim.delivery.id), error=repr(error))
        key = claim.delivery.endpoint_id
        if self._lanes.is_crowded:
            for other in self._lanes.take():
                self._start(other)
        elif (following := self._lanes.take_of(key)) is not None:
            self._start(following)
        if self._lanes.is_hungry(key):
            self._hungry.set()

    async def _record_for_ever(self) -> None:
        """Records results as they come, many at once; while the database is away they wait for it."""
        while True:
            await self._ended.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._ended.clear()
            try:
                await self._record()
            except (DBAPIError, PoolTimeout) as error:
                log.warning("webhooks.database_away", error=str(error))
                await asyncio.sleep(self._poll_seconds)
                self._ended.set()

    async def _record(self) -> None:
        # Without its claim a result is refused by the database: somebody else is trying it by then.
        batch = [(claim, reply) for claim, reply in self._results if claim.holds()]
        closed = {c.delivery.endpoint_id for c, reply in self._results if reply.status == GONE}
        self._results = []
        results = [(claim.delivery, reply) for claim, reply in batch]
        try:
            if results:
                await self._in_database(partial(self._write, results))
        except (DBAPIError, PoolTimeout):
            self._results = batch + self._results
            raise
        self._lanes.reopen(closed)

    def _write(self, results: list[tuple[ClaimedDelivery, Reply]]) -> None:
        with transaction(self._factory) as session:
            record_results(session, results, scale=self._scale)

    async def _wind_down(self, recording: "asyncio.Task[None]") -> None:
        left = self._lanes.drop_waiting()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_SECONDS)
        cut = dict(self._tasks)
        for task in cut:
            task.cancel()
        await asyncio.gather(*cut, return_exceptions=True)
        recording.cancel()
        await asyncio.gather(recording, return_exceptions=True)
        await self._client.aclose()
        with contextlib.suppress(DBAPIError, PoolTimeout):  # the claims run out by themselves
            await self._record()
        await self._give_back([*left, *cut.values()])

    async def _give_back(self, claims: list[Claim]) -> None:
        """Lets others have claims at once; where that fails, they run out by themselves."""
        if claims:
            deliveries = [claim.delivery for claim in claims]
            with contextlib.suppress(DBAPIError, PoolTimeout):
                await self._in_database(partial(self._release, deliveries))

    def _release(self, deliveries: list[ClaimedDelivery]) -> None:
        with transaction(self._factory) as session:
            WebhookDeliveryRepository(session).release(deliveries)

    async def _in_database(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._database, work)

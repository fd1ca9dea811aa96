"""Delivers webhook events: signed, retried for three days, at least once, in any order."""

import asyncio
import contextlib
import email.utils
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

import orjson
import structlog
from cryptography.fernet import MultiFernet
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.control.webhook_http import Reply, WebhookClient
from app.db.repositories.webhooks import (
    ClaimedDelivery,
    WebhookDeliveryRepository,
    WebhookEndpointRepository,
)
from app.db.session import SessionFactory, transaction
from app.domain.identifiers import public_id
from app.errors import Unavailable
from app.services.ciphers import load_cipher
from app.services.webhooks import decrypt_secret, emit_event, sign
from app.settings import Settings

#: Seconds to wait after the first, second, ... failed try; then the delivery is dead. About three days.
GAPS_SECONDS: Final = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
JITTER_RATIO: Final = 0.2
MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
PER_ENDPOINT: Final = 2
MAX_IN_FLIGHT: Final = 50
CLAIM_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.5
STOP_SECONDS: Final = (
    3.0  # what is in flight may end within it, else it is tried again by whoever comes next
)
DISABLE_AFTER: Final = timedelta(days=5)
DISABLE_AFTER_TRIES: Final = 10
KEPT_FOR: Final = timedelta(days=30)
PURGE_SECONDS: Final = 3600.0
_GONE = 410
_THROTTLED = frozenset({429, 503})

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
    """The loop: claim in one short transaction, post without any, record in another.

    Args:
        factory: Sessions that really commit.
        cipher: Decrypts the endpoints' secrets.
        client: Makes the tries.
        schedule_scale: Multiplies the gaps between tries.
    """

    def __init__(
        self,
        factory: SessionFactory,
        cipher: MultiFernet,
        client: WebhookClient,
        *,
        schedule_scale: float = 1.0,
    ) -> None:
        self._factory = factory
        self._cipher = cipher
        self._client = client
        self._scale = schedule_scale
        self._in_flight: dict[asyncio.Task[None], ClaimedDelivery] = {}
        # Threads of its own: slow name lookups fill the event loop's default ones.
        self._database = ThreadPoolExecutor(4, thread_name_prefix="webhook-db")
        self._purged_at = -PURGE_SECONDS

    async def run(self, stop: threading.Event) -> None:
        """Delivers until `stop` is set, then gives what is in flight a moment to end."""
        resolving = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="webhook-dns")
        asyncio.get_running_loop().set_default_executor(resolving)
        try:
            while not stop.is_set():
                try:
                    num_claimed = await self._start_due()
                except (DBAPIError, PoolTimeout) as error:
                    log.warning("webhooks.database_away", error=str(error))
                    num_claimed = 0
                if num_claimed == 0:
                    await self._rest()
            await self._wind_down()
        finally:
            self._database.shutdown()
            resolving.shutdown(wait=False, cancel_futures=True)

    async def _start_due(self) -> int:
        free = MAX_IN_FLIGHT - len(self._in_flight)
        if free == 0:
            return 0
        counts = Counter(delivery.endpoint_id for delivery in self._in_flight.values())
        claimed = await self._in_database(partial(self._claim, free, counts))
        for delivery in claimed:
            task = asyncio.create_task(self._try(delivery))
            self._in_flight[task] = delivery
            task.add_done_callback(self._ended)
        return len(claimed)

    def _claim(self, limit: int, in_flight: Counter[UUID]) -> list[ClaimedDelivery]:
        with transaction(self._factory) as session:
            repository = WebhookDeliveryRepository(session)
            repository.bury_orphans()
            if time.monotonic() - self._purged_at > PURGE_SECONDS:
                self._purged_at = time.monotonic()
                repository.purge(KEPT_FOR)
            return repository.claim_due(
                limit=limit, per_endpoint=PER_ENDPOINT, in_flight=in_flight, seconds=CLAIM_SECONDS
            )

    async def _try(self, delivery: ClaimedDelivery) -> None:
        reply = await self._post(delivery)
        log.info(
            "webhooks.tried",
            delivery=public_id("webhook_delivery", delivery.id),
            tries=delivery.tries + 1,
            status=reply.status,
            error=reply.error,
        )
        await self._in_database(partial(self._record, delivery, reply))

    async def _post(self, delivery: ClaimedDelivery) -> Reply:
        body = orjson.dumps(delivery.payload, option=orjson.OPT_SORT_KEYS)
        message_id = public_id("webhook_event", delivery.event_id)
        timestamp = int(time.time())
        try:
            secrets = [decrypt_secret(self._cipher, item) for item in delivery.secrets_encrypted]
        except Unavailable as error:
            return Reply(None, str(error))
        headers = {
            "content-type": "application/json",
            "accept-encoding": "identity",
            "user-agent": "Retain-Webhooks/1",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(
                secrets, message_id=message_id, timestamp=timestamp, body=body
            ),
        }
        return await self._client.post(delivery.url, headers, body)

    def _record(self, delivery: ClaimedDelivery, reply: Reply) -> None:
        with transaction(self._factory) as session:
            endpoints = WebhookEndpointRepository(session)
            WebhookDeliveryRepository(session).finish_try(
                delivery.id,
                retry_in=None if reply.status == _GONE else self._retry_in(delivery, reply),
                status=reply.status,
                error=reply.error,
                reply=reply.body,
            )
            if reply.error is None:
                endpoints.note_success(delivery.endpoint_id)
                return
            endpoints.note_failure(delivery.endpoint_id)
            if reply.status == _GONE:
                reason, failing_for, min_failures = "It answered 410 Gone.", timedelta(0), 1
            else:
                reason = f"Every try failed for {DISABLE_AFTER.days} days; the last: {reply.error}."
                failing_for, min_failures = DISABLE_AFTER, DISABLE_AFTER_TRIES
            project_id = endpoints.disable(
                delivery.endpoint_id, reason, failing_for=failing_for, min_failures=min_failures
            )
            if project_id is not None:
                emit_event(
                    session,
                    project_id=project_id,
                    type="webhook_endpoint.disabled",
                    data={
                        "id": public_id("webhook_endpoint", delivery.endpoint_id),
                        "reason": reason,
                    },
                )

    def _retry_in(self, delivery: ClaimedDelivery, reply: Reply) -> timedelta | None:
        if delivery.tries >= len(GAPS_SECONDS):
            return None
        jitter = random.uniform(1 - JITTER_RATIO, 1 + JITTER_RATIO)  # noqa: S311 - not a secret
        seconds = GAPS_SECONDS[delivery.tries] * jitter * self._scale
        if reply.status in _THROTTLED and reply.retry_after is not None:
            seconds = max(seconds, parse_retry_after(reply.retry_after))
        return timedelta(seconds=seconds)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        delivery = self._in_flight.pop(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:  # not recorded, so the claim runs out and it is tried again
            log.error("webhooks.try_lost", delivery=str(delivery.id), error=repr(error))

    async def _rest(self) -> None:
        """Waits for the next poll, or for a slot."""
        if self._in_flight:
            await asyncio.wait(
                self._in_flight, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        else:
            await asyncio.sleep(POLL_SECONDS)

    async def _wind_down(self) -> None:
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=STOP_SECONDS)
        cut = dict(self._in_flight)
        for task in cut:
            task.cancel()
        await asyncio.gather(*cut, return_exceptions=True)
        await self._client.aclose()
        if cut:
            ids = [delivery.id for delivery in cut.values()]
            with contextlib.suppress(DBAPIError, PoolTimeout):  # the claims run out by themselves
                await self._in_database(partial(self._release, ids))

    def _release(self, delivery_ids: list[UUID]) -> None:
        with transaction(self._factory) as session:
            WebhookDeliveryRepository(session).release(delivery_ids)

    async def _in_database(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._database, work)


def parse_retry_after(text: str) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or a date; 0 when unreadable, at most a day."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:10]), MAX_RETRY_AFTER_SECONDS)
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    seconds = (when - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)

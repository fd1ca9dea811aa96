"""What follows from a webhook's try: delivered, tried again by the schedule, or dead; and what it says of its endpoint."""

import email.utils
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy.orm import Session

from app.control.webhook_http import Reply
from app.db.repositories.webhook_deliveries import (
    PROBE_SECONDS,
    ClaimedDelivery,
    Outcome,
    WebhookDeliveryRepository,
)
from app.db.repositories.webhooks import Showing, WebhookEndpointRepository
from app.domain.identifiers import public_id
from app.domain.states import DeliveryState
from app.services.webhooks import emit_event

#: Seconds to wait after the first, second, ... failed try; then the delivery is dead. About three days.
GAPS_SECONDS: Final = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
JITTER_RATIO: Final = 0.2
MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
DISABLE_AFTER: Final = timedelta(days=5)
DISABLE_AFTER_TRIES: Final = 10
GONE: Final = 410
THROTTLED: Final = frozenset({429, 503})

Result = tuple[ClaimedDelivery, Reply]


def record_results(session: Session, results: Sequence[Result], *, scale: float) -> None:
    """Records tries, and what they show of their endpoints, in one transaction.

    Args:
        session: The transaction.
        results: Tries in the order in which they ended.
        scale: Multiplies the gaps between tries.
    """
    deliveries = WebhookDeliveryRepository(session)
    endpoints = WebhookEndpointRepository(session)
    deliveries.finish_tries([judge(delivery, reply, scale=scale) for delivery, reply in results])
    showings = summarise(results)
    answered = [showing.endpoint_id for showing in showings if showing.has_answered]
    if answered:
        deliveries.hurry(answered)
    endpoints.note(showings)
    failed = {delivery.endpoint_id: reply for delivery, reply in results if reply.error is not None}
    for endpoint_id in sorted(failed):
        if _switch_off(session, endpoint_id, failed[endpoint_id]):
            continue
        deliveries.probe(endpoint_id, after_seconds=scale * random.uniform(*PROBE_SECONDS))  # noqa: S311 - no secret


def judge(delivery: ClaimedDelivery, reply: Reply, *, scale: float) -> Outcome:
    """What becomes of a delivery after a try."""
    state, retry, wait = DeliveryState.PENDING, 0.0, 0.0
    if reply.error is None:
        state = DeliveryState.DELIVERED
    elif reply.status == GONE or (delivery.tries >= len(GAPS_SECONDS) and not delivery.is_probe):
        state = DeliveryState.DEAD
    else:
        if reply.status in THROTTLED and reply.retry_after is not None:
            wait = parse_retry_after(reply.retry_after)
        jitter = random.uniform(1 - JITTER_RATIO, 1 + JITTER_RATIO)  # noqa: S311 - not a secret
        gap = GAPS_SECONDS[min(delivery.tries, len(GAPS_SECONDS) - 1)]
        retry = max(gap * jitter * scale, wait)
    return Outcome(
        delivery=delivery,
        state=state,
        retry_seconds=retry,
        wait_seconds=wait,
        status=reply.status,
        error=reply.error,
        reply=reply.body,
    )


def summarise(results: Sequence[Result]) -> list[Showing]:
    """What the tries show of each endpoint."""
    found: dict[UUID, Showing] = {}
    for delivery, reply in results:
        key = delivery.endpoint_id
        before = found.get(key, Showing(key, has_answered=False, num_failures=0))
        if reply.error is None:
            found[key] = Showing(key, has_answered=True, num_failures=0)
        else:
            found[key] = Showing(key, before.has_answered, before.num_failures + 1)
    return list(found.values())


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


def _switch_off(session: Session, endpoint_id: UUID, reply: Reply) -> bool:
    """Disables an endpoint that is gone or has failed for too long, and tells the project's others."""
    if reply.status == GONE:
        reason, failing_for, min_failures = "It answered 410 Gone.", timedelta(0), 1
    else:
        reason = f"Every try failed for {DISABLE_AFTER.days} days; the last: {reply.error}."
        failing_for, min_failures = DISABLE_AFTER, DISABLE_AFTER_TRIES
    project_id = WebhookEndpointRepository(session).disable(
        endpoint_id, reason, failing_for=failing_for, min_failures=min_failures
    )
    if project_id is None:
        return False
    WebhookDeliveryRepository(session).bury_orphans()
    emit_event(
        session,
        project_id=project_id,
        type="webhook_endpoint.disabled",
        data={"id": public_id("webhook_endpoint", endpoint_id), "reason": reason},
    )
    return True

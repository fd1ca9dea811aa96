"""Queries on webhook events and their deliveries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import orjson
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from app.db.models import WebhookDelivery, WebhookEndpoint, WebhookEvent
from app.db.repositories.paging import newest_first
from app.domain.states import DeliveryState
from app.errors import NotFound

#: Where an endpoint that fails has nothing to try within `WITHIN`, its next delivery is tried after `PROBE`
#: seconds: so an endpoint that is back is found out within the hour, however long the schedule's next gap is.
PROBE_SECONDS: Final = (2400.0, 3540.0)
WITHIN: Final = timedelta(hours=1)
#: An endpoint that failed for less than this was not away, and what it refused keeps its schedule.
AWAY: Final = timedelta(minutes=1)


@dataclass(frozen=True)
class ClaimedDelivery:
    """Everything needed to make one try without the database."""

    id: UUID
    event_id: UUID
    endpoint_id: UUID
    url: str
    payload: dict[str, Any]
    secrets_encrypted: tuple[bytes, ...]  # the current one first
    tries: int  # of the schedule, made before this one
    is_probe: bool  # before its scheduled time: a failure uses up none of the schedule
    claimed_until: datetime  # whoever records the try must still hold this very claim


@dataclass(frozen=True)
class Outcome:
    """What came of a try, and what is next."""

    delivery: ClaimedDelivery
    state: DeliveryState
    retry_seconds: float  # until the next one, where it stays pending
    wait_seconds: float  # that the receiver asked for
    status: int | None
    error: str | None
    reply: str | None


# Endpoints with pending deliveries are found by hops over the index, so a long backlog of one costs the others
# nothing; of each, the first ones that are due. `statement_timestamp()` is stable, so it bounds the index scan.
_CLAIM = text("""
WITH RECURSIVE lanes AS (
  (SELECT endpoint_id FROM webhook_deliveries WHERE state = 'pending' ORDER BY endpoint_id LIMIT 1)
  UNION ALL
  SELECT (SELECT d.endpoint_id FROM webhook_deliveries d
           WHERE d.state = 'pending' AND d.endpoint_id > l.endpoint_id ORDER BY d.endpoint_id LIMIT 1)
    FROM lanes l WHERE l.endpoint_id IS NOT NULL),
due AS MATERIALIZED (
  SELECT head.id FROM lanes l
    JOIN webhook_endpoints e ON e.id = l.endpoint_id AND e.disabled_at IS NULL AND e.deleted_at IS NULL
   CROSS JOIN LATERAL (
     SELECT d.id, d.next_try_at FROM webhook_deliveries d
      WHERE d.endpoint_id = l.endpoint_id AND d.state = 'pending' AND d.next_try_at <= statement_timestamp()
        AND (d.claimed_until IS NULL OR d.claimed_until <= statement_timestamp())
      ORDER BY d.next_try_at, d.seq
      LIMIT greatest(coalesce((CAST(:room AS jsonb) ->> l.endpoint_id::text)::int, :first), 0)
        FOR UPDATE SKIP LOCKED) head
   ORDER BY head.next_try_at LIMIT :limit)
UPDATE webhook_deliveries d SET claimed_until = clock_timestamp() + make_interval(secs => :seconds)
  FROM due, webhook_endpoints e, webhook_events v
 WHERE d.id = due.id AND e.id = d.endpoint_id AND v.id = d.event_id
RETURNING d.id, d.seq, d.event_id, d.endpoint_id, d.tries, d.next_try_at, d.claimed_until, e.url, v.payload,
          coalesce(d.scheduled_at > statement_timestamp(), false) AS is_probe, e.secret_encrypted,
          CASE WHEN e.previous_secret_until > clock_timestamp() THEN e.previous_secret_encrypted END AS previous
""")

_FINISH = text("""
UPDATE webhook_deliveries d SET
       state = r.state,
       tries = d.tries + CASE WHEN r.is_probe AND r.error IS NOT NULL THEN 0 ELSE 1 END,
       claimed_until = NULL,
       not_before = CASE WHEN r.wait_seconds > 0
                         THEN clock_timestamp() + make_interval(secs => r.wait_seconds) END,
       next_try_at = CASE WHEN r.is_probe AND r.state = 'pending'
                          THEN greatest(d.scheduled_at,
                                        clock_timestamp() + make_interval(secs => r.wait_seconds))
                          ELSE clock_timestamp() + make_interval(secs => r.retry_seconds) END,
       scheduled_at = NULL,
       delivered_at = CASE WHEN r.error IS NULL THEN clock_timestamp() END,
       last_status = r.status, last_error = r.error, last_reply = r.reply
  FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r(
       id uuid, claimed_until timestamptz, state text, is_probe boolean, retry_seconds float,
       wait_seconds float, status int, error text, reply text)
 WHERE d.id = r.id AND d.claimed_until = r.claimed_until AND d.state = 'pending'
""")

_HURRY = text("""
UPDATE webhook_deliveries d
   SET scheduled_at = coalesce(d.scheduled_at, d.next_try_at), next_try_at = clock_timestamp()
  FROM webhook_endpoints e
 WHERE e.id = ANY(:endpoint_ids) AND e.failing_since <= clock_timestamp() - CAST(:away AS interval)
   AND d.endpoint_id = e.id AND d.state = 'pending' AND d.claimed_until IS NULL
   AND d.next_try_at > clock_timestamp() AND (d.not_before IS NULL OR d.not_before <= clock_timestamp())
""")

_PROBE = text("""
UPDATE webhook_deliveries d
   SET scheduled_at = d.next_try_at,
       next_try_at = greatest(coalesce(d.not_before, clock_timestamp()),
                              clock_timestamp() + make_interval(secs => :seconds))
 WHERE d.id = (SELECT p.id FROM webhook_deliveries p
                WHERE p.endpoint_id = :endpoint_id AND p.state = 'pending'
                ORDER BY p.next_try_at, p.seq LIMIT 1)
   AND d.state = 'pending' AND d.claimed_until IS NULL AND d.scheduled_at IS NULL
   AND greatest(coalesce(d.not_before, clock_timestamp()), clock_timestamp() + CAST(:within AS interval))
       < d.next_try_at
""")


class WebhookDeliveryRepository:
    """Events on their way to endpoints."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add_event(self, event: WebhookEvent, endpoint_ids: list[UUID]) -> None:
        """Keeps an event with one pending delivery for each endpoint."""
        self._session.add(event)
        self._session.flush()
        self._session.add_all(
            WebhookDelivery(event_id=event.id, endpoint_id=endpoint_id, state=DeliveryState.PENDING)
            for endpoint_id in endpoint_ids
        )
        self._session.flush()

    def claim_due(
        self, *, limit: int, first: int, room: Mapping[UUID, int], seconds: float
    ) -> list[ClaimedDelivery]:
        """Takes due deliveries for so many seconds, the oldest first; no other sender sees them meanwhile.

        Args:
            limit: At most so many.
            first: At most so many of an endpoint that `room` does not name.
            room: At most so many more of each endpoint.
            seconds: How long the claim holds if its sender dies.
        """
        rows = self._session.execute(
            _CLAIM,
            {
                "limit": limit,
                "first": first,
                "room": orjson.dumps({str(k): v for k, v in room.items()}).decode(),
                "seconds": seconds,
            },
        )
        return [
            ClaimedDelivery(
                id=row.id,
                event_id=row.event_id,
                endpoint_id=row.endpoint_id,
                url=row.url,
                payload=row.payload,
                tries=row.tries,
                is_probe=row.is_probe,
                claimed_until=row.claimed_until,
                secrets_encrypted=tuple(
                    bytes(secret)
                    for secret in (row.secret_encrypted, row.previous)
                    if secret is not None
                ),
            )
            for row in sorted(rows, key=lambda row: (row.next_try_at, row.seq))
        ]

    def finish_tries(self, outcomes: Sequence[Outcome]) -> None:
        """Records tries; one whose claim was lost in the meantime is nobody's any more and is left alone."""
        rows = [
            {
                "id": outcome.delivery.id,
                "claimed_until": outcome.delivery.claimed_until,
                "state": outcome.state,
                "is_probe": outcome.delivery.is_probe,
                "retry_seconds": outcome.retry_seconds,
                "wait_seconds": outcome.wait_seconds,
                "status": outcome.status,
                "error": outcome.error,
                "reply": outcome.reply,
            }
            for outcome in outcomes
        ]
        self._session.execute(_FINISH, {"rows": orjson.dumps(rows).decode()})

    def hurry(self, endpoint_ids: Sequence[UUID]) -> None:
        """Makes everything due that waits for endpoints which were away and are back, as they just showed."""
        self._session.execute(_HURRY, {"endpoint_ids": list(endpoint_ids), "away": AWAY})

    def probe(self, endpoint_id: UUID, *, after_seconds: float) -> None:
        """Has an endpoint that fails tried within the hour, by its next delivery, outside the schedule."""
        self._session.execute(
            _PROBE, {"endpoint_id": endpoint_id, "seconds": after_seconds, "within": WITHIN}
        )

    def release(self, claims: Sequence[ClaimedDelivery]) -> None:
        """Gives claims back without counting a try."""
        for claim in claims:
            self._session.execute(
                update(WebhookDelivery)
                .where(
                    WebhookDelivery.id == claim.id,
                    WebhookDelivery.claimed_until == claim.claimed_until,
                )
                .values(claimed_until=None)
            )

    def bury_orphans(self) -> None:
        """Ends deliveries to endpoints that are disabled or deleted; they can still be redelivered.

        What is being tried right now is left to whoever tries it.
        """
        is_off = WebhookEndpoint.disabled_at.is_not(None) | WebhookEndpoint.deleted_at.is_not(None)
        now = func.clock_timestamp()
        is_free = WebhookDelivery.claimed_until.is_(None) | (WebhookDelivery.claimed_until <= now)
        self._session.execute(
            update(WebhookDelivery)
            .where(
                WebhookDelivery.state == DeliveryState.PENDING,
                WebhookDelivery.endpoint_id == WebhookEndpoint.id,
                is_off,
                is_free,
            )
            .values(
                state=DeliveryState.DEAD,
                claimed_until=None,
                last_error="The endpoint is disabled or deleted.",
            )
            .execution_options(synchronize_session=False)
        )

    def purge(self, age: timedelta) -> None:
        """Deletes deliveries that ended, and events without deliveries, once they are that old."""
        horizon = func.clock_timestamp() - age
        self._session.execute(
            delete(WebhookDelivery).where(
                WebhookDelivery.state != DeliveryState.PENDING, WebhookDelivery.created_at < horizon
            )
        )
        has_delivery = select(WebhookDelivery.id).where(WebhookDelivery.event_id == WebhookEvent.id)
        self._session.execute(
            delete(WebhookEvent).where(WebhookEvent.created_at < horizon, ~has_delivery.exists())
        )

    def list_page(
        self,
        endpoint_id: UUID,
        *,
        state: DeliveryState | None,
        after: WebhookDelivery | None,
        limit: int,
    ) -> list[tuple[WebhookDelivery, WebhookEvent]]:
        """Deliveries to an endpoint with their events, newest first."""
        query = (
            select(WebhookDelivery, WebhookEvent)
            .join(WebhookEvent, WebhookEvent.id == WebhookDelivery.event_id)
            .where(WebhookDelivery.endpoint_id == endpoint_id)
        )
        if state is not None:
            query = query.where(WebhookDelivery.state == state)
        rows = self._session.execute(newest_first(query, WebhookDelivery, after=after, limit=limit))
        return [(delivery, event) for delivery, event in rows]

    def get(self, endpoint_id: UUID, delivery_id: UUID) -> WebhookDelivery:
        """The delivery with this id.

        Raises:
            NotFound: The endpoint has no such delivery.
        """
        found = self._session.scalar(
            select(WebhookDelivery).where(
                WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint_id
            )
        )
        if found is None:
            raise NotFound("No delivery has this id.", "delivery_id")
        return found

    def redeliver(self, delivery: WebhookDelivery) -> None:
        """Starts a delivery over, whatever became of it."""
        self._start_over(WebhookDelivery.id == delivery.id)
        self._session.refresh(delivery)

    def redeliver_since(self, endpoint_id: UUID, since: datetime, state: DeliveryState) -> int:
        """Starts an endpoint's deliveries over that are in a state and were made since a time; their number."""
        return self._start_over(
            WebhookDelivery.endpoint_id == endpoint_id,
            WebhookDelivery.created_at >= since,
            WebhookDelivery.state == state,
        )

    def _start_over(self, *which: Any) -> int:  # noqa: ANN401 - conditions, as SQLAlchemy takes them
        found = self._session.execute(
            update(WebhookDelivery)
            .where(*which)
            .values(
                state=DeliveryState.PENDING,
                tries=0,
                delivered_at=None,
                claimed_until=None,
                scheduled_at=None,
                not_before=None,
                next_try_at=func.clock_timestamp(),
            )
            .returning(WebhookDelivery.id)
            .execution_options(synchronize_session=False)
        )
        return len(found.all())

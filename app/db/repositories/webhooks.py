"""Queries on webhook endpoints, events and deliveries."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from app.db.models import WebhookDelivery, WebhookEndpoint, WebhookEvent
from app.db.repositories.paging import newest_first
from app.domain.states import DeliveryState
from app.errors import NotFound


@dataclass(frozen=True)
class ClaimedDelivery:
    """Everything needed to make one try without the database."""

    id: UUID
    event_id: UUID
    endpoint_id: UUID
    url: str
    payload: dict[str, Any]
    secrets_encrypted: tuple[bytes, ...]  # the current one first
    tries: int  # made before this one


class WebhookEndpointRepository:
    """Endpoints of a project."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, endpoint: WebhookEndpoint) -> None:
        """Keeps a new endpoint."""
        self._session.add(endpoint)
        self._session.flush()
        self._session.refresh(endpoint)

    def count(self, project_id: UUID) -> int:
        """Number of endpoints that are not deleted."""
        query = select(func.count()).where(
            WebhookEndpoint.project_id == project_id, WebhookEndpoint.deleted_at.is_(None)
        )
        return self._session.execute(query).scalar_one()

    def get(
        self, project_id: UUID, endpoint_id: UUID, *, for_update: bool = False
    ) -> WebhookEndpoint:
        """The endpoint with this id.

        Raises:
            NotFound: The project has no such endpoint.
        """
        query = select(WebhookEndpoint).where(
            WebhookEndpoint.id == endpoint_id,
            WebhookEndpoint.project_id == project_id,
            WebhookEndpoint.deleted_at.is_(None),
        )
        found = self._session.scalar(query.with_for_update() if for_update else query)
        if found is None:
            raise NotFound("No webhook endpoint has this id.", "webhook_endpoint_id")
        return found

    def list_page(
        self, project_id: UUID, *, after: WebhookEndpoint | None, limit: int
    ) -> list[WebhookEndpoint]:
        """Endpoints that are not deleted, newest first."""
        query = select(WebhookEndpoint).where(
            WebhookEndpoint.project_id == project_id, WebhookEndpoint.deleted_at.is_(None)
        )
        query = newest_first(query, WebhookEndpoint, after=after, limit=limit)
        return list(self._session.scalars(query))

    def list_subscribed(self, project_id: UUID, event_type: str) -> list[UUID]:
        """Ids of the live endpoints that want this type of event."""
        query = select(WebhookEndpoint.id).where(
            WebhookEndpoint.project_id == project_id,
            WebhookEndpoint.deleted_at.is_(None),
            WebhookEndpoint.disabled_at.is_(None),
            WebhookEndpoint.event_types.contains([event_type]),
        )
        return list(self._session.scalars(query))

    def note_success(self, endpoint_id: UUID) -> None:
        """Ends the endpoint's run of failures."""
        self._session.execute(
            update(WebhookEndpoint)
            .where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.failures_in_a_row > 0)
            .values(failing_since=None, failures_in_a_row=0)
        )

    def note_failure(self, endpoint_id: UUID) -> None:
        """Counts one more failure in a row."""
        self._session.execute(
            update(WebhookEndpoint)
            .where(WebhookEndpoint.id == endpoint_id)
            .values(
                failures_in_a_row=WebhookEndpoint.failures_in_a_row + 1,
                failing_since=func.coalesce(WebhookEndpoint.failing_since, func.clock_timestamp()),
            )
        )

    def disable(
        self, endpoint_id: UUID, reason: str, *, failing_for: timedelta, min_failures: int
    ) -> UUID | None:
        """Switches a live endpoint off when it has failed that long and that often; its project's id, if so."""
        return self._session.scalar(
            update(WebhookEndpoint)
            .where(
                WebhookEndpoint.id == endpoint_id,
                WebhookEndpoint.disabled_at.is_(None),
                WebhookEndpoint.failures_in_a_row >= min_failures,
                WebhookEndpoint.failing_since <= func.clock_timestamp() - failing_for,
            )
            .values(
                disabled_at=func.clock_timestamp(),
                updated_at=func.clock_timestamp(),
                disabled_reason=reason,
            )
            .returning(WebhookEndpoint.project_id)
        )


_CLAIM = text("""
WITH ranked AS (
  SELECT d.id, d.endpoint_id,
         row_number() OVER (PARTITION BY d.endpoint_id ORDER BY d.next_try_at, d.seq) AS place
    FROM webhook_deliveries d JOIN webhook_endpoints e ON e.id = d.endpoint_id
   WHERE d.state = 'pending' AND d.next_try_at <= clock_timestamp()
     AND (d.claimed_until IS NULL OR d.claimed_until <= clock_timestamp())
     AND e.disabled_at IS NULL AND e.deleted_at IS NULL),
due AS MATERIALIZED (
  SELECT d.id FROM webhook_deliveries d JOIN ranked r ON r.id = d.id
   WHERE r.place <= :per_endpoint - coalesce((CAST(:in_flight AS jsonb) ->> r.endpoint_id::text)::int, 0)
     AND d.state = 'pending' AND (d.claimed_until IS NULL OR d.claimed_until <= clock_timestamp())
   ORDER BY d.next_try_at FOR UPDATE OF d SKIP LOCKED LIMIT :limit)
UPDATE webhook_deliveries d SET claimed_until = clock_timestamp() + make_interval(secs => :seconds)
  FROM due, webhook_endpoints e, webhook_events v
 WHERE d.id = due.id AND e.id = d.endpoint_id AND v.id = d.event_id
RETURNING d.id, d.event_id, d.endpoint_id, e.url, v.payload, d.tries, e.secret_encrypted,
          CASE WHEN e.previous_secret_until > clock_timestamp() THEN e.previous_secret_encrypted END AS previous
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
        self, *, limit: int, per_endpoint: int, in_flight: Mapping[UUID, int], seconds: float
    ) -> list[ClaimedDelivery]:
        """Takes due deliveries for so many seconds; no other sender sees them meanwhile.

        Args:
            limit: At most so many.
            per_endpoint: At most so many of one endpoint, those in flight included.
            in_flight: Number of tries that the caller has running, by endpoint.
            seconds: How long the claim holds if its sender dies.
        """
        rows = self._session.execute(
            _CLAIM,
            {
                "limit": limit,
                "per_endpoint": per_endpoint,
                "in_flight": orjson.dumps({str(k): v for k, v in in_flight.items()}).decode(),
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
                secrets_encrypted=tuple(
                    bytes(secret)
                    for secret in (row.secret_encrypted, row.previous)
                    if secret is not None
                ),
            )
            for row in rows
        ]

    def finish_try(
        self,
        delivery_id: UUID,
        *,
        retry_in: timedelta | None,
        status: int | None,
        error: str | None,
        reply: str | None,
    ) -> None:
        """Records one try: without an error it is delivered, else tried again after `retry_in`, or dead."""
        if error is None:
            state = DeliveryState.DELIVERED
        else:
            state = DeliveryState.DEAD if retry_in is None else DeliveryState.PENDING
        self._session.execute(
            update(WebhookDelivery)
            .where(
                WebhookDelivery.id == delivery_id, WebhookDelivery.state == DeliveryState.PENDING
            )
            .values(
                state=state,
                tries=WebhookDelivery.tries + 1,
                claimed_until=None,
                next_try_at=func.clock_timestamp() + (retry_in or timedelta(0)),
                delivered_at=func.clock_timestamp() if error is None else None,
                last_status=status,
                last_error=error,
                last_reply=reply,
            )
        )

    def release(self, delivery_ids: list[UUID]) -> None:
        """Gives claims back without counting a try."""
        self._session.execute(
            update(WebhookDelivery)
            .where(
                WebhookDelivery.id.in_(delivery_ids), WebhookDelivery.state == DeliveryState.PENDING
            )
            .values(claimed_until=None)
        )

    def bury_orphans(self) -> None:
        """Ends deliveries to endpoints that are disabled or deleted; they can still be redelivered."""
        is_off = WebhookEndpoint.disabled_at.is_not(None) | WebhookEndpoint.deleted_at.is_not(None)
        self._session.execute(
            update(WebhookDelivery)
            .where(
                WebhookDelivery.state == DeliveryState.PENDING,
                WebhookDelivery.endpoint_id == WebhookEndpoint.id,
                is_off,
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
        self, endpoint_id: UUID, *, after: WebhookDelivery | None, limit: int
    ) -> list[tuple[WebhookDelivery, WebhookEvent]]:
        """Deliveries to an endpoint with their events, newest first."""
        query = (
            select(WebhookDelivery, WebhookEvent)
            .join(WebhookEvent, WebhookEvent.id == WebhookDelivery.event_id)
            .where(WebhookDelivery.endpoint_id == endpoint_id)
        )
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
        delivery.state = DeliveryState.PENDING
        delivery.tries = 0
        delivery.delivered_at = None
        delivery.claimed_until = None
        self._session.flush()
        self._session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.id == delivery.id)
            .values(next_try_at=func.clock_timestamp())
        )
        self._session.refresh(delivery)

"""Queries on webhook endpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import orjson
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from app.db.models import WebhookEndpoint
from app.db.repositories.paging import newest_first
from app.errors import NotFound


@dataclass(frozen=True)
class Showing:
    """What tries showed of an endpoint, in the order in which they ended."""

    endpoint_id: UUID
    has_answered: bool  # one of them succeeded: the run of failures before it is over
    num_failures: int  # after the last success


# Rows are locked in one order: two senders that hear from the same endpoints must not wait for each other.
_NOTE = text("""
WITH r AS MATERIALIZED (
  SELECT e.id, s.has_answered, s.num_failures FROM webhook_endpoints e
    JOIN jsonb_to_recordset(CAST(:rows AS jsonb)) AS s(
         endpoint_id uuid, has_answered boolean, num_failures int) ON s.endpoint_id = e.id
   WHERE s.num_failures > 0 OR e.failures_in_a_row > 0
   ORDER BY e.id FOR NO KEY UPDATE OF e)
UPDATE webhook_endpoints e SET
       failures_in_a_row = CASE WHEN r.has_answered THEN 0 ELSE e.failures_in_a_row END + r.num_failures,
       failing_since = CASE WHEN r.num_failures = 0 THEN NULL
                            WHEN r.has_answered OR e.failing_since IS NULL THEN clock_timestamp()
                            ELSE e.failing_since END
  FROM r WHERE e.id = r.id
""")


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

    def note(self, showings: Sequence[Showing]) -> None:
        """Counts failures in a row, and ends the runs of endpoints that answered."""
        rows = [
            {
                "endpoint_id": showing.endpoint_id,
                "has_answered": showing.has_answered,
                "num_failures": showing.num_failures,
            }
            for showing in showings
        ]
        self._session.execute(_NOTE, {"rows": orjson.dumps(rows).decode()})

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

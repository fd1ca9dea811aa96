"""Webhook endpoints, events and their deliveries."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, Text, UniqueConstraint, func, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record, enum_column
from app.domain.states import DeliveryState


class WebhookEndpoint(Record):
    """A receiver; its secrets are encrypted at rest."""

    __tablename__ = "webhook_endpoints"

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]] = mapped_column(ARRAY(Text))
    secret_encrypted: Mapped[bytes]
    previous_secret_encrypted: Mapped[bytes | None]
    previous_secret_until: Mapped[datetime | None]
    secret_hint: Mapped[str]
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    failing_since: Mapped[datetime | None]
    failures_in_a_row: Mapped[int] = mapped_column(server_default=text("0"))
    updated_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    deleted_at: Mapped[datetime | None]


class WebhookEvent(Record):
    """Something that happened, written in the transaction in which it happened."""

    __tablename__ = "webhook_events"

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), index=True)
    type: Mapped[str]
    job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id"))
    payload: Mapped[dict[str, Any]]  # the whole body that is signed


class WebhookDelivery(Record):
    """One event on its way to one endpoint."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("event_id", "endpoint_id"),
        Index(  # the heads of the endpoints' queues
            "ix_webhook_deliveries_pending",
            "endpoint_id",
            "next_try_at",
            "seq",
            postgresql_where=text("state = 'pending'"),
        ),
        Index("ix_webhook_deliveries_endpoint", "endpoint_id", "seq"),
    )

    event_id: Mapped[UUID] = mapped_column(ForeignKey("webhook_events.id"))
    endpoint_id: Mapped[UUID] = mapped_column(ForeignKey("webhook_endpoints.id"))
    state: Mapped[DeliveryState] = mapped_column(enum_column(DeliveryState))
    tries: Mapped[int] = mapped_column(server_default=text("0"))
    next_try_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    scheduled_at: Mapped[datetime | None]  # the schedule's time, when `next_try_at` is before it
    not_before: Mapped[datetime | None]  # what the receiver's Retry-After asked for
    claimed_until: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
    last_reply: Mapped[str | None]  # at most 2 KiB

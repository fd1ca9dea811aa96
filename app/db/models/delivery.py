"""Outbox, idempotency keys and the roll of live workers."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Identity, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base


class OutboxMessage(Base):
    """A doorbell to ring once its transaction has committed."""

    __tablename__ = "outbox"
    __table_args__ = (
        Index("ix_outbox_due", "available_at", postgresql_where=text("done_at IS NULL")),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    available_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    tries: Mapped[int] = mapped_column(server_default=text("0"))
    done_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class IdempotencyKey(Base):
    """The first answer to a POST that carried an Idempotency-Key; kept for 24 hours."""

    __tablename__ = "idempotency_keys"

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)  # method and path
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    status_code: Mapped[int | None]  # null while the first request runs
    response: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class Worker(Base):
    """A live worker process, so that the reconciler knows how many slots are idle."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)  # unique per process start
    host: Mapped[str]
    num_slots: Mapped[int]
    num_free: Mapped[int]
    device: Mapped[str]  # `cpu`, or the GPU's name
    seen_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())

"""What finished runs measured of themselves, by device class: estimates are calibrated by it."""

from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record


class MeasuredRun(Record):
    """A finished run's own numbers."""

    __tablename__ = "measured_runs"
    __table_args__ = (Index("ix_measured_runs_device_class", "device_class", "seq"),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"), unique=True)
    base_model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"), index=True)
    device_class: Mapped[str]
    measured: Mapped[dict[str, Any]]  # a `Measured`

"""Monitors of deployed aliases, their looks, and the jobs that make up for a regression."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, Text, UniqueConstraint, func, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record


class Monitor(Record):
    """Watches what an alias points at; an alias has at most one."""

    __tablename__ = "monitors"
    __table_args__ = (
        Index(
            "uq_monitors_alias_id",
            "alias_id",
            unique=True,
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index("ix_monitors_project", "project_id", "seq"),
        Index(
            "ix_monitors_due",
            "next_evaluation_at",
            postgresql_where=text("deleted_at IS NULL AND enabled"),
        ),
    )

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    alias_id: Mapped[UUID] = mapped_column(ForeignKey("aliases.id"))
    settings: Mapped[dict[str, Any]]  # a MonitorSettings, benchmarks pinned to versions
    sources: Mapped[list[str]] = mapped_column(ARRAY(Text))
    enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    next_evaluation_at: Mapped[datetime | None]  # null: not scheduled
    evaluation_job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id"))
    stale_after_hours: Mapped[float | None]
    last_result_at: Mapped[datetime | None]  # of the latest result that gave a verdict
    stale_since: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    deleted_at: Mapped[datetime | None]


class MonitorLook(Record):
    """One look of a monitor's sensor; what the same results say again is no new one."""

    __tablename__ = "monitor_looks"
    __table_args__ = (
        UniqueConstraint("alias_id", "model_version_id", "digest"),
        Index("ix_monitor_looks_alias", "alias_id", "seq"),
        Index("ix_monitor_looks_version", "model_version_id", "verdict"),
    )

    monitor_id: Mapped[UUID] = mapped_column(ForeignKey("monitors.id"), index=True)
    alias_id: Mapped[UUID] = mapped_column(ForeignKey("aliases.id"))
    model_version_id: Mapped[UUID] = mapped_column(ForeignKey("model_versions.id"))
    digest: Mapped[str]  # of the results: a replay has the same
    source: Mapped[str]  # who measured: an outside evaluator's name, or `schedule`
    evaluation_ids: Mapped[list[str]] = mapped_column(ARRAY(Text))
    look: Mapped[int]  # k of the alias's last 30 days
    alpha: Mapped[float]
    verdict: Mapped[str]
    reading: Mapped[dict[str, Any]]
    measured_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    alias_change_id: Mapped[UUID | None] = mapped_column(ForeignKey("alias_changes.id"))
    outcome: Mapped[dict[str, Any]]  # what was done, and why nothing more


class Compensation(Record):
    """The one job that makes up for the regression of a model version."""

    __tablename__ = "compensations"
    __table_args__ = (UniqueConstraint("model_version_id"), UniqueConstraint("job_id"))

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    model_version_id: Mapped[UUID] = mapped_column(ForeignKey("model_versions.id"))
    monitor_id: Mapped[UUID] = mapped_column(ForeignKey("monitors.id"))
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    lever: Mapped[str | None]
    change: Mapped[str]  # what is different from the version's own job, in words

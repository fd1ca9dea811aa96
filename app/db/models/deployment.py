"""Registered models: their versions, the aliases that point at them, and every move of an alias."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record


class RegisteredModel(Record):
    """A name under which model versions are numbered and deployed."""

    __tablename__ = "registered_models"
    __table_args__ = (UniqueConstraint("project_id", "name"),)

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    description: Mapped[str | None]
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    gate: Mapped[str]  # `held`, or `unproven`: the least word on retention that is promoted
    max_cumulative_drop: Mapped[float | None]  # of the general mean against the lineage's root
    version_count: Mapped[int] = mapped_column(server_default=text("0"))
    updated_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class RegisteredVersion(Record):
    """A model version as number n of a registered model."""

    __tablename__ = "registered_versions"
    __table_args__ = (
        UniqueConstraint("registered_model_id", "version"),
        UniqueConstraint("registered_model_id", "model_version_id"),
        Index("ix_registered_versions_model_version_id", "model_version_id"),
    )

    registered_model_id: Mapped[UUID] = mapped_column(ForeignKey("registered_models.id"))
    version: Mapped[int]  # 1, 2, ... within the registered model
    model_version_id: Mapped[UUID] = mapped_column(ForeignKey("model_versions.id"))
    description: Mapped[str | None]


class Alias(Record):
    """A movable name; its revision only grows, also over a deletion, so that no ETag ever comes back."""

    __tablename__ = "aliases"
    __table_args__ = (
        UniqueConstraint("registered_model_id", "name"),
        Index("ix_aliases_version_id", "version_id"),
    )

    registered_model_id: Mapped[UUID] = mapped_column(ForeignKey("registered_models.id"))
    name: Mapped[str]
    version_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("registered_versions.id")
    )  # null: deleted
    revision: Mapped[int]
    moved_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class AliasChange(Record):
    """One move of an alias: who, why, from where to where."""

    __tablename__ = "alias_changes"
    __table_args__ = (
        UniqueConstraint("alias_id", "revision"),
        CheckConstraint(
            "NOT forced OR reason IS NOT NULL",
            name="force_has_a_reason",
        ),
    )

    alias_id: Mapped[UUID] = mapped_column(ForeignKey("aliases.id"))
    revision: Mapped[int]  # the alias's after the move
    action: Mapped[str]  # `promote`, `rollback`, `regression_rollback`, `delete`
    from_version_id: Mapped[UUID | None] = mapped_column(ForeignKey("registered_versions.id"))
    to_version_id: Mapped[UUID | None] = mapped_column(ForeignKey("registered_versions.id"))
    actor: Mapped[str]  # `key:<public part>`, or a monitor's id
    reason: Mapped[str | None]
    forced: Mapped[bool] = mapped_column(server_default=text("false"))
    details: Mapped[dict[str, Any]]  # what the gate objected to, or the reading that led here
    compensation_job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id"))

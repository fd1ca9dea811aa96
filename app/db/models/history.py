"""Checkpoints, evaluations with their per-item scores, and decisions."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record, enum_column
from app.domain.states import CheckpointStatus


class Checkpoint(Record):
    """A saved training state; the row is the commit point, its files lie under `path`."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "attempt", "branch", "step"),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    branch: Mapped[int]
    step: Mapped[int]
    status: Mapped[CheckpointStatus] = mapped_column(enum_column(CheckpointStatus))
    is_evaluated: Mapped[bool] = mapped_column(server_default=text("false"))
    superseded: Mapped[bool] = mapped_column(server_default=text("false"))
    corrupt: Mapped[bool] = mapped_column(server_default=text("false"))
    path: Mapped[str]  # under the storage root
    manifest_sha256: Mapped[str]
    size_bytes: Mapped[int]
    deleted_at: Mapped[datetime | None]  # files removed by retention of checkpoints
    valid_loss: Mapped[float | None]
    metrics: Mapped[dict[str, Any]]


class Evaluation(Record):
    """Scores of one subject on one benchmark version."""

    __tablename__ = "evaluations"
    __table_args__ = (
        # One evaluation point is one look, whichever attempt reports it.
        Index(
            "uq_evaluations_job_point",
            "job_id",
            "branch",
            "step",
            "benchmark_version_id",
            "purpose",
            unique=True,
            postgresql_where=text("job_id IS NOT NULL AND source = 'run'"),
        ),
        Index(
            "ix_evaluations_subject", "subject_type", "subject_key", "benchmark_version_id", "seq"
        ),
        Index("ix_evaluations_project", "project_id", "seq"),
        # Pages of results are merged from scans along these, whatever the size of the table.
        Index("ix_evaluations_named", "project_id", "benchmark", "seq"),
        Index("ix_evaluations_version", "benchmark_version_id", "project_id", "seq"),
        Index("ix_evaluations_subject_named", "subject_type", "subject_key", "benchmark", "seq"),
        Index("ix_evaluations_subject_seq", "subject_type", "subject_key", "seq"),
    )

    project_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("projects.id")
    )  # null: a base model's
    subject_type: Mapped[str]  # `fine_tuning.job`, `external_run`, `model`, `base_model`
    subject_key: Mapped[str]  # the job's uuid, the model version's name, `<base sha256>/<template>`
    job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id"))
    model_version_id: Mapped[UUID | None] = mapped_column(ForeignKey("model_versions.id"))
    checkpoint_id: Mapped[UUID | None] = mapped_column(ForeignKey("checkpoints.id"))
    benchmark_version_id: Mapped[UUID | None] = mapped_column(ForeignKey("benchmark_versions.id"))
    benchmark: Mapped[str]  # name, also of one unknown here
    metric: Mapped[str]
    purpose: Mapped[str]  # `baseline`, `gate`, `report`, `monitor`
    source: Mapped[str]  # `run`, `external`
    branch: Mapped[int | None]
    step: Mapped[int | None]
    value: Mapped[float]
    stderr: Mapped[float | None]
    n_samples: Mapped[int | None]
    is_paired: Mapped[bool] = mapped_column(server_default=text("true"))
    scores: Mapped[
        bytes | None
    ]  # zlib of float32, aligned with the version's items, NaN where not scored
    tokens: Mapped[bytes | None]  # token counts of nll, alike
    measured_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class DecisionRow(Record):
    """What the controller did at one evaluation point, with all that `decide()` rested on.

    The database refuses to rewrite or delete what was decided and its evidence.
    """

    __tablename__ = "decisions"
    __table_args__ = (UniqueConstraint("job_id", "branch", "step", "origin"),)

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"), index=True)
    branch: Mapped[int]  # before the decision
    step: Mapped[int]
    origin: Mapped[
        str
    ]  # `run`, `external:<evaluation id>`, `override:<key>:<n>` or `accept:<key>:<n>`
    look: Mapped[int]
    action: Mapped[str]
    code: Mapped[str]
    reason: Mapped[str]
    state: Mapped[str]  # `applied`, `proposed`, `accepted`, `overridden`
    evidence: Mapped[
        dict[str, Any]
    ]  # policy, levers, controller state before, look: decide()'s arguments
    decision: Mapped[dict[str, Any]]  # a Decision
    reply: Mapped[dict[str, Any]]  # the DecisionReply or Order that went down
    carry: Mapped[dict[str, Any] | None]  # of a rollback: cursors and RNG states to run on with
    target_checkpoint_id: Mapped[UUID | None] = mapped_column(ForeignKey("checkpoints.id"))

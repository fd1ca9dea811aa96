"""Jobs, their events and the orders given to them from outside."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Record, enum_column
from app.domain.states import TRANSITIONS, JobKind, JobState, StopRequest
from app.errors import Conflict


class Job(Record):
    """Everything a GPU does; the lease is `worker_id` until `lease_expires_at`, the fence is `attempt`.

    An external run is one too, of which nobody here holds a lease: no worker can claim it.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "(state IN ('running', 'pausing') AND kind <> 'external') ="
            " (worker_id IS NOT NULL AND lease_expires_at IS NOT NULL)",
            name="lease_goes_with_state",
        ),
        CheckConstraint(
            "kind <> 'external' OR state IN ('running', 'succeeded', 'failed', 'cancelled')",
            name="external_runs_are_never_queued",
        ),
        CheckConstraint(
            "kind = 'external' OR base_model_id IS NOT NULL",
            name="only_external_runs_lack_a_base",
        ),
        CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name="finished_at_goes_with_state",
        ),
        Index(
            "ix_jobs_leased",
            "lease_expires_at",
            postgresql_where=text("state IN ('running', 'pausing')"),
        ),
        Index("ix_jobs_project", "project_id", "kind", "seq"),
        Index(  # a project's head of the queue, and how many of its jobs wait
            "ix_jobs_waiting",
            "project_id",
            text("priority DESC"),
            "seq",
            postgresql_where=text("state IN ('queued', 'validating_files')"),
        ),
        # Whether anything waits that fits so many slots. The second condition keeps it from the claim, which
        # does not name it: with this index the claim would read the whole queue for each project.
        Index(
            "ix_jobs_sizes",
            "num_gpus",
            "queue",
            postgresql_where=text("state = 'queued' AND num_gpus >= 0"),
        ),
        Index(  # when a project was last given a slot
            "ix_jobs_started",
            "project_id",
            "started_at",
            postgresql_where=text("started_at IS NOT NULL"),
        ),
        Index(  # what is kept for jobs that have not ended
            "ix_jobs_start_version_id",
            "start_version_id",
            postgresql_where=text("start_version_id IS NOT NULL AND finished_at IS NULL"),
        ),
        Index(
            "ix_jobs_start_checkpoint_id",
            "start_checkpoint_id",
            postgresql_where=text("start_checkpoint_id IS NOT NULL AND finished_at IS NULL"),
        ),
    )

    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    kind: Mapped[JobKind] = mapped_column(enum_column(JobKind))
    state: Mapped[JobState] = mapped_column(enum_column(JobState))
    spec: Mapped[dict[str, Any]]  # a JobSpec, an ExportSpec, or a RunSpec
    run_plan: Mapped[
        dict[str, Any] | None
    ]  # of the latest attempt; eval_interval and gate_items stay
    warnings: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    data_checks: Mapped[dict[str, Any] | None]  # a DataChecks, of fine-tuning jobs
    power: Mapped[dict[str, Any] | None]  # regress_at_80, pass_at_zero and item counts
    #: Null of external runs alone, on a model that is not registered here.
    base_model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"), nullable=True)
    #: What the job goes on from, and the checkpoint of it; null: the base model as it was registered.
    start_version_id: Mapped[UUID | None] = mapped_column(
        ForeignKey(
            "model_versions.id", use_alter=True, name="fk_jobs_start_version_id_model_versions"
        )
    )
    start_checkpoint_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("checkpoints.id", use_alter=True, name="fk_jobs_start_checkpoint_id_checkpoints")
    )
    rerun_of_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id"))
    training_file_id: Mapped[UUID | None] = mapped_column(ForeignKey("files.id"))
    validation_file_id: Mapped[UUID | None] = mapped_column(ForeignKey("files.id"))
    general_file_id: Mapped[UUID | None] = mapped_column(ForeignKey("files.id"))
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    suffix: Mapped[str | None]
    seed: Mapped[int] = mapped_column(server_default=text("0"))

    queue: Mapped[str] = mapped_column(server_default=text("'default'"))
    priority: Mapped[int] = mapped_column(server_default=text("0"))
    num_gpus: Mapped[int] = mapped_column(server_default=text("1"))
    not_before: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    last_rung_at: Mapped[datetime | None]
    worker_id: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    crashes_without_progress: Mapped[int] = mapped_column(server_default=text("0"))
    stop_requested: Mapped[StopRequest | None] = mapped_column(enum_column(StopRequest))

    branch: Mapped[int] = mapped_column(server_default=text("0"))
    step: Mapped[int] = mapped_column(server_default=text("0"))
    total_steps: Mapped[int | None]
    #: What the next attempt resumes from; never the highest step.
    ckpt_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("checkpoints.id", use_alter=True, name="fk_jobs_ckpt_id_checkpoints")
    )
    controller_state: Mapped[dict[str, Any] | None]  # a ControllerState: the coefficients in force
    order_version: Mapped[int] = mapped_column(
        server_default=text("0")
    )  # of the last outside order
    event_count: Mapped[int] = mapped_column(server_default=text("0"))
    webhook_count: Mapped[int] = mapped_column(server_default=text("0"))
    progress: Mapped[dict[str, Any] | None]
    trained_tokens: Mapped[int | None]

    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[dict[str, Any] | None]  # code, message, param
    result_file_id: Mapped[UUID | None] = mapped_column(ForeignKey("files.id"))
    report: Mapped[dict[str, Any] | None]  # final verdict, frontier, seconds by phase
    model_version_id: Mapped[UUID | None] = mapped_column(
        ForeignKey(
            "model_versions.id", use_alter=True, name="fk_jobs_model_version_id_model_versions"
        )
    )

    def move_to(self, state: JobState) -> None:
        """Changes the state; the only writer of it beside the engine's fenced SQL.

        Raises:
            Conflict: No such move exists.
        """
        if state not in TRANSITIONS[self.state]:
            raise Conflict(
                f"A job that is {self.state.value} cannot become {state.value}.", "status"
            )
        self.state = state


class JobEvent(Record):
    """A line of a job's log; `sequence` is gapless per job."""

    __tablename__ = "job_events"
    __table_args__ = (UniqueConstraint("job_id", "sequence"),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    sequence: Mapped[int]
    level: Mapped[str]  # `info`, `warn`, `error`
    type: Mapped[str]  # `message`, `metrics`
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class JobOrder(Record):
    """A change of coefficients from outside; `effective_step` is set once the trainer applied it."""

    __tablename__ = "job_orders"
    __table_args__ = (UniqueConstraint("job_id", "version"),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    version: Mapped[int]
    branch: Mapped[int]
    order: Mapped[dict[str, Any]]  # a messages.Order
    effective_step: Mapped[int | None]

"""The claim of a queued job, fair between projects; and how much of its quotas a project uses."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    DateTime,
    Enum,
    and_,
    func,
    literal,
    select,
    text,
    true,
    update,
)
from sqlalchemy.orm import Session, aliased

from app.db.models import Checkpoint, File, Job, ModelVersion, Project
from app.domain.states import LEASED, JobState

NO_LIMIT: Final = 2**31


class Quotas(NamedTuple):
    """What a project may use; None: no limit."""

    queued_jobs: int
    running_jobs: int | None
    storage_bytes: int | None


class QueueRepository:
    """The queue over all projects."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def claim(
        self,
        *,
        worker_id: str,
        free_slots: int,
        queues: Sequence[str],
        ttl: float,
        max_running: int | None = None,
        passed_over: Sequence[UUID] = (),
    ) -> Job | None:
        """Leases the best queued job that fits; each is given to one claimer, none waits for another.

        The project that holds the fewest slots is served first, of those the one that was served longest ago;
        within a project priority counts, then age. So a long queue makes no other project wait longer.

        Args:
            worker_id: Who claims.
            free_slots: That the job has to fit.
            queues: That the worker serves.
            ttl: Seconds of the lease.
            max_running: Jobs of a project without its own quota that may run at once.
            passed_over: Projects that get nothing this time.
        """
        best = best_queued(free_slots, queues, max_running, passed_over)
        return self._session.scalar(
            update(Job)
            .where(Job.id == best.c.id)
            .values(
                state=JobState.RUNNING,
                attempt=Job.attempt + 1,
                worker_id=worker_id,
                lease_expires_at=func.clock_timestamp(type_=DateTime(timezone=True))
                + timedelta(seconds=ttl),
                started_at=func.coalesce(Job.started_at, func.clock_timestamp()),
            )
            .returning(Job)
            .execution_options(populate_existing=True, synchronize_session=False)
        )

    def has_fitting(self, free_slots: int, queues: Sequence[str]) -> bool:
        """Whether any queued job fits, now or after its wait: an index answers, however long the queue is.

        A claim reads the whole queue where nothing in it fits, and idle workers look often.
        """
        query = select(Job.id).where(
            _is_in(Job.state, JobState.QUEUED),
            Job.queue.in_(queues),
            text("jobs.num_gpus >= 0"),  # word for word, so that `ix_jobs_sizes` serves
            Job.num_gpus <= free_slots,
        )
        return self._session.scalar(select(query.exists())) or False

    def get_quotas(self, project_id: UUID, standard: Quotas, *, lock: bool = False) -> Quotas:
        """A project's quotas; `lock` has others that lock them wait until the transaction ends."""
        query = select(
            Project.max_queued_jobs, Project.max_running_jobs, Project.max_storage_bytes
        ).where(Project.id == project_id)
        if lock:
            query = query.with_for_update(key_share=True)
        own = self._session.execute(query).one()
        queued, running, stored = (
            usual if value is None else value for value, usual in zip(own, standard, strict=True)
        )
        return Quotas(standard.queued_jobs if queued is None else queued, running, stored)

    def count_waiting(self, project_id: UUID) -> int:
        """Jobs of a project that wait for a worker or for their files."""
        waiting = _is_in(Job.state, JobState.QUEUED, JobState.VALIDATING_FILES)
        query = select(func.count()).where(Job.project_id == project_id, waiting)
        return self._session.scalar(query) or 0

    def count_running(self, project_id: UUID) -> int:
        """Jobs of a project that a worker holds."""
        query = select(func.count()).where(Job.project_id == project_id, _is_leased())
        return self._session.scalar(query) or 0

    def sum_storage(self, project_id: UUID) -> int:
        """Bytes of a project's files, checkpoints and published models, as far as they still exist."""
        files = select(func.sum(File.size_bytes)).where(
            File.project_id == project_id,
            File.deleted_at.is_(None),
            File.expires_at.is_(None) | (File.expires_at > func.clock_timestamp()),
        )
        versions = select(func.sum(ModelVersion.size_bytes)).where(
            ModelVersion.project_id == project_id, ModelVersion.deleted_at.is_(None)
        )
        checkpoints = (
            select(func.sum(Checkpoint.size_bytes))
            .join(Job, Job.id == Checkpoint.job_id)
            .where(Job.project_id == project_id, Checkpoint.deleted_at.is_(None))
        )
        parts = [
            func.coalesce(query.scalar_subquery(), 0) for query in (files, versions, checkpoints)
        ]
        return int(self._session.scalar(select(parts[0] + parts[1] + parts[2])) or 0)


def best_queued(
    free_slots: int, queues: Sequence[str], max_running: int | None, passed_over: Sequence[UUID]
) -> Any:  # noqa: ANN401 - a CTE, whose columns no type knows
    """The id of the job to lease, its row locked; kept apart from the UPDATE, so that it is evaluated once."""
    running = (
        select(
            Job.project_id,
            func.count().label("jobs"),
            func.sum(func.greatest(Job.num_gpus, 1)).label("slots"),
        )
        .where(_is_leased())
        .group_by(Job.project_id)
        .cte("running")
    )
    head, done = aliased(Job, name="head"), aliased(Job, name="done")
    first = (
        select(head.priority, head.seq)
        .where(head.project_id == Project.id, *_fits(head, free_slots, queues))
        .order_by(head.priority.desc(), head.seq)
        .limit(1)
        .lateral("first")
    )
    served_at = (
        select(done.started_at)
        .where(done.project_id == Project.id, done.started_at.is_not(None))
        .order_by(done.started_at.desc())
        .limit(1)
        .scalar_subquery()
    )
    limit = NO_LIMIT if max_running is None else max_running
    ranked = (
        select(Project.id)
        .join(first, true())
        .outerjoin(running, running.c.project_id == Project.id)
        .where(
            Project.id.not_in(passed_over),
            func.coalesce(running.c.jobs, 0) < func.coalesce(Project.max_running_jobs, limit),
        )
        .order_by(
            func.coalesce(running.c.slots, 0),
            served_at.asc().nulls_first(),
            first.c.priority.desc(),
            first.c.seq,
        )
        .cte("ranked")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    # The lateral join walks the projects in their order and stops at the first row that nobody else has locked:
    # sorting here again would lock the head of every project.
    free = (
        select(Job.id)
        .where(Job.project_id == ranked.c.id, *_fits(Job, free_slots, queues))
        .order_by(Job.priority.desc(), Job.seq)
        .limit(1)
        .with_for_update(skip_locked=True, key_share=True)
        .lateral("free")
    )
    return (
        select(free.c.id)
        .select_from(ranked.join(free, true()))
        .limit(1)
        .cte("best")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )


def _fits(job: Any, free_slots: int, queues: Sequence[str]) -> list[ColumnElement[bool]]:  # noqa: ANN401 - Job or an alias of it
    return [
        _is_in(job.state, JobState.QUEUED),
        job.not_before <= func.clock_timestamp(),
        job.queue.in_(queues),
        func.greatest(job.num_gpus, 1) <= free_slots,
    ]


def _is_leased() -> ColumnElement[bool]:
    return and_(_is_in(Job.state, *sorted(LEASED)), Job.worker_id.is_not(None))


def _is_in(column: Any, *states: JobState) -> ColumnElement[bool]:  # noqa: ANN401 - a column of Job or of an alias
    """States written into the statement: a partial index serves only what the planner can see."""
    kind: Enum = Job.__table__.c.state.type  # type: ignore[assignment]
    values = [literal(state, kind, literal_execute=True) for state in states]
    found: ColumnElement[bool] = column == values[0] if len(values) == 1 else column.in_(values)
    return found

"""Queries on runs that are trained elsewhere, and on the orders that decisions of any job gave."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.models import DecisionRow, Job, JobOrder
from app.db.repositories.paging import newest_first
from app.domain.states import JobKind, JobState
from app.errors import NotFound


class ExternalRunRepository:
    """External runs of a project, and their decisions in the order in which they were made."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, project_id: UUID, run_id: UUID, *, for_update: bool = False) -> Job:
        """The run with this id; `for_update` locks its row and reads it afresh.

        Raises:
            NotFound: The project has no such run.
        """
        query = select(Job).where(
            Job.id == run_id, Job.project_id == project_id, Job.kind == JobKind.EXTERNAL
        )
        if for_update:
            query = query.with_for_update().execution_options(populate_existing=True)
        run = self._session.scalar(query)
        if run is None:
            raise NotFound("No run has this id.", "run_id")
        return run

    def list_page(self, project_id: UUID, *, after: Job | None, limit: int) -> list[Job]:
        """Runs, newest first."""
        query = select(Job).where(Job.project_id == project_id, Job.kind == JobKind.EXTERNAL)
        query = newest_first(query, Job, after=after, limit=limit)
        return list(self._session.scalars(query))

    def count_running(self, project_id: UUID) -> int:
        """Runs that nobody has ended."""
        query = select(func.count()).where(
            Job.project_id == project_id,
            Job.kind == JobKind.EXTERNAL,
            Job.state == JobState.RUNNING,
        )
        return self._session.scalar(query) or 0

    def list_decisions_after(
        self, run: Job, *, after: UUID | None, limit: int
    ) -> list[DecisionRow]:
        """Decisions made after the one with the id `after`, oldest first.

        Raises:
            NotFound: The run has no decision `after`.
        """
        query = select(DecisionRow).where(DecisionRow.job_id == run.id)
        if after is not None:
            place = self._session.scalar(
                select(DecisionRow.seq).where(DecisionRow.id == after, DecisionRow.job_id == run.id)
            )
            if place is None:
                raise NotFound("after: the run has no decision with this id.", "after")
            query = query.where(DecisionRow.seq > place)
        return list(self._session.scalars(query.order_by(DecisionRow.seq).limit(limit)))

    def list_since_last_look(self, job_id: UUID) -> list[DecisionRow]:
        """The decision on the latest evaluation, and what people ordered since; empty before the first."""
        own = (DecisionRow.job_id == job_id, DecisionRow.origin == "run")
        last = select(func.max(DecisionRow.seq)).where(*own).scalar_subquery()
        return list(
            self._session.scalars(
                select(DecisionRow)
                .where(DecisionRow.job_id == job_id, DecisionRow.seq >= last)
                .order_by(DecisionRow.seq)
            )
        )

    def find_decision(self, project_id: UUID, decision_id: UUID) -> DecisionRow | None:
        """A decision of the project, of whatever job."""
        return self._session.scalar(
            select(DecisionRow).where(
                DecisionRow.id == decision_id, DecisionRow.project_id == project_id
            )
        )

    def list_orders(self, job_id: UUID, versions: Sequence[int]) -> dict[int, JobOrder]:
        """Orders of a job by version."""
        found = self._session.scalars(
            select(JobOrder).where(JobOrder.job_id == job_id, JobOrder.version.in_(versions))
        )
        return {order.version: order for order in found}
